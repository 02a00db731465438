"""Memory of a bundle's plan under onnxruntime on a CPU, part by part.

What is predicted is peak resident memory (VmHWM) of a process that answers one prompt again and again, for that is what the kernel itself
records, without sampling, and what a system without swap has to have. Shared libraries count whole in it.
"""
from __future__ import annotations

import mmap

import numpy as np
import onnx_ir as ir

from edgecomp.ir.graphs import load
from edgecomp.predict.liveness import planned_bytes
from edgecomp.predict.resolve import Run, resolved, run_of
from edgecomp_runtime.buffers import is_state
from edgecomp_runtime.buffers import resolved as shape_of
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.errors import InputError
from edgecomp_runtime.limits import PREFILL_ROWS
from edgecomp_runtime.manifest import GraphInfo

MIB = 2**20
# All measured on x86-64 with Python 3.11, onnxruntime 1.31.1 and glibc 2.36. The process without a model: benchmarks/memory.py's tiny one.
BASE_BYTES = 78 * MIB
# What a node takes beside its weights: resident memory after loading graphs of 128 to 875 nodes, with and without methods, less the weights.
NODE_BYTES = 6 * 1024
# onnxruntime computes fp16 on a CPU in fp32. Weights are widened when they are loaded, and a share of that is left behind in the heap in
# pieces, but of tensors above glibc's largest threshold for memory of their own (mallopt(3)): fitted to the two fp16 bundles of the table.
WIDENED, WIDENED_LEFT, HEAP_BELOW = 2, 0.18, 32 * MIB
WIDENED_ACTIVATIONS = 3  # a value in fp16 and its copy in fp32: of the two fp16 bundles' measurements, too
# What a vision graph worked in goes back to the heap after each picture; so much of it stays there at most beside the next one's: fitted to the
# uncut fp32 bundles of the table.
VISION_LEFT = 10 * MIB
LANES = 16  # floats that rows of packed weights are padded to (MLAS, MlasGemmPackBSize)


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
    files = info.variants.get("onnxruntime")
    if files is None:
        raise InputError(f"plan {name!r} has no graphs for onnxruntime: lower it with `edgecomp compress BUNDLE -o BUNDLE`")
    manifest = bundle.manifest
    runs = {"vision": run_of(manifest, info, "vision", text_rows=text_rows, pictures=pictures)}
    runs["prefill"] = _largest_prefill(run_of(manifest, info, "prefill", text_rows=text_rows, pictures=pictures),
                                       bool(info.cuts or manifest.decoder.bidirectional))
    found = {"runtime": float(BASE_BYTES), "weights": 0.0, "cache": 0.0, "buffers": 0.0}
    for part, run in runs.items():
        path = bundle.file(files[part])
        graph = load(path)
        found["runtime"] += NODE_BYTES * sum(1 for _ in graph.graph.all_nodes())
        found["weights"] += sum(map(_held, graph.graph.initializers.values()))
        found["buffers"] += _buffers(manifest.graphs[files[part]], run)
        wide = WIDENED_ACTIVATIONS if manifest.precision == "fp16" else 1
        block = planned_bytes(resolved(graph, run)) * wide
        # the first run of a shape takes its memory piece by piece, the later ones in one block: an arena that is kept holds both
        found[f"{part} activations"] = block + (block if part == "prefill" else min(block, VISION_LEFT))
    rows = text_rows + pictures * info.visual_tokens + new_tokens
    for tensor in manifest.graphs[files["prefill"]].inputs:
        if is_state(tensor.role):
            _, heads, _, width = tensor.shape
            used = rows - pictures * (info.visual_tokens - info.tokens_at(tensor.layer or 0))
            found["cache"] += int(heads) * _pages(used * int(width) * np.dtype(tensor.dtype).itemsize)
    return {part: round(size) for part, size in found.items()}


def _largest_prefill(run: Run, whole: bool) -> Run:
    """The run with most rows of those in which a prompt is taken."""
    rows = run.sizes["rows"]
    if whole or rows <= PREFILL_ROWS:
        return run
    last = (rows - 1) // PREFILL_ROWS * PREFILL_ROWS
    return Run({**run.sizes, "rows": PREFILL_ROWS}, {0: last - PREFILL_ROWS}, run.pictures)


def _held(weight: ir.Value) -> float:
    """Bytes that a loaded weight takes: matrices are packed, halves widened. The mapped file is let go of."""
    tensor = weight.const_value
    if tensor is None:
        return 0.0
    size = float(tensor.nbytes)
    if len(tensor.shape) == 2 and any(node.op_type == "FusedMatMul" for node, _ in weight.uses()):
        across, _ = tensor.shape.numpy()
        size *= -(-across // LANES) * LANES / across
    if tensor.dtype != ir.DataType.FLOAT16:
        return size
    wide = WIDENED * size
    return wide * (1 + WIDENED_LEFT * (wide < HEAP_BELOW))


def _buffers(graph: GraphInfo, run: Run) -> float:
    """Bytes of a graph's inputs and outputs that a run touches, but for the cache."""
    known = {"images": 1, **run.sizes}
    return sum(_pages(int(np.prod(shape_of(tensor, known))) * np.dtype(tensor.dtype).itemsize)
               for tensor in (*graph.inputs, *graph.outputs) if not is_state(tensor.role))


def _pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
