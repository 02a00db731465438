"""`edgecomp quantize`: a bundle with weights in fewer bits."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgecomp.commands.options import BUNDLE, OUTPUT, quantization, say

if TYPE_CHECKING:
    from edgecomp.quantize.subset import Calibration


@click.command("quantize")
@BUNDLE
@OUTPUT
@quantization
def command(bundle: Path, out: Path, weights: str | None, block: int, unquantized: tuple[str, ...], calibration: Calibration | None) -> None:
    """Write BUNDLE again with its decoder's weights in int8 or int4, its vision tower in int8, or both, lowered for ONNX Runtime.

    Plans stay as they are. Embeddings and norms stay in the bundle's precision. OUTPUT may be BUNDLE itself.
    """
    from edgecomp.quantize.apply import quantize
    if weights is None and calibration is None:
        raise click.UsageError("nothing is asked for: --weights int8 or int4, --activations int8, or both")
    quantize(bundle, out, weights, block=block, unquantized=unquantized, calibration=calibration, say=say)
    say(f"{out} is ready")
