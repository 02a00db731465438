"""What the tests of every family share: tiny random checkpoints, and the comparison with Hugging Face's own generate."""
from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.onnx._internal.exporter._registration import ONNXRegistry
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from edgecomp_runtime import Session

STEPS = 10

# what torch knows of ONNX: it reads it anew for every graph, from the sources of a thousand functions, and never changes it
ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))  # type: ignore[method-assign]


def randomise(model: torch.nn.Module, scale: float = 0.3) -> None:
    """Weights large enough for a picture to change the answer; norms about one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            wide = parameter.ndim > 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (scale if wide else 0.1) + (not wide))


def tokenizer_with(source: Path, tokens: Sequence[str], template: str | None, **special: str) -> PreTrainedTokenizerFast:
    """The demonstration model's tokenizer (411 ids) with more special tokens behind (ids 411 and after) and another chat template.

    `special` names attributes such as image_token or boi_token, which HF's processors read from the tokenizer.
    """
    made = PreTrainedTokenizerFast.from_pretrained(source)
    made.add_special_tokens({"extra_special_tokens": list(tokens)}, replace_extra_special_tokens=False)
    made._set_model_specific_special_tokens(special)  # behind the others: they have their ids now
    made.chat_template = template
    return made


def write(model: Any, tokenizer: Any, image_processor: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint in the Hugging Face layout, in shards."""
    model.to(dtype).save_pretrained(folder, max_shard_size="200KB")
    tokenizer.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return folder


def hugging_face(folder: Path, inputs: dict[str, torch.Tensor], steps: int = STEPS, attention: str = "eager") -> tuple[list[int], np.ndarray]:
    """Greedy ids and the logits [steps, V] that they were chosen by, from HF's own generate in fp32."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    with torch.no_grad():
        model.generation_config.eos_token_id = None  # nothing ends it early, and nothing is suppressed: each id is its logits' argmax
        out = model.generate(**inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return [int(i) for i in out.sequences[0, inputs["input_ids"].shape[1]:]], torch.cat(out.logits).float().numpy()


def assert_same(session: Session, prompt: Any, pictures: Sequence[Any], expected: tuple[list[int], np.ndarray], tolerance: float) -> None:
    """The bundle's logits at every greedy step of HF's answer, prefill first, and so the same tokens."""
    ids, logits = expected
    mine = session.score(prompt, pictures, ids[:-1]).astype(np.float32)
    assert mine.shape == logits.shape
    assert np.abs(mine - logits).max() < tolerance
    assert [int(i) for i in mine.argmax(1)] == ids


def pictures(canvas: tuple[int, int], scenes: Path) -> list[Image.Image]:
    """Two pictures of about the canvas's shape, so that transformers cuts them up as the bundle does: a real one and noise."""
    real = Image.open(scenes / "images/scene-03.jpg").convert("RGB").resize((3 * canvas[1], 3 * canvas[0] - 2))
    noise = np.random.default_rng(1).integers(0, 256, (canvas[0] + 1, canvas[1] + 1, 3), np.uint8)
    return [real, Image.fromarray(noise)]


def conversation(several: bool) -> list[dict[str, Any]]:
    """A picture and a question; or several turns with two pictures, one behind some text."""
    if not several:
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]}]
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is written?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "HELLO"}]},
            {"role": "user", "content": [{"type": "text", "text": "and here\nbelow"}, {"type": "image"}, {"type": "text", "text": "?"}]}]
