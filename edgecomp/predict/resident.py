"""What a process keeps resident that runs a model under onnxruntime on a CPU, beside what the model's own numbers say.

All measured on x86-64 with Python 3.11, onnxruntime 1.31.1 and glibc 2.36 (`benchmarks/memory.py`).
"""
from __future__ import annotations

MIB = 2**20
# The process without a model: benchmarks/memory.py's tiny one.
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
# MatMulNBits that computes in int8 packs its weights anew, in each block the scale and scale times sum of its numbers, both in fp32; the scales that
# it was given stay. Resident memory after loading a decoder of 135 M parameters: 8.0 bytes a block more than with
# session.disable_prepacking, for int8 and int4 in blocks of 64 and for int4 in blocks of 32.
PACKED_BLOCK_BYTES = 8
LANES = 16  # floats that rows of packed weights are padded to (MLAS, MlasGemmPackBSize)


def prefill_block(activations: float) -> float:
    """The first run of a shape takes its memory piece by piece, the later ones in one block: an arena that is kept holds both."""
    return 2 * activations


def vision_block(activations: float) -> float:
    """A vision graph's arena is given back after each picture."""
    return activations + min(activations, VISION_LEFT)
