"""Lowering a plan to a dialect: its neutral graphs rewritten for what one backend takes, and written beside them."""
from __future__ import annotations

from pathlib import Path

from edgecomp.dialects import DIALECTS, lowering
from edgecomp.ir.graphs import describe, load, save
from edgecomp_runtime.errors import EdgecompError, UnknownNameError
from edgecomp_runtime.manifest import GraphInfo, PlanInfo


def lowered(plan: PlanInfo, dialect: str, graphs: dict[str, GraphInfo], folder: Path) -> dict[str, str]:
    """Lowers a plan's graphs.

    Args:
        plan: with its neutral graphs.
        dialect: 'onnxruntime', or a TensorRT release of `dialects.targets`.
        graphs: the bundle's by file; new ones are added. What another plan has had lowered is not lowered again.
        folder: the bundle's.

    Returns:
        The file of each part: vision, prefill, decode.

    Raises:
        EdgecompError, UnknownNameError: there is no such dialect, or it cannot say what a graph computes.
    """
    return {part: (_shared if dialect in DIALECTS else _apart)(plan, part, file, dialect, graphs, folder)
            for part, file in plan.variants["neutral"].items()}


def _shared(plan: PlanInfo, part: str, file: str, dialect: str, graphs: dict[str, GraphInfo], folder: Path) -> str:
    """One graph for prefill and decode."""
    name = f"{file.removesuffix('.onnx')}.{dialect}.onnx"
    if name not in graphs:
        model = load(folder / file)
        lowering(dialect)(model)
        save(model, folder / name)
        graphs[name] = describe(model)
    return name


def _apart(plan: PlanInfo, part: str, file: str, dialect: str, graphs: dict[str, GraphInfo], folder: Path) -> str:
    """A graph for each part, the decoder's with caches of the plan's size."""
    from edgecomp.dialects import tensorrt
    from edgecomp.dialects.targets import TARGETS, refused
    if dialect not in TARGETS:
        raise UnknownNameError("dialect", dialect, [*DIALECTS, *TARGETS])
    stem, target = file.removesuffix(".onnx"), TARGETS[dialect]
    name = f"{stem}.{dialect}.onnx" if part == "vision" else f"{stem}.{part}-{max(plan.cache_rows)}.{dialect}.onnx"
    if name not in graphs:
        model = load(folder / file)
        tensorrt.lower(model, part, target, plan.cache_rows)
        if problems := refused(model, target):
            raise EdgecompError(f"{dialect} does not take the {part} graph of this plan: {'; '.join(problems[:3])}")
        save(model, folder / name)
        graphs[name] = describe(model)
    return name
