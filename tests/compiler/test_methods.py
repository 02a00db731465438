"""Each method's graph does what its rule says, on real pictures: against the numpy rule, and against torch without it."""
from __future__ import annotations

import math
import os
import random
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from edgecomp import methods
from edgecomp.budget import Reduction, Tokens
from edgecomp.dialects import lowering
from edgecomp.ir.graphs import load, save
from edgecomp.methods.base import Method, Place, Selection
from edgecomp.methods.random import Random
from edgecomp.methods.reference import follow
from edgecomp.passes.signals import DECODER, VISION
from edgecomp.passes.splice import at_projector
from edgecomp_runtime import images
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.errors import EdgecompError, UnknownNameError

GRID = (24, 24)
TOKENS = 576
BUDGETS = (64, 128, 192)
SELECTIONS = ("random", "stride", "cls", "dart")
PICTURES = ("scene-03.jpg", "scene-17.jpg")
TIE = 1e-5  # relative; below it, rounding in fp32 may decide
FEATURES = 1e-4  # absolute, fp32


@pytest.fixture(scope="module")
def bundle(demo: Path) -> Bundle:
    return Bundle.open(demo)


@pytest.fixture(scope="module")
def pixels(bundle: Bundle, scenes: Path) -> np.ndarray:
    """[pictures, 3, H, W]"""
    return np.concatenate([images.preprocess(images.load(scenes / "images" / name), bundle.manifest.image).reshape(1, 3, 336, 336)
                           for name in PICTURES])


class Exposed:
    """The vision graph with a method spliced in, run once for all pictures with everything that the rule saw and did."""

    def __init__(self, bundle: Bundle, folder: Path, pixels: np.ndarray):
        self.bundle, self.folder, self.pixels = bundle, folder, pixels
        self.seen: dict[tuple[Method, int], dict[str, np.ndarray]] = {}
        os.link(bundle.file("graphs/weights.bin"), folder / "weights.bin")

    def __call__(self, method: Method, keep: int) -> dict[str, np.ndarray]:
        if (method, keep) not in self.seen:
            model, path = load(self.bundle.file("graphs/vision.onnx")), self.folder / "vision.onnx"
            at_projector(model, self.bundle.manifest.vision, Reduction.of(method, Tokens.of(self.bundle.manifest), keep), expose=True)
            lowering("onnxruntime")(model)
            save(model, path)
            self.seen[method, keep] = run(path, self.pixels)
        return self.seen[method, keep]


@pytest.fixture(scope="module")
def exposed(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory, pixels: np.ndarray) -> Exposed:
    return Exposed(bundle, tmp_path_factory.mktemp("exposed"), pixels)


@dataclass
class Clip:
    """What torch says: attention of the CLS token [pictures, N] at the layer that the projector reads, and the features."""
    cls_attention: np.ndarray
    features: np.ndarray


@pytest.fixture(scope="module")
def clip(checkpoint: Path, pixels: np.ndarray) -> Clip:
    from transformers import AutoModelForImageTextToText
    model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    assert model.config.vision_feature_layer == -2
    with torch.no_grad():
        seen = model.model.vision_tower(torch.from_numpy(pixels), output_attentions=True, output_hidden_states=True)
        features = model.model.multi_modal_projector(seen.hidden_states[-2][:, 1:])
    return Clip(seen.attentions[-2][:, :, 0, 1:].mean(1).numpy(), features.numpy())  # [B, H, Q, K] -> [B, N]


def run(graph: Path, pixels: np.ndarray) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, {"pixels": pixels})))


# the graph against the numpy rule

@pytest.mark.parametrize("keep", BUDGETS)
@pytest.mark.parametrize("name", SELECTIONS)
def test_the_graph_follows_the_rule_at_every_step(exposed: Exposed, name: str, keep: int) -> None:
    method = methods.make(name)
    assert isinstance(method, Selection)
    out = exposed(method, keep)
    clear = 0
    for picture in range(len(PICTURES)):
        signals = [out[s][picture].astype(np.float64) for s in method.signals("projector")]
        checks = follow(method.rule(Place(GRID, keep), out["features"][picture].astype(np.float64), *signals), out["order"][picture])
        assert all(c.agrees or c.margin < TIE for c in checks)
        clear += all(c.margin >= TIE for c in checks)
    assert clear, "every picture is nearly tied, so nothing was checked"


@pytest.mark.parametrize("keep", BUDGETS)
@pytest.mark.parametrize("name", SELECTIONS)
def test_the_tokens_are_the_chosen_features_bit_for_bit_and_in_raster_order(exposed: Exposed, name: str, keep: int) -> None:
    out = exposed(methods.make(name), keep)
    assert out["visual_tokens"].shape == (len(PICTURES), keep, out["features"].shape[2])
    for tokens, kept, order, features in zip(out["visual_tokens"], out["kept"], out["order"], out["features"]):
        assert list(kept) == sorted(set(order.tolist()))
        np.testing.assert_array_equal(tokens, features[kept])


def test_following_the_rule_shows_a_wrong_step(exposed: Exposed) -> None:
    """The check that the test above rests on: with one token swapped, the steps before it agree and its own does not."""
    method, place = methods.make("dart"), Place(GRID, 64)
    assert isinstance(method, Selection)
    out = exposed(method, 64)
    features, order = out["features"][0].astype(np.float64), out["order"][0].copy()
    order[20] = np.setdiff1d(np.arange(TOKENS), order)[0]  # eight pivots, then seven tokens each: the second pivot's
    assert [c.agrees for c in follow(method.rule(place, features), order)][:3] == [True, True, False]


# the graph against torch

def test_features_at_the_projector_are_those_of_hugging_face(exposed: Exposed, clip: Clip) -> None:
    np.testing.assert_allclose(exposed(methods.make("stride"), 64)["features"], clip.features, atol=FEATURES, rtol=0)


@pytest.mark.parametrize("keep", BUDGETS)
def test_cls_keeps_what_the_cls_token_of_hugging_face_looks_at_most(exposed: Exposed, clip: Clip, keep: int) -> None:
    out = exposed(methods.make("cls"), keep)
    np.testing.assert_allclose(out["cls_attention"], clip.cls_attention, atol=1e-5, rtol=0)
    clear = 0
    for kept, attention in zip(out["kept"], clip.cls_attention):
        ranked = np.sort(attention)[::-1]
        worst, left = ranked[keep - 1], ranked[keep]
        surely_in, surely_out = attention > worst * (1 + 1e-4), attention < left * (1 - 1e-4)
        chosen = np.isin(np.arange(TOKENS), kept)
        assert chosen[surely_in].all() and not chosen[surely_out].any()
        clear += surely_in.sum() >= keep - 1
    assert clear, "every picture is nearly tied, so nothing was checked"


def dart(features: torch.Tensor, keep: int, pivots: int) -> tuple[list[int], float]:
    """The docstring's rule as a plain loop: tokens by falling L1 norm are pivots, each takes its least similar ones.

    Returns:
        The kept tokens, ascending, and the smallest relative gap between a token that was taken and one that was not.
    """
    gaps = []

    def first(scores: dict[int, float], count: int) -> list[int]:
        ranked = sorted(scores, key=lambda i: (scores[i], i))
        if count < len(ranked):
            last, following = scores[ranked[count - 1]], scores[ranked[count]]
            gaps.append((following - last) / max(abs(last), abs(following)))
        return ranked[:count]

    norms = features.abs().sum(1)
    pivots = min(pivots, keep)
    found = first({i: -norms[i].item() for i in range(len(features))}, pivots)
    rest = keep - pivots
    for n, pivot in enumerate(found[:pivots]):
        if share := rest // pivots + (1 if n < rest % pivots else 0):
            alike = torch.nn.functional.cosine_similarity(features, features[pivot][None])
            found = found + first({i: alike[i].item() for i in range(len(features)) if i not in found}, share)
    return sorted(found), min(gaps)


@pytest.mark.parametrize(("pivots", "keep"), [(8, 64), (8, 128), (8, 192), (3, 64)])
def test_dart_keeps_what_a_plain_loop_keeps(exposed: Exposed, pivots: int, keep: int) -> None:
    out = exposed(methods.make("dart", pivots=pivots), keep)
    clear = 0
    for kept, features in zip(out["kept"], out["features"]):  # the graph's own features: selection is not stable under rounding
        expected, gap = dart(torch.from_numpy(features).double(), keep, pivots)
        assert gap < TIE or kept.tolist() == expected
        clear += gap >= TIE
    assert clear, "every picture is nearly tied, so nothing was checked"


@pytest.mark.parametrize("keep", BUDGETS)
def test_stride_keeps_every_nth_token(exposed: Exposed, keep: int) -> None:
    expected = [math.floor(Fraction(i * TOKENS, keep)) for i in range(keep)]
    assert exposed(methods.make("stride"), keep)["kept"].tolist() == [expected] * len(PICTURES)


@pytest.mark.parametrize(("keep", "seed"), [(64, 0), (128, 0), (192, 0), (64, 1)])
def test_random_keeps_what_python_samples(exposed: Exposed, keep: int, seed: int) -> None:
    expected = sorted(random.Random(seed).sample(range(TOKENS), keep))
    assert exposed(methods.make("random", seed=seed), keep)["kept"].tolist() == [expected] * len(PICTURES)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_is_the_same_sample_on_every_python(seed: int) -> None:
    """What Python 3.9 to 3.13 were seen to sample: a bundle compiled tomorrow keeps the places of today's."""
    golden = {0: [0, 4, 6, 8, 12, 15], 1: [1, 4, 9, 12, 13, 15], 2: [1, 2, 5, 10, 14, 15]}
    method = methods.make("random", seed=seed)
    assert isinstance(method, Random) and method.indices(Place((4, 4), 6)).tolist() == golden[seed]


def cell_means(features: torch.Tensor, high: int, wide: int) -> torch.Tensor:
    """Means [high * wide, D] of features [N, D] by area: each token is cut into so many parts that cells end between them."""
    down, across = math.lcm(GRID[0], high), math.lcm(GRID[1], wide)
    fine = features.reshape(*GRID, -1).repeat_interleave(down // GRID[0], 0).repeat_interleave(across // GRID[1], 1)
    tall, broad = down // high, across // wide
    return torch.stack([fine[i * tall: (i + 1) * tall, j * broad: (j + 1) * broad].mean((0, 1)) for i in range(high) for j in range(wide)])


@pytest.mark.parametrize(("keep", "cells"), [(64, (8, 8)), (128, (8, 16)), (192, (12, 16))])
def test_pool_averages_by_area(exposed: Exposed, keep: int, cells: tuple[int, int]) -> None:
    out = exposed(methods.make("pool"), keep)
    for tokens, kept, features in zip(out["visual_tokens"], out["kept"], torch.from_numpy(out["features"]).double()):
        np.testing.assert_allclose(tokens, cell_means(features, *cells), atol=1e-5, rtol=0)
        centres = [(math.floor(Fraction(2 * i + 1, 2 * cells[0]) * GRID[0]), math.floor(Fraction(2 * j + 1, 2 * cells[1]) * GRID[1]))
                   for i in range(cells[0]) for j in range(cells[1])]
        assert kept.tolist() == [row * GRID[1] + column for row, column in centres]


def test_pool_is_torch_average_pooling_where_cells_are_whole(exposed: Exposed) -> None:
    out = exposed(methods.make("pool"), 64)
    raster = torch.from_numpy(out["features"]).transpose(1, 2).reshape(len(PICTURES), -1, *GRID)  # [B, D, rows, columns]
    expected = torch.nn.functional.avg_pool2d(raster, 3).flatten(2).transpose(1, 2)
    np.testing.assert_allclose(out["visual_tokens"], expected, atol=1e-5, rtol=0)


# the graphs that a user's bundle holds

def lowered(bundle: Bundle, plan: str) -> Path:
    return bundle.file(bundle.manifest.plans[plan].variants["onnxruntime"]["vision"])


@pytest.mark.parametrize("name", [*SELECTIONS, "pool"])
def test_the_compiled_graph_is_the_exposed_one(bundle: Bundle, exposed: Exposed, pixels: np.ndarray, name: str) -> None:
    compiled = run(lowered(bundle, f"{name}-64"), pixels)
    assert list(compiled) == ["visual_tokens", "kept"]
    seen = exposed(methods.make(name), 64)
    np.testing.assert_array_equal(compiled["kept"], seen["kept"])
    np.testing.assert_allclose(compiled["visual_tokens"], seen["visual_tokens"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [*SELECTIONS, "pool"])
def test_a_budget_of_all_tokens_is_the_unpruned_model(bundle: Bundle, pixels: np.ndarray, name: str) -> None:
    whole, compiled = (run(lowered(bundle, plan), pixels[:1]) for plan in ("full", f"{name}-576"))
    assert compiled["kept"].tolist() == [list(range(TOKENS))]
    np.testing.assert_allclose(compiled["visual_tokens"], whole["visual_tokens"], atol=0 if name != "pool" else 1e-6, rtol=0)


# the table of methods

@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_says_what_it_is(name: str) -> None:
    method = methods.make(name)
    assert method.name == name
    assert method.taxonomy.kind in ("pruning", "merging")
    assert re.fullmatch(r"arXiv \d{4}\.\d{5}", method.taxonomy.paper)
    assert method.taxonomy.sites and type(method).__doc__
    for site in method.taxonomy.sites:
        known = DECODER if site == "decoder" else (*VISION, *DECODER)
        assert {signal.partition(":")[0] for signal in method.signals(site)} <= set(known)


def test_an_unknown_method_or_parameter_is_one_clear_line() -> None:
    with pytest.raises(UnknownNameError, match="dart"):
        methods.make("darts")
    with pytest.raises(EdgecompError, match=r"'dart' has no parameter 'pivot'; it has pivots$"):
        methods.make("dart", pivot=3)
    with pytest.raises(EdgecompError, match=r"'stride' has no parameter 'seed' \(it has none\)$"):
        methods.make("stride", seed=1)
    with pytest.raises(EdgecompError, match="at least one pivot, not 0"):
        methods.make("dart", pivots=0)


def test_cls_refuses_a_tower_without_a_cls_token(bundle: Bundle) -> None:
    model = load(bundle.file("graphs/vision.onnx"))
    with pytest.raises(EdgecompError, match="no CLS token"):
        at_projector(model, replace(bundle.manifest.vision, has_cls=False), Reduction.of(methods.make("cls"), Tokens.of(bundle.manifest), 64))
