"""PaliGemma (arXiv 2407.07726) and PaliGemma 2 (arXiv 2412.03555): a SigLIP tower, one linear layer, Gemma or Gemma 2.

The whole prompt, pictures and text, sees itself both ways, also beyond the windows that Gemma 2's local layers have.
"""
from __future__ import annotations

from typing import Any

import torch

from edgecomp_export.families.gemma3 import Siglip

# The processor makes prompts in code: pictures, the start token, the text and a line's end; no turns.
TEMPLATE = """\
{%- if messages | length != 1 or messages[0]['role'] != 'user' -%}
{{- raise_exception('a PaliGemma model answers one prompt and has no conversations: give one user message') -}}
{%- endif -%}
{%- set content = messages[0]['content'] -%}
{%- if content is string -%}
{%- set content = [{'type': 'text', 'text': content}] -%}
{%- endif -%}
{%- for part in content if part['type'] == 'image' %}{{ '<image>' }}{% endfor -%}
{{- bos_token -}}
{%- for part in content if part['type'] == 'text' %}{{ part['text'] }}{% endfor -%}
{{- '\\n' -}}
"""


class CappedHead(torch.nn.Module):
    """Hidden state to logits, which Gemma 2 bends to within `cap`."""

    def __init__(self, head: torch.nn.Module, cap: float):
        super().__init__()
        self.head, self.cap = head, cap

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.head(hidden) / self.cap) * self.cap


class PaliGemma(Siglip):
    """`PaliGemmaForConditionalGeneration` over any Gemma."""

    first_position = 1
    bidirectional = "prompt"
    segments_bounded = False

    def template(self) -> str | None:
        return TEMPLATE

    def prepare_tokenizer(self, tokenizer: Any) -> Any:
        tokenizer.add_bos_token = tokenizer.add_eos_token = False  # the prompt has its own, behind the pictures
        return tokenizer

    def language(self, model: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
        decoder, head = super().language(model)
        cap = getattr(self.config.get_text_config(), "final_logit_softcapping", None)
        return decoder, CappedHead(head, cap) if cap else head

    def hf_prompt(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"token_type_ids": torch.zeros_like(ids)}
