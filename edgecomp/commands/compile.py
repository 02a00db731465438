"""`edgecomp compile`: checkpoint to runnable bundle."""
from __future__ import annotations

from pathlib import Path

import click

from edgecomp.commands.options import KEEP, METHODS, OUTPUT, POSITION, recipes, say


@click.command("compile")
@click.argument("model")
@OUTPUT
@METHODS
@KEEP
@POSITION
@click.option("--precision", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True, help="Of weights and arithmetic.")
@click.option("--context", type=click.IntRange(min=1), help="Rows of the window, before compression. [default: 2048, or the model's]")
def command(model: str, out: Path, methods: tuple[str, ...], keeps: tuple[str, ...], position: str, precision: str, context: int | None) -> None:
    """Compile MODEL, a Hugging Face folder or hub name, to a bundle that runs on ONNX Runtime.

    The bundle has the plan 'full' and one for each method and budget; the first is its default.

    \b
    edgecomp compile llava-hf/llava-1.5-7b-hf -o llava --method dart --keep 64 --keep 25%
    """
    from edgecomp.compile import compile_model
    names = compile_model(model, out, recipes(methods, keeps, position), precision=precision, context=context, say=say)
    say(f"{out} is ready, with the plans {', '.join(['full', *names])}")
