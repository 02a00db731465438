"""`edgecomp verify`: a bundle against the Hugging Face model it came from."""
from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from edgecomp.commands.options import BUNDLE, JSON, PLAN, THREADS, print_json, progress, say


@click.command("verify")
@BUNDLE
@click.option("--model", help="The checkpoint. [default: the one that the bundle names]")
@click.option("--image", "images", multiple=True, type=click.Path(), help="A picture to ask about. May be repeated. [default: two made-up ones]")
@click.option("--prompt", "prompts", multiple=True, default=["Describe the image."], show_default=True,
              help="A question about the pictures. May be repeated with --whole.")
@click.option("--whole", is_flag=True, help="Compare greedy text and the logits at every step, with both models in memory.")
@click.option("--data", type=click.Path(path_type=Path), help="With --whole: questions from a JSONL instead, as `eval` takes it.")
@click.option("--limit", type=click.IntRange(min=1), help="With --whole: only the first so many questions.")
@PLAN
@THREADS
@JSON
def command(bundle: Path, model: str | None, images: tuple[str, ...], prompts: tuple[str, ...], whole: bool, data: Path | None,
            limit: int | None, plan: str | None, threads: int | None, as_json: bool) -> None:
    """Compare BUNDLE with the Hugging Face model, one layer at a time. Exits 1 where they differ.

    Each layer gets what Hugging Face's got, so that one layer of each is in memory; every plan's visual tokens are checked too.
    With --whole, a compressed plan is compared with the HF model on which the graph's kept tokens and positions are imposed.
    """
    if whole:
        good = _whole(bundle, model, images, prompts, data, limit, plan, threads, as_json)
    else:
        for name, value in (("--data", data), ("--limit", limit), ("--plan", plan), ("--threads", threads)):
            if value is not None:
                raise click.UsageError(f"{name} goes with --whole: layer by layer, all plans are compared on the same pictures")
        if len(prompts) > 1:
            raise click.UsageError("several --prompt go with --whole: layer by layer, there is one")
        good = _layers(bundle, model, images, prompts[0], as_json)
    if not good:
        sys.exit(1)


def _layers(path: Path, model: str | None, images: tuple[str, ...], prompt: str, as_json: bool) -> bool:
    from edgecomp_runtime import Bundle
    layerwise = importlib.import_module("edgecomp_export.layerwise")
    bundle = Bundle.open(path)
    count = bundle.manifest.vision.layers + bundle.manifest.decoder.layers
    with progress("layers", count) as bar:
        checks = layerwise.verify_layers(bundle, list(images) or layerwise.pictures(bundle.manifest), prompt, model=model,
                                         tick=lambda check: bar.update(check.layer is not None))
    good, worst = all(check.good for check in checks), layerwise.worst(checks)
    if as_json:
        print_json({"good": good, "checks": len(checks), "differ": [dataclasses.asdict(check) for check in checks if not check.good],
                    "worst": dataclasses.asdict(worst)})
        return good
    click.echo(f"{len(checks)} comparisons; the largest difference: {worst}: {'good' if good else 'NOT GOOD'}")
    if not good:
        click.echo(f"they part at the {next(check for check in checks if not check.good)}")
    return good


def _whole(path: Path, model: str | None, images: tuple[str, ...], prompts: tuple[str, ...], data: Path | None, limit: int | None,
           plan: str | None, threads: int | None, as_json: bool) -> bool:
    from edgecomp.evaluate import read_questions
    from edgecomp_runtime import Bundle, Session
    if data and (images or click.get_current_context().get_parameter_source("prompts") is not ParameterSource.DEFAULT):
        raise click.UsageError("--data has its own pictures and questions: leave out --image and --prompt")
    verification = importlib.import_module("edgecomp_export.verify")
    session = Session(Bundle.open(path), plan=plan, threads=threads)
    manifest = session.bundle.manifest
    pictures: list[Any] = list(images) or importlib.import_module("edgecomp_export.layerwise").pictures(manifest)
    questions = [(q.image, q.question) for q in read_questions(data)] if data else [(i, p) for i in pictures for p in prompts]
    say(f"loading {model or manifest.source.model}")
    reference = verification.reference_of(session.bundle, model)
    with progress(f"{session.plan_name}, {len(questions[:limit])} questions", len(questions[:limit])) as bar:
        found = verification.verify(session, reference, questions[:limit], lambda: bar.update(1))
    tolerance = verification.tolerance(manifest)
    worst = max(c.logits for c in found)
    good = all(c.same for c in found) and worst <= tolerance
    if as_json:
        print_json({"plan": session.plan_name, "good": good, "questions": len(found), "same_text": sum(c.same for c in found),
                    "logits": worst, "tolerance": tolerance, "differ": [dataclasses.asdict(c) for c in found if not c.same]})
        return good
    for c in found:
        if not c.same:
            click.echo(f"differs: {c.question}\n  Hugging Face: {c.reference}\n  bundle:       {c.bundle}")
    click.echo(f"{session.plan_name}: {sum(c.same for c in found)} of {len(found)} answers the same, logits within {worst:.1e} "
               f"(tolerance {tolerance:.0e}): {'good' if good else 'NOT GOOD'}")
    return good
