"""LLaVA-OneVision (arXiv 2408.03326): anyres pictures as LLaVA-NeXT has them, with a limit on their tokens."""
from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from edgecomp_export.families.llava import grid_side
from edgecomp_export.families.llava_next import Anyres, Size
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import ImageInfo


class LlavaOnevision(Anyres):
    """`LlavaOnevisionForConditionalGeneration`; videos are left out.

    Choices as for LLaVA-NeXT. More tokens than so many tiles have ('anyres_max_9') are scaled down. With --no-tiles a picture is
    what it is to HF and the authors in a prompt of several: padded to a square, one tile, one newline. (HF's processor does so where
    it is given the pictures of a prompt as a list in a list; pictures in one list are cut into tiles each.)
    """

    def scaled(self, size: Size) -> Size | None:
        most = str(self.config.vision_aspect_ratio).removeprefix("anyres_max_")
        if not most.isdigit() or most == "0":
            raise EdgecompError(f"vision_aspect_ratio {self.config.vision_aspect_ratio!r} is not anyres_max_ and a number of tiles: "
                                "edgecomp and transformers take no other")
        ratio = math.sqrt(size[0] * size[1] / (int(most) * grid_side(self.config) ** 2))
        return (int(size[0] // ratio), int(size[1] // ratio)) if ratio > 1.1 else None

    def alone(self, info: ImageInfo) -> ImageInfo:
        # HF multiplies by 255 whatever the scale, and cuts off
        red, green, blue = (int(mean * 255) for mean in info.mean)
        return dataclasses.replace(info, square=(red, green, blue))

    def hf_preprocess(self, processor: Any, picture: Any) -> torch.Tensor | None:
        if self.geometry.tiles != 0:
            return super().hf_preprocess(processor, picture)
        several: torch.Tensor = processor(images=[[picture, picture]], return_tensors="pt")["pixel_values"]  # [2, 1, 3, H, W]
        return several[:1, 0].float()

    def hf_pixels(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.geometry.tiles != 0:
            return super().hf_pixels(pixels)
        # a prompt of one picture would be cut into tiles, so that it is said to have another, which no size is given of
        return {**super().hf_pixels(pixels[:, None]), "batch_num_images": torch.tensor([max(2, len(pixels))])}
