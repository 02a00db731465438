"""Qwen3-VL: learned positions stretched to the picture, and features of several tower layers added inside the decoder.

The latter is DeepStack (arXiv 2406.04334); the model is described in arXiv 2511.21631.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgecomp_export.families.base import DEFAULTS, Geometry
from edgecomp_export.families.qwen2_vl import Grid, Qwen2VL, Vision
from edgecomp_export.nodes import mark


class Qwen3VL(Qwen2VL):
    """`Qwen3VLForConditionalGeneration` at one size of pictures."""

    def __init__(self, config: Any, processor: dict[str, Any], geometry: Geometry = DEFAULTS):
        super().__init__(config, processor, geometry)
        self.deepstack = len(config.vision_config.deepstack_visual_indexes)

    def vision(self, model: Any) -> torch.nn.Module:
        return StackedVision(model, self.grid())

    def axes(self, sections: Sequence[int]) -> NDArray[np.int64]:
        # interleaved: row, column, time in turn, and time alone where the sections of the other two end
        found = np.zeros(sum(sections), np.int64)
        for axis in (1, 2):
            found[axis:3 * sections[axis]:3] = axis
        return found

    def decode(self, decoder: Any, embeddings: torch.Tensor, positions: torch.Tensor, cache: Any,
               deepstack: Sequence[torch.Tensor]) -> torch.Tensor:
        self.turn_once(decoder)
        # every row is a visual one to HF, for the features of the others are zero: no selection by a mask is traced
        decoder._deepstack_process = lambda hidden, _, features: hidden + features
        hidden: torch.Tensor = decoder(inputs_embeds=embeddings, position_ids=positions, past_key_values=cache, use_cache=True,
                                       deepstack_visual_embeds=list(deepstack)).last_hidden_state
        return hidden

    def hf_decode(self, model: Any, embeddings: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor,
                  deepstack: list[torch.Tensor]) -> torch.Tensor:
        decoder, every = model.model.language_model, torch.ones(embeddings.shape[:2], dtype=torch.bool)
        # features are of all rows here, and HF would look for them in as many rows as the first layer has
        decoder._deepstack_process = lambda hidden, _, features: hidden + features
        try:
            found: torch.Tensor = decoder(inputs_embeds=embeddings, attention_mask=every.long(), use_cache=False, position_ids=positions,
                                          visual_pos_masks=every, deepstack_visual_embeds=deepstack).last_hidden_state
        finally:
            del decoder._deepstack_process
        return found


class StackedVision(Vision):
    """The tower with its learned positions, and a merger for each layer whose features go into the decoder."""

    taps: torch.Tensor
    shares: torch.Tensor

    def __init__(self, model: Any, grid: Grid):
        super().__init__(model, grid)
        taps, shares = stretched(grid, round(model.config.vision_config.num_position_embeddings ** 0.5))
        self.register_buffer("taps", torch.from_numpy(taps), persistent=False)
        self.register_buffer("shares", torch.from_numpy(shares), persistent=False)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        visual, chosen = self.model.model.visual, list(self.model.config.vision_config.deepstack_visual_indexes)
        states = self.states(self.embed(pixels))
        features = [self.merged(visual.deepstack_merger_list[chosen.index(layer)], states[layer]) for layer in sorted(chosen)]
        return (mark(self.merged(visual.merger, states[-1]), "visual_tokens"), *(mark(x, "deepstack", n) for n, x in enumerate(features)))

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = super().embed(pixels)
        learned: torch.Tensor = self.model.model.visual.pos_embed(self.taps) * self.shares[:, :, None]  # [S, 4, D] in float32
        return patches + learned.sum(1).to(patches.dtype)


def stretched(grid: Grid, side: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Bilinear interpolation of a table of `side` x `side` positions over the whole grid, corners on corners.

    Returns:
        Which four entries each patch lies between [patches, 4], in the tower's order, and the parts that it has of them.
    """
    at = grid.places() * ((side - 1) / np.maximum(np.array([grid.rows, grid.columns]) - 1, 1))  # [patches, 2]
    low = np.floor(at).astype(np.int64)
    high, part = np.minimum(low + 1, side - 1), at - low
    ends, weights = np.stack([low, high], 2), np.stack([1 - part, part], 2)  # [patches, axis, 2]
    taps = ends[:, 0, :, None] * side + ends[:, 1, None, :]
    return taps.reshape(-1, 4), (weights[:, 0, :, None] * weights[:, 1, None, :]).reshape(-1, 4).astype(np.float32)
