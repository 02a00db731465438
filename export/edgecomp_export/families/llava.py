"""LLaVA-1.5 and whatever has its shape: a CLIP or SigLIP tower, an MLP projector, a Llama-like decoder (arXiv 2310.03744)."""
from __future__ import annotations

from typing import Any

import torch

from edgecomp_export.checkpoint import image_info
from edgecomp_export.families.base import Family
from edgecomp_export.nodes import mark, mark_layers, number_attention
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import ImageInfo, TileInfo


class Vision(torch.nn.Module):
    """Tower, feature selection and projector, as HF's `LlavaModel.get_image_features` has them."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return mark(project(self.model, pixels), "visual_tokens")


def project(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [tiles, 3, H, W] through tower, feature selection and projector: [tiles, n, D]."""
    config, inner = model.config, model.model
    states = inner.vision_tower(pixels, output_hidden_states=True).hidden_states
    chosen = [states[k] for k in select_layers(config)]
    if config.vision_feature_select_strategy == "default":
        chosen = [state[:, 1:] for state in chosen]  # the CLS row goes
    found: torch.Tensor = inner.multi_modal_projector(torch.cat(chosen, -1) if len(chosen) > 1 else chosen[0])
    return found


class Llava(Family):
    """`LlavaForConditionalGeneration` of any size, select layer and strategy, GQA or not, tied head or not."""

    def image_info(self) -> ImageInfo:
        self.refuse_choices("image_size", "tiles")
        side = self.config.vision_config.image_size
        return image_info(self.processor, (side, side))

    def tiles(self) -> tuple[TileInfo, ...]:
        side = grid_side(self.config)
        return (TileInfo(0, side, side, side),)

    def tower(self) -> tuple[int, int, bool]:
        return tower(self.config)

    def encoder_layers(self, model: Any) -> torch.nn.ModuleList:
        return tower_layers(model)

    def vision(self, model: Any) -> torch.nn.Module:
        mark_tower(model)
        return Vision(model)


def mark_tower(model: Any) -> None:
    """Marks the layers of a CLIP or SigLIP tower and numbers their attention."""
    mark_layers(tower_layers(model))
    number_attention(tower_layers(model))


def tower_layers(model: Any) -> torch.nn.ModuleList:
    """The layers of a CLIP or SigLIP tower."""
    inner = model.model.vision_tower
    layers: torch.nn.ModuleList = getattr(inner, "vision_model", inner).encoder.layers
    return layers


def grid_side(config: Any) -> int:
    """Tokens on a side of a tile's grid. Raises EdgecompError where tower and selection leave no square grid."""
    vision, strategy = config.vision_config, config.vision_feature_select_strategy
    side = int(vision.image_size // vision.patch_size)
    if has_cls(config) != (strategy == "default"):
        having, good = ("with", "default") if has_cls(config) else ("without", "full")
        raise EdgecompError(f"vision_feature_select_strategy {strategy!r} with a tower {having} CLS token leaves no "
                            f"{side}x{side} grid of visual tokens; edgecomp takes {good!r} here")
    return side


def tower(config: Any) -> tuple[int, int, bool]:
    """Layers, the layer whose output is taken, and whether it has a CLS row."""
    layers, select = config.vision_config.num_hidden_layers, max(select_layers(config))
    return layers, (select if select >= 0 else layers + 1 + select) - 1, has_cls(config)  # hidden state h is the output of layer h - 1


def has_cls(config: Any) -> bool:
    return "siglip" not in config.vision_config.model_type


def select_layers(config: Any) -> list[int]:
    """`vision_feature_layer` as a list."""
    chosen = config.vision_feature_layer
    return [chosen] if isinstance(chosen, int) else list(chosen)
