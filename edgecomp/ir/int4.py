"""Four-bit whole numbers as ONNX stores them: two a byte, the first in the low half."""
from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def packed(values: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Numbers from -8 to 7, an even number of them in the last axis -> bytes, half as many there."""
    halves = values.view(np.uint8)
    found: NDArray[np.uint8] = (halves[..., 0::2] & np.uint8(15)) | (halves[..., 1::2] << np.uint8(4))
    return found


def unpacked(data: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Bytes -> numbers from -8 to 7, twice as many in the last axis."""
    found = np.empty((*data.shape[:-1], 2 * data.shape[-1]), np.int8)
    found[..., 0::2] = (data << np.uint8(4)).view(np.int8) >> 4
    found[..., 1::2] = data.view(np.int8) >> 4
    return found
