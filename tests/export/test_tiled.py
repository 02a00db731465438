"""Idefics3, SmolVLM and InternVL against Hugging Face: tiles, their markers and budgets, through the whole bundle."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import tiny_tiled as tiny
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import Idefics3Config, InternVLConfig, SmolVLMConfig

from edgecomp import methods
from edgecomp.compile import compile_model
from edgecomp.compress import Recipe, compress
from edgecomp.methods import reference as rules
from edgecomp.methods.base import Place
from edgecomp_export.families.base import Family, Geometry
from edgecomp_export.families.idefics3 import Idefics3, layout, patch_places
from edgecomp_export.families.internvl import InternVL
from edgecomp_export.families.smolvlm import SmolVLM
from edgecomp_export.reference import Prompts, Reference
from edgecomp_export.verify import verify
from edgecomp_runtime import Bundle, Session, images
from edgecomp_runtime.errors import EdgecompError

FP32, FP16 = 1e-4, 5e-3
# budgets that the tiles cannot share evenly; pool's are of cells that a tile's grid has on both sides of the remainder
RECIPES = {"idefics3-2x2": [("dart", "33"), ("pool", "43")], "smolvlm-2x3": [("dart", "17")], "smolvlm": [("dart", "25%"), ("pool", "4")],
           "internvl-1x2": [("stride", "8"), ("dart", "7")], "internvl-qwen3": [("pool", "36%")]}


class Made:
    """A tiny checkpoint and its bundle."""

    def __init__(self, name: str, compiled: Callable[..., tuple[Path, Path]], folder: Path):
        self.name, self.geometry = name, tiny.VARIANTS[name].geometry
        self.checkpoint, neutral = compiled(tiny, name, **vars(self.geometry))
        self.bundle = folder / "bundle"
        compress(neutral, self.bundle, [Recipe.of(methods.make(m), k) for m, k in RECIPES[name]])
        self.reference = Reference(str(self.checkpoint), "eager", self.geometry)

    def session(self, plan: str = "full") -> Session:
        return Session(Bundle.open(self.bundle), plan=plan)


@pytest.fixture(scope="module", params=RECIPES)
def made(request: pytest.FixtureRequest, compiled: Callable[..., tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(request.param, compiled, tmp_path_factory.mktemp(request.param))


def test_visual_tokens_and_answers_are_as_in_transformers(made: Made, scenes: Path) -> None:
    session, family = made.session(), made.reference.family
    info = session.bundle.manifest.image
    seen = harness.pictures(info.canvas, scenes)
    theirs = made.reference.features(torch.cat([made.reference.pixels(p) for p in seen]))[0].numpy()
    mine = np.stack([session.visual_tokens(p).tokens for p in seen])
    assert mine.shape == (2, family.tokens(), 64)
    assert np.abs(mine - theirs).max() < FP32
    for several in (False, True):
        messages, given = harness.conversation(several), seen if several else seen[:1]
        expected = harness.hugging_face(made.checkpoint, tiny.hf_inputs(made.checkpoint, made.name, family, messages, given))
        harness.assert_same(session, messages, given, expected, FP32)
        said = session.generate(messages, given, max_new_tokens=harness.STEPS)
        said.finish()
        assert said.token_ids == (ids[:ids.index(2)] if 2 in (ids := expected[0]) else ids)


def test_prompts_have_the_ids_of_transformers(made: Made, scenes: Path) -> None:
    session, reference = made.session(), made.reference
    seen, vision = harness.pictures(session.bundle.manifest.image.canvas, scenes), session.bundle.manifest.vision
    for several in (False, True):
        messages, count = harness.conversation(several), 1 + several
        theirs = tiny.hf_inputs(made.checkpoint, made.name, reference.family, messages, seen[:count])["input_ids"][0].tolist()
        mine, _ = session._prepare(messages, seen[:count], False, 1)
        number, run = reference.image_id, vision.tokens // vision.runs
        assert [i for each in mine for i in ([each] * run if each == number else [each])] == theirs
        if not several:
            assert reference.ids("what is this?", 1, [run] * vision.runs) == theirs


def test_compressed_plans_say_what_transformers_says_of_the_kept_tokens(made: Made, scenes: Path) -> None:
    info = made.session().bundle.manifest.image
    for plan in [p for p in Bundle.open(made.bundle).manifest.plans if p != "full"]:
        for found in verify(made.session(plan), made.reference, [(p, "what is this?") for p in harness.pictures(info.canvas, scenes)], most=10):
            assert found.same and found.logits < FP32


def test_each_tile_keeps_its_quota_by_the_rule(made: Made, scenes: Path) -> None:
    full = made.session()
    tiles, seen = full.bundle.manifest.vision.tiles, harness.pictures(full.bundle.manifest.image.canvas, scenes)
    for name, plan in full.bundle.manifest.plans.items():
        if not plan.steps:
            continue
        quotas, session, step = plan.tile_tokens, made.session(name), plan.steps[0]
        assert sum(quotas) == step.keep == plan.visual_tokens
        assert max(quotas) - min(quotas) <= 1
        assert quotas[-1] == max(quotas), "the overview, which is last, has the remainder first"
        assert list(quotas[:-1]) == sorted(quotas[:-1], reverse=True)
        for picture in seen:
            before, after = full.visual_tokens(picture).tokens, session.visual_tokens(picture)
            expected: list[tuple[NDArray[Any], NDArray[np.int64]]] = []
            for tile, quota in zip(tiles, quotas):
                part = before[tile.start:tile.start + tile.tokens]
                tokens, kept = rules.compress(methods.make(step.method), Place((tile.rows, tile.columns), quota), part)
                expected.append((tokens, kept + tile.start))
            np.testing.assert_array_equal(after.kept, np.concatenate([kept for _, kept in expected]))
            np.testing.assert_allclose(after.tokens, np.concatenate([tokens for tokens, _ in expected]), atol=1e-5)


def test_preprocessing_is_as_in_transformers(made: Made, scenes: Path, tmp_path: Path) -> None:
    info = made.session().bundle.manifest.image
    rng, same = np.random.default_rng(2), 0
    for number, source in enumerate([*sorted((scenes / "images").glob("*.jpg"))[:4], *odd_pictures(rng), *harness.pictures(info.canvas, scenes)]):
        path = source
        if isinstance(source, Image.Image):
            path = tmp_path / f"odd-{number}.png"
            source.save(path)
        mine, theirs = images.preprocess(images.load(path), info), made.reference.pixels(path)
        if theirs is None:  # cut up in another way there: compare what was cut up, which has the canvas's shape
            fitted = images.fit(images.load(path), info)
            canvas = made.reference.pixels(fitted)
            assert canvas is not None
            mine, theirs = (mine, canvas) if info.overview == "last of canvas" else (mine[:-1], canvas[:, :-1])
        else:
            same += 1
        assert np.abs(mine - theirs[0].numpy()).max() < 1e-5
    assert same > 4, "many are cut up in the same way, overview and all"


def odd_pictures(rng: np.random.Generator) -> list[Image.Image]:
    colour = [Image.fromarray(rng.integers(0, 256, (high, wide, 3), np.uint8))
              for high, wide in [(1, 300), (300, 1), (2, 2), (90, 60), (60, 90), (61, 122), (122, 61), (171, 173), (60, 90), (31, 777)]]
    grey, alpha = Image.fromarray(rng.integers(0, 256, (50, 70), np.uint8)), Image.fromarray(rng.integers(0, 256, (66, 44, 4), np.uint8))
    return [*colour, grey, alpha, colour[4].quantize(16), grey.convert("1"), alpha.resize((9, 300))]


@pytest.mark.parametrize("name", ["idefics3-2x2", "smolvlm", "internvl-llama"])
def test_fp16_stays_near_fp32(name: str, checkpoint: Path, tmp_path: Path, scenes: Path) -> None:
    # smaller weights than elsewhere: logits of size about 3, whose fp16 steps are of 2e-3
    folder = tiny.make(name, tmp_path / "checkpoint", checkpoint, torch.float16, 0.1)
    geometry = tiny.VARIANTS[name].geometry
    compile_model(str(folder), tmp_path / "bundle", [], precision="fp16", tiles=geometry.tiles, image_size=geometry.image_size)
    session, family = Session(Bundle.open(tmp_path / "bundle")), Prompts(str(folder), geometry).family
    seen, messages = harness.pictures(session.bundle.manifest.image.canvas, scenes), harness.conversation(True)
    ids, logits = harness.hugging_face(folder, tiny.hf_inputs(folder, name, family, messages, seen), 20)
    mine = session.score(messages, seen, ids[:-1]).astype(np.float32)
    assert 1 < np.abs(logits).max() < 10
    assert np.abs(mine - logits).max() < FP16
    assert np.mean(mine.argmax(1) == ids) >= 0.95


@pytest.mark.parametrize("kind,vision,whole,processor,geometry,tokens", [
    (Idefics3, {"image_size": 364, "patch_size": 14}, {"scale_factor": 2}, {"max_image_size": {"longest_edge": 364}}, Geometry((728, 1092)), 7 * 169),
    (SmolVLM, {"image_size": 512, "patch_size": 16}, {"scale_factor": 4}, {"max_image_size": {"longest_edge": 512}}, Geometry(tiles=12), 13 * 64),
    (SmolVLM, {"image_size": 384, "patch_size": 14}, {"scale_factor": 3}, {"max_image_size": {"longest_edge": 384}}, Geometry(tiles=0), 81),
    (InternVL, {}, {}, {"size": {"height": 448, "width": 448}}, Geometry(tiles=6), 7 * 256),
], ids=["Idefics3-8B", "SmolVLM-256M", "SmolVLM-2.2B", "InternVL3"])
def test_published_shapes_have_their_published_tokens(kind: type[Family], vision: dict[str, Any], whole: dict[str, Any], processor: dict[str, Any],
                                                      geometry: Geometry, tokens: int) -> None:
    config = {Idefics3: Idefics3Config, SmolVLM: SmolVLMConfig, InternVL: InternVLConfig}[kind](vision_config=vision, **whole)
    family = kind(config, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "special_tokens": {}, **processor}, geometry)
    assert family.tokens() == tokens
    assert len(family.texts()) == (2 if kind is InternVL else family.image_info().count + 1)


@pytest.mark.parametrize("size,count,expected", [
    (None, None, (1, 1)), (None, 0, (1, 1)), (None, 1, (1, 1)), (None, 2, (1, 2)), (None, 3, (1, 3)), (None, 4, (2, 2)), (None, 6, (2, 3)),
    (None, 12, (3, 4)), (None, 10, (2, 5)), (None, 36, (6, 6)), ((64, 192), None, (1, 3)), ((320, 64), None, (5, 1)), ((128, 192), 6, (2, 3)),
    ((64, 64), 0, (1, 1))])
def test_choices_of_tiles(size: tuple[int, int] | None, count: int | None, expected: tuple[int, int]) -> None:
    assert layout(Geometry(size, count), 64, 6) == expected


@pytest.mark.parametrize("size,count,message", [
    ((100, 64), None, "--image-size 100x64 is not made of whole tiles of 64x64 pixels, at most 6x6: choose 128x64"),
    ((640, 64), None, "at most 6x6: choose 384x64"),
    ((10, 10), None, "choose 64x64"),
    ((128, 192), 4, "--image-size 128x192 makes 2x3 tiles of 64x64 pixels, and --tiles 4 asks for 4: leave one of them out"),
    ((128, 192), 0, "and --no-tiles asks for 1"),
    (None, 5, "--tiles 5 makes no grid of at most 6x6 tiles that is at most 3 times as wide as high: choose 4 or 6, or the grid itself"),
    (None, 14, "choose 12 or 15"),
    (None, 40, "choose 36, or the grid itself"),
])
def test_choices_that_cannot_be_met(size: tuple[int, int] | None, count: int | None, message: str) -> None:
    with pytest.raises(EdgecompError) as raised:
        layout(Geometry(size, count), 64, 6)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("side,trained", [(n, n) for n in (2, 5, 16, 26, 27, 32, 49, 64)] + [(26, 27), (32, 27), (27, 32), (6, 5)])
def test_patches_take_the_places_of_transformers(side: int, trained: int) -> None:
    from transformers import Idefics3VisionConfig
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings
    embeddings = Idefics3VisionEmbeddings(Idefics3VisionConfig(image_size=2 * trained, patch_size=2, hidden_size=1))
    with torch.no_grad():
        embeddings.patch_embedding.weight.zero_()
        embeddings.patch_embedding.bias.zero_()
        embeddings.position_embedding.weight.copy_(torch.arange(trained**2)[:, None])
        theirs = embeddings(torch.zeros(1, 3, 2 * side, 2 * side), torch.ones(1, side, side, dtype=torch.bool))
    assert patch_places(side, trained).tolist() == theirs[0, :, 0].tolist()


def test_a_tower_whose_patches_do_not_shuffle_is_refused() -> None:
    config = Idefics3Config(vision_config={"image_size": 64, "patch_size": 8})
    with pytest.raises(EdgecompError, match="tiles of 40 pixels have 5 patches of 8 on a side, which scale_factor 2 does not divide"):
        Idefics3(config, {"max_image_size": {"longest_edge": 40}}).grid_side()


@pytest.mark.parametrize("changes,message", [
    ({"vision_feature_layer": [-1, -2]}, r"vision_feature_layer is \[-1, -2\]"),
    ({"vision_feature_select_strategy": "full"}, "leaves the CLS row among the patches"),
])
def test_internvl_selections_that_transformers_cannot_compute_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EdgecompError, match=message):
        InternVL(InternVLConfig(**changes), {}).tower()
