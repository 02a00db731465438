"""The arithmetic: a row of weights in blocks of whole numbers, each block with one scale, symmetric around zero.

A weight is `number * scale`, and a scale is an fp16 number: it is rounded by less than a hundredth of what int4 rounds. Of the scales that are
tried, a block takes the one whose numbers are nearest to it, by the sum of squares: the one with which the largest weight is the largest number,
and with four bits some smaller ones, which cut it off for the sake of all others.
"""
from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecomp_runtime.errors import EdgecompError

# times the largest weight / the largest number. On the demonstration model's decoder in blocks of 32 the root of the mean square error is
# 9.6 % of the weights' own with the first alone, 8.6 % with these, 8.5 % with 32 of them; with 8 bits it is 0.5 % either way
FACTORS = {8: (1.0,), 4: (1.0, 0.93, 0.87, 0.8)}
PIECE = 2**20  # weights at a time
SCALE = np.dtype(np.float16)


def quantized(weight: NDArray[Any], bits: int, block: int, name: str = "a weight") -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Numbers [out, in] and scales [out, in / block] of a weight [out, in].

    Raises EdgecompError where a weight is infinite, no number, or beyond fp16.
    """
    rows, width = weight.shape
    numbers, scales = np.empty((rows, width), np.int8), np.empty((rows, width // block), SCALE)
    step = max(PIECE // width, 1)
    for first in range(0, rows, step):
        here = slice(first, min(first + step, rows))
        blocks = weight[here].astype(np.float32).reshape(-1, block)
        if not np.isfinite(blocks).all():
            raise EdgecompError(f"{name} has values that are infinite or no numbers: it cannot be quantized, nor would the model answer; "
                                "check the checkpoint")
        if (largest := float(np.abs(blocks).max())) > float(np.finfo(SCALE).max):
            raise EdgecompError(f"{name} reaches {largest:.3g}, and scales are in fp16, which ends at 65504: leave it as it is with "
                                f"--unquantized {name!r}")
        found, scale = _quantized(blocks, bits)
        numbers[here], scales[here] = found.reshape(-1, width), scale.reshape(-1, width // block)
    return numbers, scales


def dequantized(numbers: NDArray[Any], scales: NDArray[np.float16], zeros: NDArray[Any] | None = None) -> NDArray[np.float32]:
    """What the numbers [out, in] with their scales, and zeros where they are not 0, [out, in / block] stand for."""
    found, block = numbers.astype(np.float32), numbers.shape[1] // scales.shape[1]
    if zeros is not None:
        found -= np.repeat(zeros.astype(np.float32), block, axis=1)
    found *= np.repeat(scales.astype(np.float32), block, axis=1)
    return found


def _quantized(blocks: NDArray[np.float32], bits: int) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Of blocks [n, block]: numbers of that shape and scales [n]."""
    least, most = -2 ** (bits - 1), 2 ** (bits - 1) - 1
    largest = np.abs(blocks).max(1, keepdims=True) / most
    best: tuple[NDArray[Any], NDArray[Any], NDArray[Any]] | None = None
    for factor in FACTORS[bits]:
        # as it is stored; never zero, which TensorRT refuses
        scale = np.maximum((largest * factor).astype(SCALE), np.finfo(SCALE).smallest_subnormal)
        numbers = np.clip(np.rint(blocks / scale.astype(np.float32)), least, most)
        error = np.square(numbers * scale.astype(np.float32) - blocks).sum(1, keepdims=True)
        if best is None:
            best = numbers, scale, error
        else:
            better = error < best[2]
            best = np.where(better, numbers, best[0]), np.where(better, scale, best[1]), np.minimum(error, best[2])
    assert best is not None
    return best[0].astype(np.int8), best[1][:, 0]
