"""Qianfan-OCR (arXiv 2603.13398): InternVL's shape with Qwen3; transformers has its tower and its prompts written another way."""
from __future__ import annotations

from typing import Any

import torch

from edgecomp_export.families.internvl import InternVL


class QianfanOCR(InternVL):
    """`QianfanOCRForConditionalGeneration` of any size, norm and select layer."""

    def placeholder(self, image_token: str) -> str:
        return "<image>"  # image_placeholder_token of HF's processor, where its own settings name no other

    def encoder_layers(self, model: Any) -> torch.nn.ModuleList:
        layers: torch.nn.ModuleList = model.model.vision_tower.layers
        return layers
