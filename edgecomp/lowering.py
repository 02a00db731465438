"""Lowering plans to a dialect: their neutral graphs rewritten for what one backend takes, and written beside them."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import onnx_ir as ir

from edgecomp.dialects import DIALECTS, lowering
from edgecomp.ir.graphs import describe, load, save
from edgecomp_runtime.errors import EdgecompError, UnknownNameError
from edgecomp_runtime.manifest import GraphInfo, PlanInfo


def with_dialect(plans: Mapping[str, PlanInfo], names: Iterable[str], dialect: str, graphs: dict[str, GraphInfo], folder: Path,
                 say: Callable[[str], None] = lambda line: None) -> dict[str, PlanInfo]:
    """All plans, the named ones with their graphs in a dialect, lowered where they were not. See `lowered`; `say` is told what is being done."""
    found = dict(plans)
    for name in names:
        if dialect not in found[name].variants:
            say(f"lowering {name} for {dialect}")
            found[name] = dataclasses.replace(found[name], variants={**found[name].variants, dialect: lowered(found[name], dialect, graphs, folder)})
    return found


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
    return {part: _lowered(plan, part, file, dialect, graphs, folder) for part, file in plan.variants["neutral"].items()}


def _lowered(plan: PlanInfo, part: str, file: str, dialect: str, graphs: dict[str, GraphInfo], folder: Path) -> str:
    size, lower = _way(plan, part, dialect)
    name = f"{file.removesuffix('.onnx')}{size}.{dialect}.onnx"
    if name not in graphs:
        model = load(folder / file)
        lower(model)
        save(model, folder / name)
        graphs[name] = describe(model)
    return name


def _way(plan: PlanInfo, part: str, dialect: str) -> tuple[str, Callable[[ir.Model], None]]:
    """What a lowered file's name says besides, and the lowering: TensorRT's decoders are one a part, with caches of the plan's size."""
    if dialect in DIALECTS:
        return "", lowering(dialect)
    from edgecomp.dialects import tensorrt
    from edgecomp.dialects.targets import TARGETS, refused
    if dialect not in TARGETS:
        raise UnknownNameError("dialect", dialect, [*DIALECTS, *TARGETS])

    def lower(model: ir.Model) -> None:
        tensorrt.lower(model, part, TARGETS[dialect], plan.cache_rows)
        if problems := refused(model, TARGETS[dialect]):
            raise EdgecompError(f"{dialect} does not take the {part} graph of this plan: {'; '.join(problems[:3])}")
    return "" if part == "vision" else f".{part}-{max(plan.cache_rows)}", lower
