"""`edgecomp verify`: a bundle against the Hugging Face model it came from."""
from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path

import click
from click.core import ParameterSource

from edgecomp.commands.options import BUNDLE, JSON, PLAN, THREADS, print_json, progress, say


@click.command("verify")
@BUNDLE
@click.option("--model", help="The checkpoint. [default: the one that the bundle names]")
@click.option("--image", "images", multiple=True, type=click.Path(), help="A picture to ask about. May be repeated. [default: two made-up ones]")
@click.option("--prompt", "prompts", multiple=True, default=["Describe the image."], show_default=True,
              help="A question for each picture. May be repeated.")
@click.option("--data", type=click.Path(path_type=Path), help="Questions from a JSONL instead, as `eval` takes it.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many questions.")
@PLAN
@THREADS
@JSON
def command(bundle: Path, model: str | None, images: tuple[str, ...], prompts: tuple[str, ...], data: Path | None, limit: int | None,
            plan: str | None, threads: int | None, as_json: bool) -> None:
    """Compare BUNDLE with the Hugging Face model: greedy text, and logits at every step. Exits 1 where they differ.

    A compressed plan is compared with the HF model on which the graph's kept tokens and positions are imposed.
    """
    from edgecomp.evaluate import read_questions
    from edgecomp_runtime import Bundle, Session
    if data and (images or click.get_current_context().get_parameter_source("prompts") is not ParameterSource.DEFAULT):
        raise click.UsageError("--data has its own pictures and questions: leave out --image and --prompt")
    verification = importlib.import_module("edgecomp_export.verify")
    session = Session(Bundle.open(bundle), plan=plan, threads=threads)
    manifest = session.bundle.manifest
    questions = [(q.image, q.question) for q in read_questions(data)] if data else [(i, p) for i in images or _pictures() for p in prompts]
    say(f"loading {model or manifest.source.model}")
    reference = importlib.import_module("edgecomp_export.reference").Reference(model or manifest.source.model)
    with progress(f"{session.plan_name}, {len(questions[:limit])} questions", len(questions[:limit])) as bar:
        found = verification.verify(session, reference, questions[:limit], lambda: bar.update(1))
    tolerance = verification.TOLERANCE[manifest.precision]
    worst = max(c.logits for c in found)
    good = all(c.same for c in found) and worst <= tolerance
    if as_json:
        print_json({"plan": session.plan_name, "good": good, "questions": len(found), "same_text": sum(c.same for c in found),
                    "logits": worst, "tolerance": tolerance, "differ": [dataclasses.asdict(c) for c in found if not c.same]})
    else:
        for c in found:
            if not c.same:
                click.echo(f"differs: {c.question}\n  Hugging Face: {c.reference}\n  bundle:       {c.bundle}")
        click.echo(f"{session.plan_name}: {sum(c.same for c in found)} of {len(found)} answers the same, logits within {worst:.1e} "
                   f"(tolerance {tolerance:.0e}): {'good' if good else 'NOT GOOD'}")
    if not good:
        sys.exit(1)


def _pictures() -> list[object]:
    """Two made-up pictures, the same ones on every machine: a gradient, and coarse noise."""
    import numpy as np
    ramp = np.linspace(0, 255, 320)
    gradient = np.stack([np.add.outer(ramp, ramp) / 2, np.subtract.outer(ramp, ramp) / 2 + 128, np.tile(ramp, (320, 1))], -1).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8).repeat(40, 0).repeat(40, 1)
    return [gradient, noise]
