"""`edgecomp run`: ask a bundle about images."""
from __future__ import annotations

import sys
from pathlib import Path

import click

from edgecomp.commands.options import BACKEND, BUNDLE, JSON, PLAN, THREADS, print_json


@click.command("run")
@BUNDLE
@click.option("--image", "images", multiple=True, type=click.Path(), help="A picture. May be repeated.")
@click.option("--prompt", "prompts", multiple=True, required=True, help="What to ask. Repeated: further turns of one conversation.")
@PLAN
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--stop", multiple=True, help="A text that ends the answer. May be repeated.")
@click.option("--raw", is_flag=True, help="Take the prompt as it is, without the chat template.")
@click.option("--stats", is_flag=True, help="Show tokens, times and memory of each answer, on stderr.")
@BACKEND
@THREADS
@JSON
def command(bundle: Path, images: tuple[str, ...], prompts: tuple[str, ...], plan: str | None, max_new_tokens: int, temperature: float, top_p: float,
            seed: int | None, stop: tuple[str, ...], raw: bool, stats: bool, backend: str, threads: int | None, as_json: bool) -> None:
    """Ask BUNDLE about images; the answer streams as it comes.

    \b
    edgecomp run BUNDLE --image street.jpg --prompt "What does the sign say?" --prompt "In which language?"
    """
    import dataclasses

    from edgecomp_runtime import Bundle, Session
    if raw and len(prompts) > 1:
        raise click.UsageError("--raw takes one prompt: further turns need the chat template")
    if "" in stop:
        raise click.UsageError("--stop is empty, which would end no answer: give a text, or leave it out")
    session = Session(Bundle.open(bundle), plan=plan, backend=backend, threads=threads)
    turns: list[dict[str, object]] = []
    answers = []
    for number, prompt in enumerate(prompts):
        pictures = [{"type": "image"}] * len(images) if number == 0 else []
        turns.append({"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]})
        if not prompt.strip():
            turns = []  # the session says what is wrong with an empty prompt
        generation = session.generate(prompt if raw or not turns else turns, list(images), max_new_tokens=max_new_tokens, temperature=temperature,
                                      top_p=top_p, seed=seed, stop=stop, raw=raw)
        try:
            for piece in generation:
                if not as_json:
                    sys.stdout.write(piece if generation.text != piece else piece.lstrip())
                    sys.stdout.flush()
        except KeyboardInterrupt:
            generation.cancel()
            click.echo("", err=True)
            sys.exit(130)
        if not as_json:
            click.echo()
        if stats:
            click.echo(_statistics(dataclasses.asdict(generation.statistics)), err=True)
        answers.append({"prompt": prompt, "answer": generation.text.strip(), **dataclasses.asdict(generation.statistics)})
        turns.append({"role": "assistant", "content": [{"type": "text", "text": generation.text.strip()}]})
    if as_json:
        print_json(answers)


def _statistics(s: dict[str, float]) -> str:
    memory = f"peak memory {s['peak_memory_bytes'] / 2**20:.0f} MiB ({s['memory_meter']})"
    return (f"  {s['plan']} on {s['backend']}: {s['visual_tokens_in']} visual tokens, {s['visual_tokens_kept']} kept; "
            f"{s['prompt_rows']} rows, {s['reused_rows']} reused\n"
            f"  preprocess {s['preprocess_ms']:.1f} ms, vision {s['vision_ms']:.1f} ms, prefill {s['prefill_ms']:.1f} ms, "
            f"first token {s['first_token_ms']:.1f} ms, {s['per_token_ms']:.2f} ms a token "
            f"({s['new_tokens']} tokens, stopped by {s['stopped_by']}); {memory}")
