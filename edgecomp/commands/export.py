"""`edgecomp export`: checkpoint to neutral bundle."""
from __future__ import annotations

import importlib
from pathlib import Path

import click

from edgecomp.commands.options import CONTEXT, OUTPUT, PRECISION, pictures, say


@click.command("export")
@click.argument("model")
@OUTPUT
@pictures
@PRECISION
@CONTEXT
def command(model: str, out: Path, precision: str, context: int | None,
            image_size: tuple[int, int] | None, tiles: int | None, max_images: int | None) -> None:
    """Export MODEL, a Hugging Face folder or hub name, to a bundle of neutral graphs: no budget, no backend yet."""
    from edgecomp.compile import EXPORTER
    from edgecomp.writer import goal
    with goal(out):  # checked before the model is loaded
        importlib.import_module(EXPORTER).export(model, out, precision=precision, context=context, image_size=image_size, tiles=tiles,
                                                 max_images=max_images, say=say)
    say(f"{out} is written; `edgecomp compress {out} -o BUNDLE --method NAME --keep K` makes it runnable")
