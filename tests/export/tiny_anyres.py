"""Tiny random LLaVA-NeXT and LLaVA-OneVision checkpoints, made from configs, and Hugging Face's processors for them."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from harness import randomise, tokenizer_with, write
from tiny import TEXT, VISION
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

SIZES: dict[str, Any] = {"max_position_embeddings": 1024, "num_hidden_layers": 2}
IMAGE = 3  # the demonstration tokenizer's image token
CANVASES = {"llava_next": [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)], "llava_onevision": [(r, c) for r in range(1, 5) for c in range(1, 5)]}

# name: (family, text model, its changes, vision tower, its changes, changes of the whole)
VARIANTS: dict[str, tuple[str, str, dict[str, Any], str, dict[str, Any], dict[str, Any]]] = {
    "next-llama": ("llava_next", "llama", {}, "clip", {}, {}),
    "next-mistral": ("llava_next", "mistral", {"num_key_value_heads": 4, "sliding_window": None}, "siglip", {"image_size": 56},
                     {"vision_feature_select_strategy": "full", "vision_feature_layer": -1, "tie_word_embeddings": True}),
    "ov-qwen2": ("llava_onevision", "qwen2", {}, "siglip", {"image_size": 60}, {"tie_word_embeddings": True, "vision_aspect_ratio": "anyres_max_3"}),
    "ov-mha": ("llava_onevision", "qwen2", {"num_key_value_heads": 4}, "siglip", {}, {"vision_feature_layer": [-1, 2]}),
}


def config(variant: str) -> Any:
    family, text_type, text, tower, vision, whole = VARIANTS[variant]
    made = transformers.AutoConfig.for_model(text_type, **{**TEXT, **SIZES, "tie_word_embeddings": whole.get("tie_word_embeddings", False), **text})
    kind = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}[tower]
    headless = {"vision_use_head": False} if tower == "siglip" else {}
    seen = transformers.AutoConfig.for_model(kind, **{**VISION, "num_hidden_layers": 3, **headless, **vision})
    canvases = [[rows * seen.image_size, columns * seen.image_size] for rows, columns in CANVASES[family]]
    return transformers.AutoConfig.for_model(family, vision_config=seen, text_config=made, image_token_index=IMAGE, image_grid_pinpoints=canvases,
                                             **whole)


def image_processor(made: Any) -> Any:
    """HF's own for a config."""
    side, canvases = made.vision_config.image_size, made.image_grid_pinpoints
    if made.model_type == "llava_next":
        return LlavaNextImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=canvases)
    return LlavaOnevisionImageProcessorPil(size={"height": side, "width": side}, image_grid_pinpoints=canvases,
                                           image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.5, 0.5])


def processor(made: Any, tokenizer: Any) -> Any:
    """HF's own processor class for a config. LLaVA-OneVision's cannot be made without torchvision, for its videos: only they lack here."""
    side = made.vision_config.image_size // made.vision_config.patch_size
    strategy, pictures = made.vision_feature_select_strategy, image_processor(made)
    if made.model_type == "llava_next":
        return transformers.LlavaNextProcessor(pictures, tokenizer, patch_size=made.vision_config.patch_size, image_token="<image>",
                                               vision_feature_select_strategy=strategy, num_additional_image_tokens=int(strategy == "default"))
    found = object.__new__(transformers.LlavaOnevisionProcessor)
    found.image_processor, found.tokenizer, found.image_token, found.num_image_tokens = pictures, tokenizer, "<image>", side * side
    found.vision_feature_select_strategy, found.vision_aspect_ratio = strategy, made.vision_aspect_ratio
    return found


def hf_inputs(folder: Path, made: Any, messages: list[dict[str, Any]], pictures: list[Any], one_tile: bool = False) -> dict[str, torch.Tensor]:
    """What HF's processor makes of a conversation; `one_tile`: of pictures in a list in a list."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = processor(made, tokenizer)
    seen = theirs.image_processor([pictures] if one_tile else pictures, return_tensors="pt")
    first, *rest = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False).split("<image>")
    text = first + "".join(theirs.replace_image_token(seen, n) + part for n, part in enumerate(rest))
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")  # the template has the first token
    return {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"], **seen}


def make(variant: str, folder: Path, tokenizer_from: Path, dtype: torch.dtype = torch.float32, weights: float = 0.15) -> Path:
    """Writes a checkpoint with random weights (seed 0) and the demonstration model's tokenizer."""
    made = config(variant)
    model = transformers.AutoModelForImageTextToText.from_config(made)
    randomise(model, weights)
    tokenizer = tokenizer_with(tokenizer_from, [], transformers.AutoTokenizer.from_pretrained(tokenizer_from).chat_template)
    return write(model, tokenizer, image_processor(made), folder, dtype)
