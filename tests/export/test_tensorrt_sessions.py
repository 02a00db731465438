"""The TensorRT dialects through the whole runtime: prefill and decode apart, buckets, new rows put into the cache by the host, reuse.

No engine is run. ONNX Runtime runs the lowered graphs, which hold ONNX's own operators alone, behind the same session and buffers; the oracle
is the onnxruntime dialect of the same bundle, which test_sites compares with Hugging Face.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import harness
import numpy as np
import pytest
import tiny
import tiny_gemma
import tiny_qwen
from test_sites import ANSWER, CALLS, TURNS, label, plan, told

from edgecomp.compress import Recipe, compress
from edgecomp.lowering import lowered
from edgecomp.writer import copy_files, writing
from edgecomp_runtime import Bundle, Session, limits
from edgecomp_runtime.backends.onnxruntime import OnnxRuntimeBackend

DIALECTS = ("tensorrt-8.6", "tensorrt-10.3", "tensorrt-rtx-1.7")  # outside and plain, outside and int64, in place and fused
CASES: dict[str, tuple[ModuleType, str, dict[str, Any], tuple[Recipe, ...]]] = {
    "llava": (tiny, "gqa-tied", {}, (plan("random 9 decoder:1"), plan("cls 16 projector", "fastv 6 decoder:1", compact=True),
                                     plan("cdpruner 8 projector"), plan("dart 9 projector"))),
    "softcap": (tiny, "gemma2-softcap", {}, (plan("stride 5 decoder:1"),)),
    "qwen3": (tiny_qwen, "qwen3-wide-heads", {"image_size": (64, 160)}, (plan("random 3 decoder:0", compact=True), plan("dart 4 decoder:1"))),
    "gemma3": (tiny_gemma, "gemma3", {}, (plan("random 6 decoder:1"),)),
}


@pytest.fixture(scope="module")
def lowered_bundle(compiled: Callable[..., tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Bundle, list[str]]]:
    """A case's bundle with all of its plans, and the full one, in the TensorRT dialects too."""
    made: dict[str, tuple[Bundle, list[str]]] = {}

    def make(case: str) -> tuple[Bundle, list[str]]:
        if case not in made:
            maker, variant, geometry, recipes = CASES[case]
            folder = tmp_path_factory.mktemp(case) / "bundle"
            names = ["full", *compress(compiled(maker, variant, **geometry)[1], folder, recipes)]
            bundle = Bundle.open(folder)
            graphs, plans = dict(bundle.manifest.graphs), dict(bundle.manifest.plans)
            with writing(folder) as (partial, finish):
                copy_files(bundle, partial)
                for name in names:
                    for dialect in DIALECTS:
                        more = {dialect: lowered(plans[name], dialect, graphs, partial)}
                        plans[name] = dataclasses.replace(plans[name], variants={**plans[name].variants, **more})
                finish(dataclasses.replace(bundle.manifest, plans=plans, graphs=graphs))
            made[case] = Bundle.open(folder), names
        return made[case]
    return make


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(("case", "number"), [(case, n) for case, (*_, recipes) in CASES.items() for n in range(1 + len(recipes))],
                         ids=[f"{case}-{name}" for case, (*_, recipes) in CASES.items() for name in ("full", *map(label, recipes))])
def test_a_session_says_the_same(lowered_bundle: Callable[[str], tuple[Bundle, list[str]]], scenes: Path, monkeypatch: pytest.MonkeyPatch, case: str,
                                 number: int, dialect: str) -> None:
    bundle, names = lowered_bundle(case)
    monkeypatch.setattr(limits, "BUCKET", 64)  # so that a cache grows out of its bucket
    monkeypatch.setattr(OnnxRuntimeBackend, "logit_rows", 1)
    monkeypatch.setattr(OnnxRuntimeBackend, "prefill_rows", 40)
    theirs = Session(bundle, plan=names[number], threads=1)
    mine = Session(bundle, plan=names[number], backend=OnnxRuntimeBackend(1, dialect))
    canvas = bundle.manifest.image.canvas
    pictures = [picture.resize(canvas[::-1]) for picture in harness.pictures(canvas, scenes)]
    np.testing.assert_allclose(told(mine, TURNS, pictures), told(theirs, TURNS, pictures), atol=1e-4)
    for messages in CALLS.values():  # rows of the call before are reused, or not, as there
        given = pictures[:sum(part["type"] == "image" for message in messages for part in message["content"])]
        np.testing.assert_allclose(mine.score(messages, given, ANSWER[:3]), theirs.score(messages, given, ANSWER[:3]), atol=1e-4)
        assert mine._cached == theirs._cached
