"""`edgecomp compile`: checkpoint to runnable bundle."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgecomp.commands.options import CONTEXT, OUTPUT, PRECISION, compression, pictures, quantization, say

if TYPE_CHECKING:
    from edgecomp.compress import Recipe
    from edgecomp.quantize.subset import Calibration


@click.command("compile")
@click.argument("model")
@OUTPUT
@compression
@pictures
@PRECISION
@quantization
@CONTEXT
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare with Hugging Face's model, layer by layer, before writing.")
def command(model: str, out: Path, recipes: list[Recipe], precision: str, weights: str | None, block: int, unquantized: tuple[str, ...],
            calibration: Calibration | None, context: int | None, image_size: tuple[int, int] | None, tiles: int | None, max_images: int | None,
            verify: bool) -> None:
    """Compile MODEL, a Hugging Face folder or hub name, to a bundle that runs on ONNX Runtime.

    The bundle has the plan 'full' and one for each method and budget; the first is its default.

    \b
    edgecomp compile llava-hf/llava-1.5-7b-hf -o llava --method dart --keep 64 --keep 25%
    """
    from edgecomp.compile import compile_model
    names = compile_model(model, out, recipes, precision=precision, weights=weights, block=block, unquantized=unquantized,
                          calibration=calibration, context=context, image_size=image_size, tiles=tiles, max_images=max_images, verify=verify,
                          say=say)
    say(f"{out} is ready, with the plans {', '.join(['full', *names])}")
