"""Quantized bundles against Hugging Face's model with the same weights, which are quantized here by plain loops."""
from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import TOLERANCE
from test_llava import PICTURE, QUESTION, assert_same
from transformers import LlavaForConditionalGeneration

from edgecomp import methods
from edgecomp.compress import Recipe, compress
from edgecomp.dialects import quantized as dialect
from edgecomp.lowering import lowered
from edgecomp.quantize.apply import quantize
from edgecomp.writer import copy_files, writing
from edgecomp_export.layerwise import pictures, verify_layers
from edgecomp_export.verify import reference_of, verify
from edgecomp_runtime import Bundle, Session
from edgecomp_runtime.backends.onnxruntime import OnnxRuntimeBackend

BLOCK = 16
FACTORS = {8: [1.0], 4: [1.0, 0.93, 0.87, 0.8]}
Compiled = Callable[..., tuple[Path, Path]]


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in fp32, so that nothing but the weights is rounded."""
    monkeypatch.setattr(dialect, "ACCURACY_LEVEL", 0)


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """A weight [out, in] as blocks of whole numbers say it, one block after the other."""
    most = 2 ** (bits - 1) - 1
    found = weight.clone()
    for row in found:
        for first in range(0, len(row), BLOCK):
            block = row[first:first + BLOCK].clone()
            tried = []
            for factor in FACTORS[bits]:
                scale = (block.abs().max() / most * factor).half().float()
                tried.append((block / scale).round().clamp(-most - 1, most) * scale)
            row[first:first + BLOCK] = min(tried, key=lambda one: float(((one - block).double() ** 2).sum()))
    return found


def rounded_checkpoint(source: Path, out: Path, precision: str) -> Path:
    """A checkpoint with the decoder's weights, and the head's, rounded; the head is no longer tied to the embeddings."""
    model = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.copy_(rounded(module.weight, 8 if precision == "int8" else 4))
        model.lm_head.weight = torch.nn.Parameter(rounded(model.lm_head.weight.detach(), 8))
    for config in (model.config, model.config.text_config):
        config.tie_word_embeddings = False
    model.save_pretrained(out)
    for file in source.iterdir():
        if file.name != "config.json" and not file.name.startswith("model"):
            shutil.copy(file, out)
    return out


@pytest.mark.parametrize(("variant", "precision"), [("gqa-tied", "int4"), ("mha-untied-biased", "int8"), ("gemma2-softcap", "int4")])
def test_the_session_says_what_hugging_face_says_with_those_weights(compiled: Compiled, tmp_path: Path, variant: str, precision: str) -> None:
    folder, bundle = compiled(tiny, variant)
    quantize(bundle, tmp_path / "bundle", precision, block=BLOCK)
    theirs = rounded_checkpoint(folder, tmp_path / "checkpoint", precision)
    session = Session(Bundle.open(tmp_path / "bundle"))
    assert_same(theirs, session, PICTURE, QUESTION, "eager" if "softcap" in variant else "sdpa")
    with pytest.raises(AssertionError):
        assert_same(folder, session, PICTURE, QUESTION, "eager")


def test_verification_puts_the_bundles_weights_into_hugging_faces_model(compiled: Compiled, tmp_path: Path) -> None:
    """Layer by layer and whole, and of a cut plan; against the weights of another block it shows."""
    _, bundle = compiled(tiny, "gqa-tied")
    compress(bundle, tmp_path / "plans", [Recipe.of(methods.make("dart"), "7")])
    quantize(tmp_path / "plans", tmp_path / "bundle", "int4", block=BLOCK)
    mine = Bundle.open(tmp_path / "bundle")
    assert all(check.good for check in verify_layers(mine, pictures(mine.manifest), QUESTION))
    for plan in ("full", "dart-7"):
        found, = verify(Session(mine, plan=plan), reference_of(mine), [(PICTURE, QUESTION)], most=10)
        assert found.same and found.logits < TOLERANCE["fp32 logits"]
    quantize(tmp_path / "plans", tmp_path / "other", "int4", block=2 * BLOCK)
    found, = verify(Session(mine, plan="full"), reference_of(Bundle.open(tmp_path / "other")), [(PICTURE, QUESTION)], most=10)
    assert found.logits > 100 * TOLERANCE["fp32 logits"]


def test_verification_of_an_fp16_bundle(compiled: Compiled, tmp_path: Path) -> None:
    _, bundle = compiled(tiny, "gqa-tied", precision="fp16")
    quantize(bundle, tmp_path / "bundle", "int4", block=BLOCK)
    mine = Bundle.open(tmp_path / "bundle")
    assert all(check.good for check in verify_layers(mine, pictures(mine.manifest), QUESTION))


@pytest.mark.parametrize("release", ["tensorrt-11.4", "tensorrt-rtx-1.7"])
def test_the_graphs_for_tensorrt_mean_the_same(compiled: Compiled, tmp_path: Path, release: str) -> None:
    """onnxruntime runs them as they stand, by ONNX's own DequantizeLinear."""
    _, neutral = compiled(tiny, "gqa-tied")
    quantize(neutral, tmp_path / "bundle", "int4", block=BLOCK)
    bundle = Bundle.open(tmp_path / "bundle")
    graphs, plan = dict(bundle.manifest.graphs), bundle.manifest.plans["full"]
    with writing(tmp_path / "both") as (partial, finish):
        copy_files(bundle, partial)
        files = lowered(plan, release, graphs, partial)
        plans = {"full": dataclasses.replace(plan, variants={**plan.variants, release: files})}
        finish(dataclasses.replace(bundle.manifest, plans=plans, graphs=graphs))
    both = Bundle.open(tmp_path / "both")
    answer = [5, 9, 30, 7]
    expected = Session(both, threads=1).score(QUESTION, [PICTURE], answer)
    found = Session(both, backend=OnnxRuntimeBackend(1, release)).score(QUESTION, [PICTURE], answer)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE["fp32 logits"])
