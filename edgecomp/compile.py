"""Checkpoint to runnable bundle in one go: export, compress, quantize, lower."""
from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from edgecomp.budget import tokens_of
from edgecomp.compress import Recipe, compress
from edgecomp.quantize.apply import quantize
from edgecomp.quantize.rule import BLOCK, check
from edgecomp.quantize.subset import Calibration
from edgecomp.writer import goal
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.errors import EdgecompError

# names only: the compiler does not depend on torch
EXPORTER = "edgecomp_export.export"
CHECKPOINT = "edgecomp_export.checkpoint"
VERIFIER = "edgecomp_export.layerwise"


def compile_model(model: str, out: Path, recipes: Sequence[Recipe], *, precision: str = "fp32", weights: str | None = None, block: int = BLOCK,
                  unquantized: Sequence[str] = (), calibration: Calibration | None = None, context: int | None = None,
                  image_size: tuple[int, int] | None = None, tiles: int | None = None, max_images: int | None = None, verify: bool = False,
                  say: Callable[[str], None] = lambda line: None) -> list[str]:
    """Exports a checkpoint, adds a plan for each recipe and quantizes weights and activations.

    See `edgecomp_export.export.export`, `compress` and `quantize`.

    With `verify`, the bundle is compared with Hugging Face's model layer by layer before weights are quantized and it gets its name; where they
    differ, VerificationError says where, and nothing is written.

    Returns:
        The names of the plans made.
    """
    for stage in (stage for recipe in recipes for stage in recipe.stages):
        tokens_of(stage.keep, sys.maxsize)  # a budget that no model could meet is refused before the export
    if weights:
        check(weights, block)
    if calibration:
        calibration.candidates()  # a folder that cannot serve, too
    export = importlib.import_module(EXPORTER).export
    fewer_bits = bool(weights or calibration)
    # on one disk with `out`, for hard links
    with goal(out), tempfile.TemporaryDirectory(prefix=f".{out.name}.export.", dir=out.parent) as folder:
        if fewer_bits and (bits := importlib.import_module(CHECKPOINT).stored_in(model)):
            raise EdgecompError(f"{model} has its weights in {bits} already: leave out --weights and --activations")
        neutral = export(model, Path(folder) / "neutral", precision=precision, context=context, image_size=image_size, tiles=tiles,
                         max_images=max_images, say=say)
        compiled = Path(folder) / "compiled" if verify or fewer_bits else out
        # what is quantized is lowered behind it
        names = compress(neutral, compiled, recipes, dialects=() if fewer_bits else ("onnxruntime",), say=say)
        if verify:
            importlib.import_module(VERIFIER).gate(Bundle.open(compiled), say)
        if fewer_bits:
            quantize(compiled, out, weights, block=block, unquantized=unquantized, calibration=calibration, say=say)
        elif verify:
            compress(compiled, out, [])
        return names
