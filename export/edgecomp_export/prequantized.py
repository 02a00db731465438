"""Checkpoints whose weights GPTQ (arXiv 2210.17323) or AWQ (arXiv 2306.00978) made: their own numbers, in the layout of a bundle.

Both keep a linear layer's weight [out, in] as `qweight`, whole numbers from zero up, in words of 32 bits, the first in the lowest bits, with
`scales` [groups, out] and `qzeros`, the numbers that stand for zero, in such words too. A weight is (number - zero) * scale.

- GPTQ (the files of AutoGPTQ and GPTQModel): words of a column, qweight [in * bits / 32, out]; zeros of a row, [groups, out * bits / 32], stored
  less 1, unless checkpoint_format says gptq_v2. `g_idx` [in] is the group of each column, which is not in order where they were quantized by
  importance (desc_act).
- AWQ (AutoAWQ, version gemm): words of a row, qweight [in, out / 8]; in each word the columns 0, 2, 4, 6, 1, 3, 5, 7; zeros the same way.

A bundle counts from the middle: numbers and zeros less 8, or 128. Nothing is rounded.
"""
from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from edgecomp.ir.graphs import WeightFile
from edgecomp.quantize.graph import TYPES, add_numbers, read_dequantized, reorder_inputs
from edgecomp.quantize.rule import BLOCKS
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import QuantizedInfo

METHODS = ("gptq", "awq")
PARTS = ("qweight", "qzeros", "scales", "g_idx")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AWQ: the column of a word's eight that each number in it is of


@dataclass(frozen=True)
class Numbers:
    """A weight in a bundle's terms.

    numbers: [out, in] from -2^(bits-1) up. scales: [out, in / block]. zeros: like scales, None where all are 0. order: the columns of the
    checkpoint's weight in the order in which they stand here, None where it is theirs.
    """
    bits: int
    numbers: NDArray[np.int8]
    scales: NDArray[np.float16]
    zeros: NDArray[np.int8] | None
    order: NDArray[np.int32] | None


class Prequantized:
    """The quantized weights of a checkpoint, read one at a time.

    Args:
        folder: of the checkpoint.
        settings: its quantization_config.

    Raises:
        EdgecompError: the numbers are in a layout that a bundle has not, or there are none.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder, self.method = folder, str(settings["quant_method"])
        if self.method == "gptq":
            layout = "marlin" if settings.get("is_marlin_format") else str(settings.get("checkpoint_format") or "gptq")
            known: tuple[str, ...] = ("gptq", "gptq_v2")
        else:
            layout, known = str(settings.get("version") or "gemm").lower(), ("gemm",)
        if layout not in known:
            raise EdgecompError(f"{folder} has its weights in {self.method}'s layout {layout!r}, of {' or '.join(known)} they are taken: "
                                "save the checkpoint in that, or give the one in bf16, fp16 or fp32 that it was made from")
        self._minus = int(layout == "gptq")
        self._parts: dict[str, dict[str, tuple[Path, list[int]]]] = {}  # where each is, and its shape
        self._others: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118  # it is no dict
                    name, _, part = key.rpartition(".")
                    if part in PARTS:
                        self._parts.setdefault(name, {})[part] = path, list(file.get_slice(key).get_shape())
                    else:
                        self._others[key] = path
        if not self._parts:
            raise EdgecompError(f"{folder / 'config.json'} says {self.method}, but no weight is quantized: take quantization_config out of it")
        self._shapes = {name: self._shape(name) for name in self._parts}
        self.block = self._block()
        self._stand_ins: dict[str, torch.Tensor] = {}

    def state(self, dtype: torch.dtype, files: ExitStack) -> dict[str, Any]:
        """What transformers loads instead of the files: what they hold, and a stand-in of NaN, of no size, for each quantized weight."""
        self._stand_ins = {name: torch.full((1, 1), torch.nan, dtype=dtype).expand(rows, width)
                           for name, (rows, width, _, _) in self._shapes.items()}
        opened = {path: files.enter_context(safe_open(path, "pt")) for path in sorted(set(self._others.values()))}
        return {**{key: opened[path].get_slice(key) for key, path in self._others.items()},
                **{f"{name}.weight": tensor for name, tensor in self._stand_ins.items()}}

    def named(self, model: torch.nn.Module) -> dict[str, str]:
        """Parameter -> the checkpoint's name of the layer, of the model that was loaded from `state`: transformers may have renamed it."""
        places = {tensor.data_ptr(): name for name, tensor in self._stand_ins.items()}
        found = {name: places[parameter.data_ptr()] for name, parameter in model.named_parameters(remove_duplicate=False)
                 if parameter.data_ptr() in places}
        if lost := sorted(set(places.values()) - set(found.values())):
            raise EdgecompError(f"{self.folder} has {len(lost)} quantized weights that are not the model's own, {lost[0]} among them: "
                                "give the checkpoint in bf16, fp16 or fp32 that it was made from")
        return found

    def read(self, name: str) -> Numbers:
        """The weight of a layer, by the checkpoint's name."""
        (rows, width, bits, groups), middle = self._shapes[name], 2 ** (self._shapes[name][2] - 1)
        fields, zeros = self._fields(name, "qweight", bits), self._fields(name, "qzeros", bits)
        if self.method == "awq":
            fields, zeros = (found[..., np.argsort(ORDER)] for found in (fields, zeros))
            numbers = fields.reshape(width, rows).T
        else:
            numbers = fields.transpose(1, 0, 2).reshape(rows, width)
        zeros = zeros.reshape(groups, rows).T
        if self._minus and (zeros == 2 * middle - 1).any():
            raise EdgecompError(f"{name}.qzeros of {self.folder} has {2 * middle - 1}, for which some programs read a zero of 0 and others of "
                                f"{2 * middle}: save the checkpoint in the format gptq_v2")
        order = self._order(name, width, groups)
        if order is not None:
            numbers = numbers[:, order]
        centred = zeros.astype(np.int16) + self._minus - middle
        repeats = width // groups // self.block
        return Numbers(bits, (numbers - np.uint8(middle)).view(np.int8),
                       np.repeat(self._scales(name).T, repeats, 1), np.repeat(centred, repeats, 1).astype(np.int8) if centred.any() else None, order)

    def move(self, model: ir.Model, named: Mapping[str, str], file: WeightFile) -> dict[str, int]:
        """Puts the quantized weights of a neutral graph into a file and lets the graph read them, in place.

        Args:
            model: the graph, its weights by their Hugging Face names.
            named: see `named`.
            file: where the bundle's weights go.

        Returns:
            The bits of each, by its Hugging Face name.
        """
        bits = {}
        for name in [name for name in model.graph.initializers if name in named]:
            found, weight = self.read(named[name]), model.graph.initializers[name]
            zeros = None if found.zeros is None else add_numbers(file, f"{name}.zero", found.zeros, found.bits)
            node = read_dequantized(model, weight, add_numbers(file, name, found.numbers, found.bits), file.add(f"{name}.scale", found.scales),
                                    self.block, zeros)
            if found.order is not None:
                reorder_inputs(model, node, file.add(f"{name}.order", found.order))
            bits[name] = found.bits
        return bits

    @property
    def precision(self) -> str:
        """'int4' or 'int8': of several the fewest bits."""
        return f"int{min(bits for _, _, bits, _ in self._shapes.values())}"

    def info(self, bits: Mapping[str, int]) -> QuantizedInfo:
        """The manifest's entry."""
        return QuantizedInfo(self.precision, self.block, dict(bits))

    def _shape(self, name: str) -> tuple[int, int, int, int]:
        """Rows, width, bits and groups of a weight, from its tensors' shapes."""
        parts = self._parts[name]
        if lacking := [part for part in PARTS[:3 if self.method == "awq" else 4] if part not in parts]:
            raise EdgecompError(f"{self.folder} has no {name}.{lacking[0]}, without which {name}.{next(iter(parts))} means nothing: "
                                "download the checkpoint again")
        shapes = {part: shape for part, (_, shape) in parts.items()}
        if not all(len(shape) == (1 if part == "g_idx" else 2) and min(shape) > 0 for part, shape in shapes.items()):
            raise EdgecompError(f"{name} of {self.folder} has tensors of the shapes {shapes}, which are not {self.method}'s: download it again")
        (high, wide), (groups, rows) = shapes["qweight"], shapes["scales"]
        width = high if self.method == "awq" else shapes["g_idx"][0]
        bits = 32 * (wide if self.method == "awq" else high) // (rows if self.method == "awq" else width)
        if bits not in TYPES or (self.method == "awq" and bits != 4):
            raise EdgecompError(f"{name} of {self.folder} is in {bits} bits: {'4' if self.method == 'awq' else '4 and 8'} are taken of "
                                f"{self.method}; give the checkpoint in bf16, fp16 or fp32 that it was made from, and `edgecomp quantize` its bundle")
        if width % groups or shapes["qzeros"] != [groups, rows * bits // 32]:
            raise EdgecompError(f"{name} of {self.folder} is {width} wide, with scales {shapes['scales']} and qzeros {shapes['qzeros']}, which do "
                                "not fit together: download the checkpoint again")
        return rows, width, bits, groups

    def _block(self) -> int:
        """Numbers that share a scale in the bundle: the largest blocks that there are kernels for, of which groups are made of whole ones; where two
        zeros share a byte, an even number of them in a row."""
        def fits(size: int) -> bool:
            return all(width // groups % size == 0 and (bits == 8 or width // size % 2 == 0) for _, width, bits, groups in self._shapes.values())
        if fitting := [size for size in BLOCKS if fits(size)]:
            return max(fitting)
        sizes = sorted({width // groups for _, width, _, groups in self._shapes.values()})
        raise EdgecompError(f"{self.folder} has groups of {', '.join(map(str, sizes))}, which are not made of an even number a row of blocks of "
                            f"{', '.join(map(str, BLOCKS))}: give the checkpoint in bf16, fp16 or fp32 that it was made from, and "
                            "`edgecomp quantize` its bundle")

    def _order(self, name: str, width: int, groups: int) -> NDArray[np.int32] | None:
        if self.method == "awq":
            return None
        group = self._tensor(name, "g_idx").numpy()
        order = np.argsort(group, kind="stable").astype(np.int32)
        if not np.array_equal(group[order], np.arange(width) // (width // groups)):
            raise EdgecompError(f"{name}.g_idx of {self.folder} makes groups of different sizes, which blocks cannot be: give the checkpoint in "
                                "bf16, fp16 or fp32 that it was made from, and `edgecomp quantize` its bundle")
        return None if np.array_equal(order, np.arange(width)) else order

    def _scales(self, name: str) -> NDArray[np.float16]:
        stored = self._tensor(name, "scales")
        found = stored.to(torch.float16)
        if not torch.equal(found.double(), stored.double()):
            raise EdgecompError(f"{name}.scales of {self.folder} are in {str(stored.dtype).removeprefix('torch.')}, and not all are numbers that "
                                "fp16, in which a bundle's are, has too: save the checkpoint with scales in fp16")
        return np.asarray(found.numpy(), np.float16)

    def _fields(self, name: str, part: str, bits: int) -> NDArray[np.uint8]:
        """The numbers in each word, [words, words, 32 / bits]."""
        words = self._tensor(name, part).contiguous().numpy()
        if words.dtype != np.int32:
            raise EdgecompError(f"{name}.{part} of {self.folder} is in words of {words.dtype}, of int32 they are taken: give the checkpoint in bf16, "
                                "fp16 or fp32 that it was made from")
        data = words.view(np.uint8).reshape(*words.shape, 4)  # the lowest byte first
        return data if bits == 8 else np.stack([data & np.uint8(15), data >> np.uint8(4)], -1).reshape(*words.shape, 8)

    def _tensor(self, name: str, part: str) -> torch.Tensor:
        with safe_open(self._parts[name][part][0], "pt") as file:
            found: torch.Tensor = file.get_tensor(f"{name}.{part}")
        return found
