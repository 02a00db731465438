"""Qianfan-OCR against Hugging Face: its tower, tiles, and prompts of its own processor, which needs no torchvision."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import torch
from harness import conversation, pictures
from tiny_tiled import INTERN, TEXT, VISION
from transformers import AutoProcessor, GotOcr2ImageProcessorPil, QianfanOCRConfig, QianfanOCRForConditionalGeneration, QianfanOCRProcessor

from edgecomp import methods
from edgecomp.compile import compile_model
from edgecomp.compress import Recipe
from edgecomp_export.families.base import Geometry
from edgecomp_export.families.qianfan_ocr import QianfanOCR
from edgecomp_export.reference import Reference
from edgecomp_export.verify import verify
from edgecomp_runtime import Bundle, Session, images

NAMES = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
# a tile's side, tiles, visual tokens of a tile, a budget, and changes to the tower and to the whole
VARIANTS: dict[str, tuple[int, int | None, int, str, dict[str, Any], dict[str, Any]]] = {
    "tiles": (56, 2, 4, "7", {"patch_size": 14}, {"tie_word_embeddings": True}),
    # the last layer, counted from the front, is taken behind a norm that does something
    "whole": (80, None, 25, "36%", {"patch_size": 8, "use_qk_norm": True, "norm_type": "rms_norm", "use_mean_pooling": False},
              {"vision_feature_layer": 2}),
}


class Made:
    """A tiny checkpoint, saved as transformers saves it, and its bundle."""

    def __init__(self, name: str, folder: Path, source: Path):
        side, tiles, self.each, budget, vision, whole = VARIANTS[name]
        template = INTERN.replace("<IMG_CONTEXT>", "<image>")
        tokenizer = harness.tokenizer_with(source, [*NAMES.values(), "<|im_start|>", "<|im_end|>"], template, **NAMES)
        text = {"model_type": "qwen3", "head_dim": 32, **TEXT, "tie_word_embeddings": whole.get("tie_word_embeddings", False)}
        model = QianfanOCRForConditionalGeneration(QianfanOCRConfig(
            vision_config={**VISION, "image_size": side, **vision}, text_config=text,
            image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), **whole))
        harness.randomise(model)
        processor = QianfanOCRProcessor(GotOcr2ImageProcessorPil(size={"height": side, "width": side}), tokenizer, self.each, template)
        self.checkpoint, self.bundle = harness.write(model, tokenizer, processor, folder / "checkpoint"), folder / "bundle"
        compile_model(str(self.checkpoint), self.bundle, [Recipe.of(methods.make("dart"), budget)], tiles=tiles)
        self.processor = AutoProcessor.from_pretrained(self.checkpoint)
        self.reference = Reference(str(self.checkpoint), "eager", Geometry(tiles=tiles))

    def hf_inputs(self, messages: list[dict[str, Any]], seen: list[Any]) -> dict[str, torch.Tensor]:
        """What transformers' own processor makes of a conversation."""
        text, info = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False), self.reference.family.image_info()
        how = {"crop_to_patches": info.count > 1, **dict.fromkeys(("min_patches", "max_patches"), info.tiles[0] * info.tiles[1])}
        return dict(self.processor(text=[text], images=seen, return_tensors="pt", **how))


@pytest.fixture(scope="module", params=VARIANTS)
def made(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(request.param, tmp_path_factory.mktemp(request.param), checkpoint)


def test_pictures_prompts_and_answers_are_as_in_transformers(made: Made, scenes: Path) -> None:
    session = Session(Bundle.open(made.bundle), plan="full")
    info, vision = session.bundle.manifest.image, session.bundle.manifest.vision
    assert vision.tokens == made.each * info.count
    seen = pictures(info.canvas, scenes)
    pixels = torch.cat([made.reference.pixels(p) for p in seen])
    assert max(np.abs(images.preprocess(images.load(p), info) - theirs).max() for p, theirs in zip(seen, pixels.numpy())) < 1e-5
    mine = np.stack([session.visual_tokens(p).tokens for p in seen])
    assert np.abs(mine - made.reference.features(pixels)[0].numpy()).max() < 1e-4
    for several in (False, True):
        messages, given = conversation(several), seen[:1 + several]
        inputs = made.hf_inputs(messages, given)
        rows, _ = session._prepare(messages, given, False, 1)
        image_id = made.reference.image_id
        assert [i for row in rows for i in [row] * (vision.tokens if row == image_id else 1)] == inputs["input_ids"][0].tolist()
        harness.assert_same(session, messages, given, harness.hugging_face(made.checkpoint, inputs), 1e-4)


def test_the_compressed_plan_says_what_transformers_says_of_the_kept_tokens(made: Made, scenes: Path) -> None:
    session = Session(Bundle.open(made.bundle))
    assert session.plan.steps
    for found in verify(session, made.reference, [(p, "what is this?") for p in pictures(session.bundle.manifest.image.canvas, scenes)], most=10):
        assert found.same and found.logits < 1e-4


def test_a_published_picture_has_its_published_tokens() -> None:
    settings = {"size": {"height": 448, "width": 448}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "special_tokens": {}}
    assert QianfanOCR(QianfanOCRConfig(), settings, Geometry(tiles=12)).tokens() == 13 * 256
