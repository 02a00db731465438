"""Tiny random Qwen-VL checkpoints, made from configs: nothing is downloaded."""
from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from harness import randomise, tokenizer_with, write
from safetensors.torch import load_file, save_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|image_pad|>")  # 411 to 413; the tokenizer has <|vision_start|> and so on already
IDS = {"image_token_id": 413, "video_token_id": 6, "vision_start_token_id": 4, "vision_end_token_id": 5}

# as Qwen2.5-VL-7B-Instruct publishes it
TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

TEXT: dict[str, Any] = {"vocab_size": 414, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 412, "pad_token_id": 0,
                        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
    # windows of 4 x 4 visual tokens and full attention in some layers, as the published models have
    "qwen2_5_vl": {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "window_size": 112,
                   "fullatt_block_indexes": [1]},
    "qwen3_vl": {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 36,
                 "deepstack_visual_indexes": [0, 2]},
}
CLASSES: dict[str, tuple[type[Any], type[Any]]] = {
    "qwen2_vl": (transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration),
}


@dataclass(frozen=True)
class Variant:
    """A model type, what differs from the dictionaries above, and the size of pictures that it is compiled for."""
    family: str
    size: tuple[int, int] | None
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    published: bool = False  # in the spelling of the hub's files instead of transformers 5's


SIXTEEN = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
VARIANTS = {
    "qwen2-sliding-tied": Variant("qwen2_vl", (56, 140), {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, tied=True),
    # windows of four lengths: inside, at the right edge, at the bottom edge and in the corner
    "qwen2.5-ragged": Variant("qwen2_5_vl", (168, 252)),
    "qwen2.5-published": Variant("qwen2_5_vl", None, {"num_key_value_heads": 4}, processor={"min_pixels": 3136, "max_pixels": 25088},
                                 tied=True, published=True),
    # two layers more than the deepstack goes into
    "qwen3-wide-heads": Variant("qwen3_vl", (64, 160), {"num_hidden_layers": 4, "head_dim": 32, "rope_parameters": {
        "rope_type": "default", "rope_theta": 5e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True}}, processor=SIXTEEN),
    "qwen3-tied-one-kv-head": Variant("qwen3_vl", (96, 64), {"head_dim": 16, "num_key_value_heads": 1, "attention_bias": True,
                                                            "num_hidden_layers": 3}, {"deepstack_visual_indexes": [0, 1, 2]}, SIXTEEN, tied=True),
}


def config(family: str, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, tied: bool = False) -> Any:
    """A tiny config of a model type."""
    parts = {"text_config": {**TEXT, **(text or {})}, "vision_config": {**VISION[family], **(vision or {})}}
    return CLASSES[family][0](**parts, tie_word_embeddings=tied, **IDS)


def make(variant: str, folder: Path, tokenizer_from: Path, dtype: torch.dtype = torch.float32, scale: float = 0.2) -> Path:
    """Writes a checkpoint with random weights (seed 0), the demonstration model's tokenizer and Qwen's chat template."""
    chosen = VARIANTS[variant]
    model = CLASSES[chosen.family][1](config(chosen.family, chosen.text, chosen.vision, chosen.tied))
    randomise(model, scale)
    write(model, tokenizer_with(tokenizer_from, SPECIAL, TEMPLATE), Qwen2VLImageProcessorPil(**chosen.processor), folder, dtype)
    if chosen.published:
        publish(folder)
    return folder


def publish(folder: Path) -> None:
    """The same checkpoint as the hub's Qwen2.5-VL files spell it: a flat config with rope_scaling, other weight names, and the
    image processor's settings in preprocessor_config.json with min_pixels and max_pixels."""
    config = json.loads((folder / "config.json").read_text())
    text, vision = config.pop("text_config"), config["vision_config"]
    rope = text.pop("rope_parameters")
    text.pop("model_type")
    vision.pop("rope_parameters", None)
    vision["model_type"] = config["model_type"]
    config |= {**text, "rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
               "architectures": ["Qwen2_5_VLForConditionalGeneration"], "transformers_version": "4.41.2"}
    (folder / "config.json").write_text(json.dumps(config))
    weights: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        weights |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    renamed = {name.removeprefix("model.") if name.startswith("model.visual.") else name.replace("model.language_model.", "model."): tensor
               for name, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    settings = VARIANTS["qwen2.5-published"].processor | {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    settings |= {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
                 "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    for path in ("processor_config.json", "preprocessor_config.json"):
        (folder / path).unlink(missing_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
