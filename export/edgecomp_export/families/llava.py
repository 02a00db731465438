"""LLaVA-1.5 and whatever has its shape: a CLIP or SigLIP tower, an MLP projector, a Llama-like decoder (arXiv 2310.03744)."""
from __future__ import annotations

from typing import Any

import torch

from edgecomp_export.checkpoint import image_info
from edgecomp_export.families.base import Family
from edgecomp_export.nodes import mark, mark_layers, number_attention
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import DecoderInfo, ImageInfo, VisionInfo

DEFAULT_CONTEXT = 2048  # rows; enough for a few pictures and a conversation, and 1 GiB of fp16 cache for a 7B model


class Vision(torch.nn.Module):
    """Tower, feature selection and projector, as HF's `LlavaModel.get_image_features` has them."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        config, inner = self.model.config, self.model.model
        states = inner.vision_tower(pixels, output_hidden_states=True).hidden_states
        chosen = [states[k] for k in _select_layers(config)]
        if config.vision_feature_select_strategy == "default":
            chosen = [state[:, 1:] for state in chosen]  # the CLS row goes
        return mark(inner.multi_modal_projector(torch.cat(chosen, -1) if len(chosen) > 1 else chosen[0]), "visual_tokens")


class Llava(Family):
    """`LlavaForConditionalGeneration` of any size, select layer and strategy, GQA or not, tied head or not."""

    def vision(self) -> torch.nn.Module:
        layers = self._tower_layers()
        mark_layers(layers)
        number_attention(layers)
        return Vision(self.model)

    def language(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        decoder = self.model.model.language_model
        if not hasattr(decoder, "layers"):
            raise EdgecompError(f"the text model {type(decoder).__name__} has no list of layers; edgecomp takes Llama-like decoders here")
        return decoder, self.model.lm_head

    def image_info(self) -> ImageInfo:
        side = self.model.config.vision_config.image_size
        return image_info(self.processor, (side, side))

    def vision_info(self) -> VisionInfo:
        config = self.model.config
        vision, select = config.vision_config, max(_select_layers(config))
        side, layers = vision.image_size // vision.patch_size, vision.num_hidden_layers
        has_cls = hasattr(self._tower().embeddings, "class_embedding")
        dropped = config.vision_feature_select_strategy == "default"
        if has_cls != dropped:
            raise EdgecompError(f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} with a tower "
                                f"{'with' if has_cls else 'without'} CLS token leaves no {side}x{side} grid of visual tokens; edgecomp "
                                f"takes {'default' if has_cls else 'full'!r} here")
        # hidden state h is the output of layer h - 1
        return VisionInfo((side, side), side * side, layers, (select if select >= 0 else layers + 1 + select) - 1, has_cls)

    def decoder_info(self, context: int | None) -> DecoderInfo:
        text = self.model.config.get_text_config()
        if context is not None and context > text.max_position_embeddings:
            raise EdgecompError(f"--context {context} exceeds the {text.max_position_embeddings} positions that this model was trained for")
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return DecoderInfo(text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads, head_dim, text.hidden_size,
                           context or min(DEFAULT_CONTEXT, text.max_position_embeddings))

    def _tower(self) -> Any:
        tower = self.model.model.vision_tower
        return getattr(tower, "vision_model", tower)

    def _tower_layers(self) -> torch.nn.ModuleList:
        layers: torch.nn.ModuleList = self._tower().encoder.layers
        return layers


def _select_layers(config: Any) -> list[int]:
    chosen = config.vision_feature_layer
    return [chosen] if isinstance(chosen, int) else list(chosen)
