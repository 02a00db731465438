"""What the heads of a checkpoint's safetensors files say of its weights, without reading any."""
from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import torch

from edgecomp_export.prequantized import PARTS
from edgecomp_runtime.errors import EdgecompError

STORED = {"F64", "F32", "F16", "BF16", "I64", "I32", "BOOL"}  # whole numbers are of buffers, such as position_ids


class CheckpointError(EdgecompError):
    """The folder or hub name is no checkpoint that edgecomp can take."""


def stored_dtype(folder: Path) -> torch.dtype:
    """The widest floating-point type among the stored weights."""
    kinds = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    found = {tensor["dtype"] for tensor in headers(folder) if not tensor["name"].endswith(".scales")}
    return kinds[next((kind for kind in kinds if kind in found), "F32")] if not {"F16", "BF16"} <= found else torch.float32


def weight_sizes(folder: Path, size: int) -> tuple[int, int, int]:
    """Bytes of the stored weights, of them with `size` bytes a parameter (quantised ones as they are), and of the largest one then."""
    found = headers(folder)
    stored = [h["data_offsets"][1] - h["data_offsets"][0] for h in found]
    written = [have if h["name"].rpartition(".")[2] in PARTS else prod(h["shape"]) * size for h, have in zip(found, stored)]
    return sum(stored), sum(written), max(written, default=0)


def headers(folder: Path) -> list[dict[str, Any]]:
    """Every stored tensor's name, dtype, shape and data_offsets, from the heads of the safetensors files.

    Raises:
        CheckpointError: a file that is none or was cut short, or weights of a type that only quantised models have.
    """
    found: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
            size = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
            kinds = {tensor["dtype"]: name for name, tensor in tensors.items()}
        except (OSError, ValueError, OverflowError, MemoryError, AttributeError, TypeError, LookupError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a safetensors file ({first_line(error)}): download the checkpoint again") from None
        if path.stat().st_size != size:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes and should have {size}: download the checkpoint again")
        if strange := sorted(set(kinds) - STORED):  # such numbers mean nothing without their scales
            raise CheckpointError(f"{folder} is quantised ({kinds[strange[0]]} is {strange[0]}): "
                                  "give the checkpoint in bf16, fp16 or fp32 that it was made from")
        found += ({"name": name, **tensor} for name, tensor in tensors.items())
    return found


def first_line(error: Exception) -> str:
    """A reason in one line; where the first one only announces it, with the second."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])[:200]
