"""Gemma 3 with pictures (arXiv 2503.19786): a SigLIP tower, averaged to 256 tokens, before a decoder with local and global layers.

The tokens of a picture see each other both ways; a local layer's window hides far ones of them, too.
"""
from __future__ import annotations

from typing import Any

import torch

from edgecomp_export.checkpoint import image_info
from edgecomp_export.families.base import Family, additive, visible
from edgecomp_export.families.llava import mark_tower, tower_layers
from edgecomp_export.nodes import mark
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import ImageInfo, TileInfo

BEGIN, END = "<start_of_image>", "<end_of_image>"


class Vision(torch.nn.Module):
    """Tower and projector."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        inner = self.model.model
        return mark(inner.multi_modal_projector(inner.vision_tower(pixels).last_hidden_state), "visual_tokens")


class Siglip(Family):
    """What Gemma 3 and PaliGemma share: SigLIP's last hidden state of pictures of one size, and Gemma's masks."""

    def image_info(self) -> ImageInfo:
        self.refuse_choices("image_size", "tiles")
        side = self.config.vision_config.image_size
        return image_info(self.processor, (side, side))

    def tiles(self) -> tuple[TileInfo, ...]:
        side = self.grid_side()
        return (TileInfo(0, side, side, side),)

    def grid_side(self) -> int:
        """Visual tokens on a side of a picture."""
        vision = self.config.vision_config
        return int(vision.image_size // vision.patch_size)

    def tower(self) -> tuple[int, int, bool]:
        layers = self.config.vision_config.num_hidden_layers
        return layers, layers - 1, False

    def encoder_layers(self, model: Any) -> torch.nn.ModuleList:
        return tower_layers(model)

    def vision(self, model: Any) -> torch.nn.Module:
        mark_tower(model)
        return Vision(model)

    def hf_decode(self, model: Any, embeddings: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor,
                  deepstack: list[torch.Tensor]) -> torch.Tensor:
        text = self.config.get_text_config()
        windows = {"full_attention": None, "sliding_attention": getattr(text, "sliding_window", None)}
        masks = {kind: additive(visible(segments, window, self.segments_bounded), embeddings.dtype) for kind, window in windows.items()}
        mask = masks if hasattr(text, "layer_types") else masks["full_attention"]
        found: torch.Tensor = self.text_model(model)(inputs_embeds=embeddings, attention_mask=mask, use_cache=False,
                                                     position_ids=positions).last_hidden_state
        return found


class Gemma3(Siglip):
    """`Gemma3ForConditionalGeneration`, without pan and scan."""

    bidirectional = "images"

    def image_info(self) -> ImageInfo:
        if self.geometry.tiles or self.processor.get("do_pan_and_scan"):
            asked = f"--tiles {self.geometry.tiles}" if self.geometry.tiles else "do_pan_and_scan in the image processor's settings"
            raise EdgecompError(f"{asked}: edgecomp does not cut pictures up for gemma3 models (pan and scan) yet; leave it out")
        return super().image_info()

    def grid_side(self) -> int:
        patches, tokens = super().grid_side(), self.config.mm_tokens_per_image
        side = int(tokens ** 0.5)
        if side * side != tokens or not 0 < side <= patches or patches // (patches // side) != side:
            raise EdgecompError(f"mm_tokens_per_image is {tokens}, and averaging {patches}x{patches} patches makes no such square of visual tokens: "
                                "this config.json does not fit together")
        return side

    def texts(self) -> tuple[str, ...]:
        return f"\n\n{BEGIN}", f"{END}\n\n"

    def placeholder(self, image_token: str) -> str:
        return BEGIN

    def prepare_tokenizer(self, tokenizer: Any) -> Any:
        for token, expected in ((BEGIN, self.config.boi_token_index), (END, self.config.eoi_token_index)):
            if (found := tokenizer.convert_tokens_to_ids(token)) != expected:
                raise EdgecompError(f"the tokenizer has {token} as {found} and config.json as {expected}: this checkpoint does not fit together")
        return tokenizer

    def hf_prompt(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"token_type_ids": (ids == self.config.image_token_index).long()}
