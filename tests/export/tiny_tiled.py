"""Tiny random Idefics3, SmolVLM and InternVL checkpoints, and the prompts that transformers' own processors make for them."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from harness import randomise, tokenizer_with, write
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

from edgecomp_export.families.base import Family, Geometry

ROWS_AND_COLUMNS = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]
IDEFICS = ("<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}{% if message['content'][0]['type'] == 'image' %}{{ ':' }}"
           "{% else %}{{ ': ' }}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
           "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
           "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")
INTERN = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for content in message['content'] %}"
          "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}"
          "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
TEXT: dict[str, Any] = {"vocab_size": 480, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "num_key_value_heads": 2, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Variant:
    """One checkpoint: the text model and changes to it, to the tower and to the whole, a tile's side, and what is chosen of pictures."""
    family: str
    text: str
    tile: int
    geometry: Geometry = field(default_factory=Geometry)
    text_changes: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    whole: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)  # of special tokens


VARIANTS = {
    "idefics3-2x2": Variant("idefics3", "llama", 64, Geometry(tiles=4), {}, {"image_size": 64, "patch_size": 8}),
    # 6 patches on a side for 5 trained positions, and markers of other names
    "smolvlm-2x3": Variant("smolvlm", "llama", 84, Geometry((168, 252)), {"num_key_value_heads": 4}, {"image_size": 70, "patch_size": 14},
                           {"scale_factor": 3, "tie_word_embeddings": True}, {"fake_image_token": "<fake>", "global_image_token": "<whole>"}),
    "smolvlm": Variant("smolvlm", "llama", 60, Geometry(), {"num_key_value_heads": 1}, {"image_size": 60, "patch_size": 10}),
    "internvl-1x2": Variant("internvl", "qwen2", 56, Geometry(tiles=2), {}, {"patch_size": 14}, {"tie_word_embeddings": True}),
    "internvl-qwen3": Variant("internvl", "qwen3", 80, Geometry(), {"head_dim": 32, "num_key_value_heads": 1},
                              {"patch_size": 8, "use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": True, "use_mean_pooling": False},
                              {"tie_word_embeddings": False}, {"start_image_token": "<picture>", "end_image_token": "</picture>"}),
    "internvl-llama": Variant("internvl", "llama", 56, Geometry((112, 112)), {}, {"patch_size": 14},
                              {"vision_feature_layer": -2, "tie_word_embeddings": False}),
}


def make(name: str, folder: Path, source: Path, dtype: torch.dtype = torch.float32, scale: float = 0.3) -> Path:
    """Writes a checkpoint with random weights."""
    variant = VARIANTS[name]
    intern = variant.family == "internvl"
    names = variant.names
    if intern:
        names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>", **names}
        tokens = [*names.values(), "<|im_start|>", "<|im_end|>"]
    else:
        tokens = ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<|im_start|>", *ROWS_AND_COLUMNS, *names.values()]
    tokenizer = tokenizer_with(source, tokens, INTERN if intern else IDEFICS, **names)
    image_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>" if intern else "<image>")
    text = transformers.AutoConfig.for_model(variant.text, **{**TEXT, "tie_word_embeddings": variant.whole.get("tie_word_embeddings", False),
                                                              **variant.text_changes})
    if intern:
        vision = transformers.InternVLVisionConfig(**{**VISION, "image_size": variant.tile, **variant.vision})
        model: Any = transformers.InternVLForConditionalGeneration(transformers.InternVLConfig(
            vision_config=vision, text_config=text, image_token_id=image_id, **variant.whole))
        processor: Any = transformers.GotOcr2ImageProcessorPil(size={"height": variant.tile, "width": variant.tile})
    else:
        kind = "Idefics3" if variant.family == "idefics3" else "SmolVLM"
        config = getattr(transformers, f"{kind}Config")(vision_config={**VISION, **variant.vision}, text_config=text, image_token_id=image_id,
                                                        **variant.whole)
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
        processor = getattr(transformers, f"{kind}ImageProcessorPil")(size={"longest_edge": 4 * variant.tile},
                                                                      max_image_size={"longest_edge": variant.tile})
    randomise(model, scale)
    return write(model, tokenizer, processor, folder, dtype)


def hf_inputs(folder: Path, name: str, family: Family, messages: list[dict[str, Any]], pictures: Sequence[Any]) -> dict[str, torch.Tensor]:
    """What transformers' own processor makes of a conversation; of the composite ones that fail without torchvision, its parts."""
    variant, info = VARIANTS[name], family.image_info()
    tokenizer, images = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    text, each = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False), family.tiles()[0].tokens
    rows, columns = info.tiles
    if variant.family == "internvl":
        how = {"crop_to_patches": info.count > 1, "min_patches": rows * columns, "max_patches": rows * columns}
        seen = images(images=list(pictures), return_tensors="pt", **how)
        replace, me = InternVLProcessor.replace_image_token, SimpleNamespace(
            start_image_token=tokenizer.start_image_token, end_image_token=tokenizer.end_image_token, image_token=tokenizer.context_image_token,
            image_seq_length=each)
        token, model_inputs = tokenizer.context_image_token, {"pixel_values": seen["pixel_values"]}
        assert list(seen["num_patches"]) == [info.count] * len(pictures)
    else:
        how = {"do_image_splitting": info.count > 1, "size": {"longest_edge": info.longest_edge}}
        if variant.family == "idefics3":
            return dict(Idefics3Processor(images, tokenizer, image_seq_len=each)(text=[text], images=[list(pictures)], return_tensors="pt", **how))
        seen = images(images=[list(pictures)], return_tensors="pt", return_row_col_info=True, **how)
        replace, me = SmolVLMProcessor.replace_image_token, SimpleNamespace(
            fake_image_token=tokenizer.fake_image_token if "fake_image_token" in variant.names else "<fake_token_around_image>",
            global_image_token=tokenizer.global_image_token if "global_image_token" in variant.names else "<global-img>",
            image_token="<image>", image_seq_len=each)
        token, model_inputs = "<image>", {name: seen[name] for name in ("pixel_values", "pixel_attention_mask")}
        assert seen["rows"] == [[rows if info.count > 1 else 0] * len(pictures)]
    for n in range(len(pictures)):
        text = text.replace(token, replace(me, seen, n).replace(token, "\0"), 1)
    ids = tokenizer([text.replace("\0", token)], return_tensors="pt")
    return {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"], **model_inputs}
