"""Tiny random LLaVA-shaped checkpoints, made from configs: nothing is downloaded."""
from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

TEXT: dict[str, Any] = {"vocab_size": 411, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 70,
                          "patch_size": 14}

# name: (text model, its changes, vision tower, its changes, changes of the whole)
VARIANTS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], dict[str, Any]]] = {
    "gqa-tied": ("llama", {"num_hidden_layers": 3}, "clip", {"num_hidden_layers": 4}, {"tie_word_embeddings": True}),
    "mha-untied-biased": ("llama", {"num_key_value_heads": 4, "attention_bias": True}, "clip", {"hidden_act": "quick_gelu"},
                          {"tie_word_embeddings": False}),
    "one-kv-head": ("llama", {"num_key_value_heads": 1, "head_dim": 32}, "clip", {"image_size": 84, "num_hidden_layers": 4},
                    {"vision_feature_layer": -1}),
    "siglip-full": ("llama", {"num_hidden_layers": 3}, "siglip", {"num_hidden_layers": 4},
                    {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}),
    "two-layers": ("llama", {}, "clip", {}, {"vision_feature_layer": [-2, -3]}),
    "first-layers": ("llama", {}, "clip", {}, {"vision_feature_layer": 2, "multimodal_projector_bias": False}),
    "mistral-window": ("mistral", {"num_hidden_layers": 3, "sliding_window": 9}, "clip", {"num_hidden_layers": 4}, {}),
    "gemma2-softcap": ("gemma2", {"num_hidden_layers": 3, "head_dim": 16, "sliding_window": 9, "attn_logit_softcapping": 5.0,
                                  "query_pre_attn_scalar": 16}, "clip", {"num_hidden_layers": 4}, {}),
    "scaled-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}, "clip", {}, {}),
}


def make(variant: str, folder: Path, tokenizer_from: Path) -> Path:
    """Writes a checkpoint in shards with random weights (seed 0) and the demonstration model's tokenizer."""
    text_type, text, tower, vision, whole = VARIANTS[variant]
    torch.manual_seed(0)
    text_config = transformers.AutoConfig.for_model(text_type, **{**TEXT, "tie_word_embeddings": whole.get("tie_word_embeddings", False), **text})
    vision_config = transformers.AutoConfig.for_model({"clip": "clip_vision_model", "siglip": "siglip_vision_model"}[tower], **{**VISION, **vision})
    config = transformers.LlavaConfig(vision_config=vision_config, text_config=text_config, image_token_id=3, image_token_index=3, **whole)
    model = transformers.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1) + (parameter.ndim == 1))
    model.save_pretrained(folder, max_shard_size="100KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer_from / name, folder / name)
    side = vision_config.image_size
    (transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}) if tower == "clip"
     else transformers.SiglipImageProcessor(size={"height": side, "width": side})).save_pretrained(folder)
    return folder
