"""InternVL 2.5 to 3.5 in transformers' own classes (arXiv 2504.10479): a ViT on square tiles, pixel shuffle, an MLP, Qwen or Llama."""
from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from edgecomp_export.checkpoint import image_info
from edgecomp_export.families.base import Family
from edgecomp_export.families.idefics3 import even_tiles, layout, shuffled_side
from edgecomp_export.nodes import mark, mark_layers, number_attention
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import ImageInfo, TileInfo


class Vision(torch.nn.Module):
    """HF's `get_image_features`: pixels [images, 3, side, side] or [images, tiles, 3, side, side] -> [images, N, D].

    Args:
        model: HF's.
        tokens: N.
    """

    def __init__(self, model: Any, tokens: int):
        super().__init__()
        self.model, self._tokens = model, tokens

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        found = self.model.get_image_features(pixels.flatten(0, -4)).pooler_output
        return mark(found.reshape(pixels.shape[0], self._tokens, found.shape[-1]), "visual_tokens")


class InternVL(Family):
    """`InternVLForConditionalGeneration` of any size, norm and select layer, on Qwen2, Qwen3 or Llama."""

    def image_info(self) -> ImageInfo:
        height, width = self.config.vision_config.image_size
        if height != width:
            raise EdgecompError(f"the vision tower takes {height}x{width} pixels; edgecomp takes InternVL towers of square tiles")
        one = image_info(self.processor, (height, width))
        rows, columns = layout(self.geometry, height)
        return dataclasses.replace(one, tiles=(rows, columns), overview="last" if rows * columns > 1 else "")

    def tiles(self) -> tuple[TileInfo, ...]:
        return even_tiles(self.grid_side(), self.image_info().count)

    def tower(self) -> tuple[int, int, bool]:
        layers, select = self.config.vision_config.num_hidden_layers, self.config.vision_feature_layer
        strategy = self.config.vision_feature_select_strategy
        if not isinstance(select, int):
            raise EdgecompError(f"vision_feature_layer is {list(select)}; transformers' InternVL and edgecomp take the output of one layer")
        if strategy != "default":
            raise EdgecompError(f"vision_feature_select_strategy {strategy!r} leaves the CLS row among the patches, "
                                "which then are no grid; edgecomp takes 'default' here")
        # what a CLS row attends to are patches, of which the pixel shuffle merges several into a visual token
        return layers, (select if select >= 0 else layers + 1 + select) - 1, False

    def texts(self) -> tuple[str, ...]:
        names = self.processor["special_tokens"]
        return names.get("start_image_token", "<img>"), names.get("end_image_token", "</img>")

    def grid_side(self) -> int:
        """Visual tokens on a side of a tile. Raises EdgecompError where the pixel shuffle does not divide the patches."""
        vision, ratio = self.config.vision_config, self.config.downsample_ratio
        return shuffled_side(vision.image_size[0], vision.patch_size[0], round(1 / ratio), f"downsample_ratio {ratio}")

    def encoder_layers(self, model: Any) -> torch.nn.ModuleList:
        layers: torch.nn.ModuleList = model.model.vision_tower.encoder.layer
        return layers

    def vision(self, model: Any) -> torch.nn.Module:
        mark_layers(self.encoder_layers(model))
        number_attention(self.encoder_layers(model), "attention")
        return Vision(model, self.tokens())

    def hf_preprocess(self, processor: Any, picture: Any) -> torch.Tensor | None:
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
        info = self.image_info()
        tiles, several = info.tiles[0] * info.tiles[1], info.count > 1
        size = picture.shape[:2] if isinstance(picture, np.ndarray) else picture.size[::-1]
        if several and get_optimal_tiled_canvas(size, info.size, tiles, tiles)[::-1] != info.tiles:
            return None
        found = processor(images=picture, return_tensors="pt", crop_to_patches=several, min_patches=tiles, max_patches=tiles)
        pixels: torch.Tensor = found["pixel_values"].float()
        return pixels[None] if several else pixels

    def hf_pixels(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pixel_values": pixels.flatten(0, -4)}
