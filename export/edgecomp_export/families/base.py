"""What the exporter asks of a family: two modules to trace, and the facts that the runtime needs."""
from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from edgecomp_runtime.manifest import DecoderInfo, ImageInfo, VisionInfo


class Family(ABC):
    """One Hugging Face `model_type`. Made from a loaded model and its folder's processor settings."""

    def __init__(self, model: Any, processor: dict[str, Any]):
        self.model, self.processor = model, processor

    @abstractmethod
    def vision(self) -> torch.nn.Module:
        """A module from pixels [images, 3, H, W] to visual tokens [images, N, D], with marks on layers and result."""

    @abstractmethod
    def language(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        """The decoder (embeddings to last hidden state, `layers` inside) and the head (hidden state to logits)."""

    @abstractmethod
    def image_info(self) -> ImageInfo:
        """How a picture becomes pixels."""

    @abstractmethod
    def vision_info(self) -> VisionInfo:
        """The tower's token grid and signals."""

    @abstractmethod
    def decoder_info(self, context: int | None) -> DecoderInfo:
        """The decoder's shape; `context` rows of window, or a default within what the model was trained for."""
