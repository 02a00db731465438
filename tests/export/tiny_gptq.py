"""Tiny checkpoints whose decoder GPTQ or AWQ could have quantized, packed word by word as the layouts are described; the numbers are random."""
from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # AWQ


@dataclass(frozen=True)
class Layout:
    """A way of storing weights; `settings` go into config.json."""
    method: str = "gptq"
    bits: int = 4
    group: int = 32
    symmetric: bool = True
    act_order: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    scales: torch.dtype = torch.float16

    @property
    def config(self) -> dict[str, Any]:
        return {"quant_method": self.method, "bits": self.bits, "group_size": self.group, **self.settings}


V1, V2, AWQ = {"checkpoint_format": "gptq"}, {"checkpoint_format": "gptq_v2"}, {"version": "gemm", "zero_point": True}
LAYOUTS = {
    "gptq": Layout(settings={"sym": True, "desc_act": False}),  # as before there was a checkpoint_format
    "gptq in int8": Layout(bits=8, settings=V1),
    "gptq with zeros": Layout(symmetric=False, settings=V1),
    "gptq_v2 with zeros in int8": Layout(bits=8, symmetric=False, settings=V2),
    "gptq by importance": Layout(group=16, act_order=True, settings={**V1, "desc_act": True}),
    "gptq by importance with zeros": Layout(symmetric=False, act_order=True, settings=V2),
    "gptq a row": Layout(group=-1, settings=V1),
    "awq": Layout("awq", symmetric=False, settings=AWQ),
}


def words(numbers: list[int], bits: int) -> list[int]:
    """Numbers in words of 32 bits, the first in the lowest bits."""
    each, found = 32 // bits, []
    for first in range(0, len(numbers), each):
        word = sum(number << bits * at for at, number in enumerate(numbers[first:first + each]))
        found.append(word - 2**32 if word >= 2**31 else word)
    return found


def shuffled(numbers: list[int]) -> list[int]:
    return [numbers[first + column] for first in range(0, len(numbers), 8) for column in ORDER]


@dataclass(frozen=True)
class Weight:
    """What one layer's numbers are: numbers [out, in] and zeros [out, groups] from 0 up, scales [out, groups], the group of each column."""
    numbers: np.ndarray
    zeros: np.ndarray
    scales: torch.Tensor
    groups: np.ndarray

    @classmethod
    def random(cls, layout: Layout, rows: int, width: int, seed: int) -> Weight:
        rng, top = np.random.default_rng(seed), 2**layout.bits
        group = width if layout.group == -1 else layout.group
        # no zero of 0, which the first format of GPTQ cannot say
        zeros = np.full((rows, width // group), top // 2) if layout.symmetric else rng.integers(1, top, (rows, width // group))
        scales = torch.from_numpy(rng.uniform(0.2, 1.2, zeros.shape) / top).to(layout.scales)
        groups = np.arange(width) // group
        if layout.act_order:  # one order for all that a layer's input goes into, as GPTQ finds it
            groups = np.random.default_rng(width).permutation(groups)
        return cls(rng.integers(0, top, (rows, width)), zeros, scales, groups)

    @property
    def content(self) -> torch.Tensor:
        """(number - zero) * scale, in fp32."""
        found = torch.empty(self.numbers.shape)
        for column, group in enumerate(self.groups):
            found[:, column] = torch.from_numpy(self.numbers[:, column] - self.zeros[:, group]).float() * self.scales[:, group].float()
        return found

    def tensors(self, layout: Layout) -> dict[str, torch.Tensor]:
        numbers, zeros, bits = self.numbers.tolist(), self.zeros.T.tolist(), layout.bits
        scales = self.scales.T.contiguous()
        if layout.method == "awq":
            return {"qweight": torch.tensor([words(shuffled(column), 4) for column in self.numbers.T.tolist()], dtype=torch.int32),
                    "qzeros": torch.tensor([words(shuffled(row), 4) for row in zeros], dtype=torch.int32), "scales": scales}
        less = layout.settings.get("checkpoint_format") != "gptq_v2"
        return {"qweight": torch.tensor([words(row, bits) for row in numbers], dtype=torch.int32).T.contiguous(),
                "qzeros": torch.tensor([words([zero - less for zero in row], bits) for row in zeros], dtype=torch.int32), "scales": scales,
                "g_idx": torch.from_numpy(self.groups.astype(np.int32))}


# the layers' linear weights: rows and width
SHAPES = {f"{layer}.{name}_proj.weight": (96 if name in ("mlp.gate", "mlp.up") else 64, 96 if name == "mlp.down" else 64)
          for layer in (0, 1) for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")}


def weights(layout: Layout) -> dict[str, Weight]:
    """The same ones at every call, by their names behind `layers.`."""
    return {name: Weight.random(layout, *shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())}


def write(layout: Layout, packed: dict[str, torch.Tensor], folder: Path) -> None:
    """Puts a checkpoint's tensors and its config into its folder."""
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": layout.config}))


def pack(layout: Layout, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors with the decoder's layers packed."""
    found = {}
    for name, weight in weights(layout).items():
        key = next(key for key in tensors if key.endswith(f".layers.{name}") and "language_model" in key)
        found |= {key.replace(".weight", f".{part}"): tensor for part, tensor in weight.tensors(layout).items()}
        tensors = {other: tensor for other, tensor in tensors.items() if other != key}
    return {**tensors, **found}


def make(variant: str, folder: Path, tokenizer_from: Path) -> Path:
    """Writes a checkpoint in a layout of LAYOUTS, and in its folder `plain` one with what the numbers stand for."""
    plain = tiny.make("mha-untied-biased", folder / "plain", tokenizer_from)
    model = LlavaForConditionalGeneration.from_pretrained(plain, dtype=torch.float32)
    for name, weight in weights(LAYOUTS[variant]).items():
        model.model.language_model.layers.get_parameter(name).data = weight.content
    for file in plain.glob("model*"):
        file.unlink()
    model.save_pretrained(plain)
    shutil.copytree(plain, folder, dirs_exist_ok=True)
    write(LAYOUTS[variant], pack(LAYOUTS[variant], load_file(plain / "model.safetensors")), folder)
    return folder
