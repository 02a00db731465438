"""Memory of a bundle's plan under onnxruntime on a CPU, part by part.

What is predicted is peak resident memory (VmHWM) of a process that answers one prompt again and again, for that is what the kernel itself
records, without sampling, and what a system without swap has to have. Shared libraries count whole in it.
"""
from __future__ import annotations

import functools
import mmap

import numpy as np
import onnx_ir as ir

from edgecomp.ir.graphs import load
from edgecomp.predict import resident
from edgecomp.predict.liveness import planned_bytes
from edgecomp.predict.resolve import Run, resolved, run_of
from edgecomp_runtime.buffers import is_state
from edgecomp_runtime.buffers import resolved as shape_of
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.errors import InputError
from edgecomp_runtime.limits import PREFILL_ROWS
from edgecomp_runtime.manifest import GraphInfo, Manifest, PlanInfo


def memory_of(bundle: Bundle, plan: str, *, text_rows: int, pictures: int = 1, new_tokens: int = 0) -> dict[str, int]:
    """Bytes of a plan under onnxruntime on a CPU, by part: runtime, weights, cache, buffers, prefill's and vision's activations.

    Args:
        bundle: an open bundle.
        plan: one of its plans.
        text_rows: of the prompt, without its visual tokens.
        pictures: of the prompt.
        new_tokens: of the answer.

    Raises:
        UnknownNameError, InputError: no such plan, or it was not lowered for onnxruntime.
    """
    name, info = bundle.plan(plan)
    files = _files(name, info)
    manifest, runs = bundle.manifest, _runs(bundle.manifest, info, text_rows, pictures, PREFILL_ROWS)
    found = {"runtime": float(resident.BASE_BYTES), "weights": 0.0, "cache": 0.0, "buffers": 0.0}
    for part, run in runs.items():
        path = bundle.file(files[part])
        graph = load(path)
        found["runtime"] += resident.NODE_BYTES * sum(1 for _ in graph.graph.all_nodes())
        found["weights"] += loaded_bytes(graph)
        found["buffers"] += _buffers(manifest.graphs[files[part]], run)
        wide = resident.WIDENED_ACTIVATIONS if manifest.precision == "fp16" else 1
        taken = planned_bytes(resolved(graph, run)) * wide
        found[f"{part} activations"] = resident.prefill_block(taken) if part == "prefill" else resident.vision_block(taken)
    rows = text_rows + pictures * info.visual_tokens + new_tokens
    for tensor in manifest.graphs[files["prefill"]].inputs:
        if is_state(tensor.role):
            _, heads, _, width = tensor.shape
            used = rows - pictures * (info.visual_tokens - info.tokens_at(tensor.layer or 0))
            found["cache"] += int(heads) * _pages(used * int(width) * np.dtype(tensor.dtype).itemsize)
    return {part: round(size) for part, size in found.items()}


def activations_of(bundle: Bundle, plan: str, *, text_rows: int, at_once: int) -> dict[str, float]:
    """Bytes of the widest moments of prefill and vision, of a prompt with one picture that is taken so many rows at a time, as onnxruntime
    plans them.

    Raises UnknownNameError, InputError: no such plan, or it was not lowered for onnxruntime.
    """
    name, info = bundle.plan(plan)
    runs = _runs(bundle.manifest, info, text_rows, 1, at_once)
    return {f"{part} activations": planned_bytes(resolved(load(bundle.file(file)), runs[part])) for part, file in _files(name, info).items()}


class Planned:
    """`memory_of` and `activations_of` one run of a plan with one picture: planned when first asked for, then kept for the next device."""

    def __init__(self, bundle: Bundle, plan: str, text_rows: int, new_tokens: int = 0):
        self.on_a_cpu = functools.cache(lambda: memory_of(bundle, plan, text_rows=text_rows, new_tokens=new_tokens))
        self.activations = functools.cache(lambda at_once: activations_of(bundle, plan, text_rows=text_rows, at_once=at_once))


def loaded_bytes(graph: ir.Model) -> float:
    """Bytes that onnxruntime holds on a CPU of a graph's weights, once it has loaded them."""
    return sum(map(_held, graph.graph.initializers.values())) + sum(map(_packed, graph.graph.all_nodes()))


def _files(name: str, info: PlanInfo) -> dict[str, str]:
    """A plan's vision and prefill graphs for onnxruntime."""
    if "onnxruntime" not in info.variants:
        raise InputError(f"plan {name!r} has no graphs for onnxruntime: lower it with `edgecomp compress BUNDLE -o BUNDLE`")
    return {part: info.variants["onnxruntime"][part] for part in ("vision", "prefill")}


def _runs(manifest: Manifest, info: PlanInfo, text_rows: int, pictures: int, at_once: int) -> dict[str, Run]:
    """The run of a vision graph, and of a prefill's the one with most rows of those in which a prompt is taken."""
    vision, prefill = (run_of(manifest, info, part, text_rows=text_rows, pictures=pictures) for part in ("vision", "prefill"))
    rows = prefill.sizes["rows"]
    if not info.cuts and not manifest.decoder.bidirectional and rows > at_once:
        last = (rows - 1) // at_once * at_once
        prefill = Run({**prefill.sizes, "rows": at_once}, {0: last - at_once}, prefill.pictures)
    return {"vision": vision, "prefill": prefill}


def _held(weight: ir.Value) -> float:
    """Bytes that a loaded weight takes: matrices are packed, halves widened. The mapped file is let go of."""
    tensor = weight.const_value
    if tensor is None:
        return 0.0
    size = float(tensor.nbytes)
    if len(tensor.shape) == 2 and any(node.op_type == "FusedMatMul" for node, _ in weight.uses()):
        across, _ = tensor.shape.numpy()
        size *= -(-across // resident.LANES) * resident.LANES / across
    if tensor.dtype != ir.DataType.FLOAT16:
        return size
    wide = resident.WIDENED * size
    return wide * (1 + resident.WIDENED_LEFT * (wide < resident.HEAP_BELOW))


def _packed(node: ir.Node) -> float:
    """Bytes that a product takes beside its weights, if these are in blocks of whole numbers: what packing adds to each block."""
    if node.op_type != "MatMulNBits":
        return 0.0
    width, rows, block = (node.attributes[name].as_int() for name in ("K", "N", "block_size"))
    return float(rows * -(-width // block) * resident.PACKED_BLOCK_BYTES)


def _buffers(graph: GraphInfo, run: Run) -> float:
    """Bytes of a graph's inputs and outputs that a run touches, but for the cache."""
    known = {"images": 1, **run.sizes}
    return sum(_pages(int(np.prod(shape_of(tensor, known))) * np.dtype(tensor.dtype).itemsize)
               for tensor in (*graph.inputs, *graph.outputs) if not is_state(tensor.role))


def _pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
