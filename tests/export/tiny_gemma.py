"""Tiny random Gemma 3 and PaliGemma checkpoints, made from configs: nothing is downloaded."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from harness import tokenizer_with, write
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

GEMMA_TEMPLATE = """\
{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}
{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<start_of_image>\
{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %}{% endif %}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

TEXT: dict[str, Any] = {"vocab_size": 420, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
                        "pad_token_id": 0, "query_pre_attn_scalar": 16}
VISION: dict[str, Any] = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                          "num_attention_heads": 2, "image_size": 56, "patch_size": 14, "vision_use_head": False}

# name: (family, changes of the text model, of the vision tower, of the whole)
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("gemma3", {"sliding_window": 7, "sliding_window_pattern": 2}, {"image_size": 112}, {"mm_tokens_per_image": 16}),
    "gemma3-untied": ("gemma3", {"sliding_window": 100, "num_key_value_heads": 4, "sliding_window_pattern": 2,
                                 "attention_bias": True, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
                      {"image_size": 98}, {"mm_tokens_per_image": 9, "tie_word_embeddings": False}),
    "paligemma": ("gemma", {"num_key_value_heads": 1}, {}, {}),
    "paligemma2": ("gemma2", {"sliding_window": 7, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0}, {"image_size": 70}, {}),
}


def make(variant: str, folder: Path, tokenizer_from: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a checkpoint with random weights (seed 0)."""
    family, text, vision, whole = VARIANTS[variant]
    vision = {**VISION, **vision}
    size = {"height": vision["image_size"], "width": vision["image_size"]}
    torch.manual_seed(0)
    if family == "gemma3":
        config = transformers.Gemma3Config(text_config={**TEXT, **text}, vision_config=vision, boi_token_index=412, eoi_token_index=413,
                                           image_token_index=411, **whole)
        model: Any = transformers.Gemma3ForConditionalGeneration(config)
        tokenizer = tokenizer_with(tokenizer_from, ["<image_soft_token>", "<start_of_image>", "<end_of_image>", "<start_of_turn>", "<end_of_turn>"],
                                   GEMMA_TEMPLATE, image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
        processor: Any = Gemma3ImageProcessorPil(size=size)
    else:
        tied = {"tie_word_embeddings": True, **whole}
        config = transformers.PaliGemmaConfig(text_config={"model_type": family, **TEXT, **text}, vision_config=vision, image_token_index=3,
                                              projection_dim=TEXT["hidden_size"], hidden_size=TEXT["hidden_size"], **tied)
        model = transformers.PaliGemmaForConditionalGeneration(config)
        tokenizer = tokenizer_with(tokenizer_from, [], None)
        tokenizer.add_bos_token = True  # as the tokenizers of real checkpoints; the processor takes it away
        processor = SiglipImageProcessorPil(size=size, image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2)
    randomise(model)
    return write(model, tokenizer, processor, folder, dtype)


def randomise(model: torch.nn.Module) -> None:
    """Weights large enough for a picture to change the answer. Gemma's norms multiply by 1 + weight, so theirs are about zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wide, zero_centred = parameter.ndim > 1, "language_model" in name or "mm_soft_emb_norm" in name
            scale = 0.05 if "embed_tokens" in name else 0.3 if wide else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + (not wide and not zero_centred and "bias" not in name))
