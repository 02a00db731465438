"""SmolVLM and SmolVLM2 (arXiv 2504.05299): Idefics3's shape, made small."""
from __future__ import annotations

from edgecomp_export.families.idefics3 import Idefics3


class SmolVLM(Idefics3):
    """`SmolVLMForConditionalGeneration`. Its processor takes the markers' names from the tokenizer, where Idefics3's spells them out."""

    def markers(self) -> tuple[str, str]:
        names = self.processor["special_tokens"]
        return names.get("fake_image_token", "<fake_token_around_image>"), names.get("global_image_token", "<global-img>")
