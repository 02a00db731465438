"""`edgecomp export`: checkpoint to neutral bundle."""
from __future__ import annotations

import importlib
from pathlib import Path

import click

from edgecomp.commands.options import OUTPUT, say


@click.command("export")
@click.argument("model")
@OUTPUT
@click.option("--precision", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True, help="Of weights and arithmetic.")
@click.option("--context", type=click.IntRange(min=1), help="Rows of the window. [default: 2048, or the model's]")
def command(model: str, out: Path, precision: str, context: int | None) -> None:
    """Export MODEL, a Hugging Face folder or hub name, to a bundle of neutral graphs: no budget, no backend yet."""
    from edgecomp.compile import EXPORTER
    from edgecomp.writer import goal
    with goal(out):  # checked before the model is loaded
        importlib.import_module(EXPORTER).export(model, out, precision=precision, context=context, say=say)
    say(f"{out} is written; `edgecomp compress {out} -o BUNDLE --method NAME --keep K` makes it runnable")
