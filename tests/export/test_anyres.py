"""LLaVA-NeXT and LLaVA-OneVision against Hugging Face: canvases, packing, newlines and budgets, through the whole bundle."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import tiny_anyres as tiny
import torch
import transformers
from conftest import manifest_of
from PIL import Image
from transformers.image_utils import load_image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from edgecomp import methods
from edgecomp.budget import places_of
from edgecomp.canvas import on_canvas
from edgecomp.compile import compile_model
from edgecomp.compress import Recipe, compress
from edgecomp.methods import reference as rules
from edgecomp.methods.base import BudgetError, Place
from edgecomp_export.families import family_of
from edgecomp_export.families.base import Geometry
from edgecomp_export.families.llava_next import Anyres, LlavaNext, pack
from edgecomp_export.families.llava_onevision import LlavaOnevision
from edgecomp_export.reference import Prompts, Reference
from edgecomp_export.verify import verify
from edgecomp_runtime import Bundle, Session, images
from edgecomp_runtime.errors import EdgecompError

FP32, FP16 = 1e-4, 5e-3
# of each case: variant, choices, and plans, with budgets that the tiles cannot share evenly, or all of the tiles without the newlines, or all
CASES: dict[str, tuple[str, dict[str, Any], list[tuple[str, str]]]] = {
    "next-2x2-unpadded": ("next-llama", {"image_size": (90, 120)},
                          [("dart", "29"), ("dart", "105"), ("dart", "100%"), ("stride", "37"), ("pool", "30"), ("random", "97")]),
    "next-2x2": ("next-llama", {"image_size": (120, 120)},
                 [("cls", "29"), ("hiprune", "40"), ("vispruner", "31"), ("fastv", "33"), ("cdpruner", "27")]),
    "next-overview": ("next-mistral", {"tiles": 0}, [("dart", "7"), ("pool", "16"), ("stride", "100%")]),
    "ov-scaled": ("ov-qwen2", {"image_size": (190, 230)}, [("dart", "25%"), ("pool", "12")]),
    "ov-square": ("ov-mha", {"tiles": 0}, []),
}


def family(variant: str, **choices: Any) -> Anyres:
    made = tiny.config(variant)
    found = family_of(made.model_type)(made, tiny.image_processor(made).to_dict(), Geometry(**choices))
    assert isinstance(found, Anyres)
    return found


class Made:
    """A tiny checkpoint and its bundle."""

    def __init__(self, case: str, compiled: Callable[..., tuple[Path, Path]], folder: Path):
        self.variant, choices, plans = CASES[case]
        self.config, self.geometry = tiny.config(self.variant), Geometry(**choices)
        self.checkpoint, neutral = compiled(tiny, self.variant, **choices)
        self.bundle = folder / "bundle"
        compress(neutral, self.bundle, [Recipe.of(methods.make(method), keep) for method, keep in plans])
        self.reference = Reference(str(self.checkpoint), "eager", self.geometry)

    def session(self, plan: str = "full") -> Session:
        return Session(Bundle.open(self.bundle), plan=plan)

    def pictures(self, scenes: Path) -> list[Image.Image]:
        """Two pictures of the shape that was compiled for: a real one and noise."""
        high, wide = self.geometry.image_size or (75, 100)
        noise = np.random.default_rng(1).integers(0, 256, (high, wide, 3), np.uint8)
        return [Image.open(scenes / "images/scene-03.jpg").convert("RGB").resize((wide, high)), Image.fromarray(noise)]

    def hf_inputs(self, messages: list[dict[str, Any]], pictures: list[Any]) -> dict[str, Any]:
        """What HF's own `generate` takes. Where HF's processor does not make pictures of one tile, HF's modules do by hand."""
        if self.geometry.tiles != 0:
            return tiny.hf_inputs(self.checkpoint, self.config, messages, pictures)
        if self.config.model_type == "llava_onevision":
            # one picture becomes one tile only among others, so that it is given twice and its second tile left out
            found = tiny.hf_inputs(self.checkpoint, self.config, messages, [*pictures, pictures[0]], one_tile=True)
            return {**found, "pixel_values": found["pixel_values"][:len(pictures)], "image_sizes": found["image_sizes"][:len(pictures)]}
        found = tiny.hf_inputs(self.checkpoint, self.config, messages, pictures)
        model, overviews, ids = self.reference.model.model, found["pixel_values"][:, 0], found["input_ids"][0].tolist()
        with torch.no_grad():
            tokens = model.multi_modal_projector(model.vision_tower(overviews, output_hidden_states=True).hidden_states[-1])
        packed = [torch.cat([each, model.image_newline[None]]) for each in tokens]
        prompt = [i for n, i in enumerate(ids) if i != tiny.IMAGE or ids[n - 1] != i for i in [i] * (len(packed[0]) if i == tiny.IMAGE else 1)]
        return {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.int64),
                "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=packed)}}


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, compiled: Callable[..., tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(request.param, compiled, tmp_path_factory.mktemp(request.param))


def test_visual_tokens_and_answers_are_as_in_transformers(made: Made, scenes: Path) -> None:
    session, seen = made.session(), made.pictures(scenes)
    pixels = [made.reference.pixels(picture) for picture in seen]
    theirs = made.reference.features(torch.cat([p for p in pixels if p is not None]))[0].numpy()
    mine = np.stack([session.visual_tokens(picture).tokens for picture in seen])
    assert mine.shape == theirs.shape == (2, session.bundle.manifest.vision.tokens, 64)
    assert np.abs(mine - theirs).max() < FP32
    for several in (False, True):
        messages, given = harness.conversation(several), seen if several else seen[:1]
        inputs = made.hf_inputs(messages, given)
        harness.assert_same(session, messages, given, harness.hugging_face(made.checkpoint, inputs), FP32)
        ids, run = session._prepare(messages, given, False, 1)[0], session.bundle.manifest.vision.tokens
        assert [i for each in ids for i in ([each] * run if each == tiny.IMAGE else [each])] == inputs["input_ids"][0].tolist()
    found, = verify(session, made.reference, [(seen[0], "what is this?")], most=10)
    assert found.same and found.logits < FP32


def test_compressed_plans_say_what_transformers_says_of_the_kept_tokens(made: Made, scenes: Path) -> None:
    for plan in [name for name in Bundle.open(made.bundle).manifest.plans if name != "full"]:
        for found in verify(made.session(plan), made.reference, [(p, "what is this?") for p in made.pictures(scenes)], most=10):
            assert found.same and found.logits < FP32


def test_each_tile_keeps_its_quota_by_the_rule(made: Made, scenes: Path) -> None:
    """And the places of tiles that interleave are ascending, newlines left out; a budget of everything leaves them in."""
    full = made.session()
    vision, picture = full.bundle.manifest.vision, made.pictures(scenes)[0]
    before = full.visual_tokens(picture).tokens
    for name, plan in full.bundle.manifest.plans.items():
        if any(methods.make(step.method).signals(step.site.partition(":")[0]) for step in plan.steps):
            continue  # the rule reads more than the features
        session, expected = made.session(name), [(before, np.arange(vision.tokens))]
        after = session.visual_tokens(picture)
        if plan.visual_tokens < vision.tokens:
            assert sum(plan.tile_tokens) == plan.visual_tokens == len(after.kept)
            free = [quota for tile, quota in zip(vision.tiles, plan.tile_tokens) if quota < tile.tokens]
            assert not free or max(plan.tile_tokens) - min(free) <= 1
            assert list(plan.tile_tokens[1:]) == sorted(plan.tile_tokens[1:], reverse=True), "here: details are of one size"
            method = methods.make(plan.steps[0].method)
            expected = []
            for tile, quota in zip(vision.tiles, plan.tile_tokens):
                tokens, kept = rules.compress(method, Place((tile.rows, tile.columns), quota), before[places_of(tile)])
                expected.append((tokens, places_of(tile)[kept]))
        order = np.argsort(np.concatenate([kept for _, kept in expected]))
        np.testing.assert_array_equal(after.kept, np.concatenate([kept for _, kept in expected])[order])
        np.testing.assert_allclose(after.tokens, np.concatenate([tokens for tokens, _ in expected])[order], atol=1e-5)


@pytest.mark.parametrize("made", ["next-2x2"], indirect=True)
def test_each_tile_keeps_what_its_own_cls_token_looks_at(made: Made, scenes: Path) -> None:
    session, picture = made.session("cls-29"), made.pictures(scenes)[0]
    pixels = made.reference.pixels(picture)
    assert pixels is not None
    with torch.no_grad():
        seen = made.reference.model.model.vision_tower(pixels[0], output_attentions=True)
    looked = seen.attentions[made.config.vision_feature_layer][:, :, 0, 1:].mean(1)  # [tiles, n]
    kept, plan = set(session.visual_tokens(picture).kept.tolist()), session.plan
    for tile, quota, attention in zip(session.bundle.manifest.vision.tiles, plan.tile_tokens, looked):
        best = attention.argsort(descending=True)[:quota].numpy()
        assert kept & set(places_of(tile).tolist()) == set(places_of(tile)[best].tolist())


def test_budgets_between_the_tiles_tokens_and_all_are_refused(made: Made, tmp_path: Path) -> None:
    vision = Bundle.open(made.bundle).manifest.vision
    tokens = sum(tile.tokens for tile in vision.tiles)
    assert tokens < vision.tokens, "there are newlines"
    for keep in [vision.tokens - 1] * (tokens < vision.tokens - 1) + [tokens + 1] * (tokens + 1 < vision.tokens) + list(range(1, len(vision.tiles))):
        with pytest.raises(BudgetError, match=f"choose {len(vision.tiles)} to {tokens}, or all {vision.tokens}"):
            compress(made.bundle, tmp_path / "bundle", [Recipe.of(methods.make("stride"), str(keep))])


@pytest.mark.parametrize("case", ["next-2x2-unpadded", "ov-scaled"])
def test_fp16_stays_near_fp32(case: str, checkpoint: Path, tmp_path: Path, scenes: Path) -> None:
    # smaller weights than elsewhere: logits of size about 3, whose fp16 steps are of 2e-3
    made = object.__new__(Made)
    made.variant, choices, _ = CASES[case]
    made.config, made.geometry, made.checkpoint = tiny.config(made.variant), Geometry(**choices), tmp_path / "checkpoint"
    tiny.make(made.variant, made.checkpoint, checkpoint, torch.float16, 0.12)
    compile_model(str(made.checkpoint), tmp_path / "bundle", [], precision="fp16", **choices)
    session, seen, messages = Session(Bundle.open(tmp_path / "bundle")), made.pictures(scenes), harness.conversation(True)
    ids, logits = harness.hugging_face(made.checkpoint, made.hf_inputs(messages, seen), 20)
    mine = session.score(messages, seen, ids[:-1]).astype(np.float32)
    assert 1 < np.abs(logits).max() < 10
    assert np.abs(mine - logits).max() < FP16
    assert np.mean(mine.argmax(1) == ids) >= 0.95


def sizes() -> list[tuple[int, int]]:
    rng = np.random.default_rng(3)
    shapes = [(70, 70), (140, 140), (1, 1), (1, 9), (9, 1), (480, 640), (1080, 1920), (333, 500), (71, 140), (210, 69), (900, 301), (60, 200)]
    return shapes + [(int(size * aspect), int(size / aspect)) for size, aspect in np.exp(rng.uniform((3, -0.8), (6.5, 0.8), (60, 2)))]


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_packing_is_as_in_transformers_for_pictures_of_any_shape(variant: str, checkpoint: Path) -> None:
    made = tiny.config(variant)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(made)
    ratio = {"vision_aspect_ratio": made.vision_aspect_ratio} if made.model_type == "llava_onevision" else {}
    prompts, refused = tiny.processor(made, transformers.AutoTokenizer.from_pretrained(checkpoint)), 0
    side, strategy = made.vision_config.image_size, made.vision_feature_select_strategy
    for number, size in enumerate(sizes()):
        torch.manual_seed(number)
        chosen = family(variant, image_size=size)
        count = prompts._get_number_of_features(*size, side, side) - (strategy == "default")
        try:
            packing = chosen.packing
        except EdgecompError as error:
            assert "so long that no row of tokens is left" in str(error)
            assert max(size) > 4 * min(size)
            refused += 1
            continue
        tiles = packing.tiles[0] * packing.tiles[1]
        tokens, newline = torch.randn(2, 1 + tiles, packing.side**2, 4), torch.randn(4)
        further = ratio or {"vision_feature_select_strategy": strategy}
        theirs, _ = model.model.pack_image_features(list(tokens), [size] * 2, image_newline=newline, **further)
        mine = pack(tokens.flatten(0, 1), newline, packing)
        assert len(mine[0]) == chosen.tokens() == count
        assert (mine - torch.stack(theirs)).abs().max() < 1e-5
        # the tiles say where each tile's tokens went; what is in none is a newline
        labels = torch.arange(1.0, 2 + tiles)[:, None, None].expand(-1, packing.side**2, 1)
        where = pack(labels, torch.zeros(1), packing)[0, :, 0].numpy()
        parts = [places_of(tile) for tile in chosen.tiles()]
        assert sorted([*np.concatenate(parts), *np.flatnonzero(where == 0)]) == list(range(len(where)))
        assert packing.scaled or all(len(set(where[part])) == 1 for part in parts)
    assert refused < 10


def odd_pictures(rng: np.random.Generator) -> list[Image.Image]:
    colour = [Image.fromarray(rng.integers(0, 256, (high, wide, 3), np.uint8))
              for high, wide in [(2, 2), (3, 7), (90, 60), (61, 122), (122, 61), (171, 173), (31, 77), (480, 640), (150, 600), (421, 211)]]
    grey, alpha = Image.fromarray(rng.integers(0, 256, (50, 70), np.uint8)), Image.fromarray(rng.integers(0, 256, (66, 44, 4), np.uint8))
    return [*colour, grey, alpha, colour[2].quantize(16), grey.convert("1"), alpha.resize((30, 90))]


@pytest.mark.parametrize("variant", ["next-llama", "ov-qwen2"])
def test_preprocessing_is_as_in_transformers(variant: str, scenes: Path, tmp_path: Path) -> None:
    theirs, real = tiny.image_processor(tiny.config(variant)), sorted((scenes / "images").glob("*.jpg"))[:6]
    long = [Image.fromarray(np.random.default_rng(5).integers(0, 256, shape, np.uint8)) for shape in [(1, 300, 3), (300, 1, 3)]]
    for number, source in enumerate([*real, *odd_pictures(np.random.default_rng(2)), *long]):
        path = source
        if isinstance(source, Image.Image):
            path = tmp_path / f"odd-{number}.png"
            source.save(path)
        picture, hugging_face = images.load(path), load_image(str(path))
        for choices in [{"tiles": 0}] + [{"image_size": (picture.height * n, picture.width * n)} for n in (1, 3)] * (source not in long):
            chosen = family(variant, **choices)
            pixels = chosen.hf_preprocess(theirs, hugging_face)
            assert (pixels is None) == (choices.get("image_size", picture.size[::-1]) != picture.size[::-1] and not chosen.agrees(picture.size[::-1]))
            if pixels is not None:
                difference = np.abs(images.preprocess(picture, chosen.image_info()) - pixels[0].numpy()).max()
                assert difference < 1e-5 or (source in long and variant == "ov-qwen2" and difference < 1), "a long one is padded afterwards"


def test_pictures_of_another_shape_are_fitted_into_what_was_compiled_for() -> None:
    chosen, white = family("next-llama", image_size=(90, 120)), (255, 255, 255)
    info = chosen.image_info()
    assert (info.canvas, info.box, chosen.packing.first, chosen.packing.size) == ((140, 140), (105, 140), (1, 0), (8, 10))
    for size, high, wide in [((120, 90), 105, 79), ((1, 300), 1, 140), ((90, 120), 105, 140), ((1000, 1), 105, 1), ((91, 120), 105, 139)]:
        fitted = np.asarray(images.fit(Image.new("RGB", size[::-1], white), info))[..., 0]
        assert fitted.shape == (140, 140)
        assert (fitted == 255).any(1).sum() == high and (fitted == 255).any(0).sum() == wide
        assert chosen.agrees(size) == (size == (90, 120))
        # and what HF drops as black is black
        assert not fitted[:14].any() and not fitted[-14:].any()
    assert chosen.agrees((180, 240)) and chosen.agrees((45, 60)) is False, "a small picture has another canvas"


@pytest.mark.parametrize("variant,choices,tiles,tokens", [
    ("next-llama", {}, (2, 2), 25 + 10 * 11), ("next-llama", {"tiles": 2}, (1, 2), 25 + 5 * 11), ("next-llama", {"tiles": 3}, (1, 3), 25 + 5 * 16),
    ("next-llama", {"tiles": 4, "image_size": (300, 300)}, (2, 2), 25 + 10 * 11), ("next-llama", {"tiles": 0}, (1, 1), 26),
    ("next-llama", {"image_size": (70, 140)}, (1, 2), 25 + 5 * 11),
    ("ov-mha", {}, (2, 2), 25 + 10 * 11), ("ov-mha", {"tiles": 1}, (1, 1), 25 + 5 * 6),
    ("ov-mha", {"tiles": 12}, (3, 4), 25 + 12 * 18), ("ov-mha", {"tiles": 0}, (1, 1), 26)])
def test_choices(variant: str, choices: dict[str, Any], tiles: tuple[int, int], tokens: int) -> None:
    chosen = family(variant, **choices)
    assert chosen.image_info().tiles == tiles
    assert chosen.image_info().count == (1 if choices.get("tiles") == 0 else tiles[0] * tiles[1] + 1)
    assert chosen.tokens() == tokens


@pytest.mark.parametrize("variant,choices,message", [
    ("next-llama", {"tiles": 5}, "--tiles 5 is none of the numbers of tiles that this model knows: choose 2, 3, 4, or --no-tiles"),
    ("next-llama", {"tiles": 2, "image_size": (90, 90)}, "pictures of 90x90 have 4 tiles here, not 2: leave out --tiles or --image-size"),
    ("next-llama", {"tiles": 0, "image_size": (90, 90)}, "--image-size has no effect with --no-tiles"),
    ("next-mistral", {"image_size": (1, 900)}, "pictures of 1x900 are so long that no row of tokens is left"),
    ("next-llama", {"image_size": (0, 9)}, "--image-size 0x9 is empty"),
])
def test_choices_that_cannot_be_met(variant: str, choices: dict[str, Any], message: str) -> None:
    with pytest.raises(EdgecompError) as raised:
        family(variant, **choices).image_info()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_kept_tokens_are_shown_on_the_canvas() -> None:
    unpadded = family("next-llama", image_size=(90, 120))
    manifest = manifest_of(unpadded.tiles(), unpadded.tokens(), cut=(2, 2), overview="first")
    rows = [25 + row * 11 + column for row in range(8) for column in range(10)]
    assert on_canvas(manifest, [0, 24, *rows, 25 + 10]) == ((8, 10), list(range(80)))
    scaled = family("ov-qwen2", image_size=(190, 230))
    assert scaled.packing.scaled == (6, 7)
    manifest = manifest_of(scaled.tiles(), scaled.tokens(), cut=scaled.image_info().tiles, overview="first")
    assert on_canvas(manifest, [3, 16, 16 + 7, 16 + 8, 63, 62]) == ((6, 7), [0, 7, 41])


def test_prompts_need_no_weights(checkpoint: Path, tmp_path: Path) -> None:
    folder = tiny.make("next-llama", tmp_path / "checkpoint", checkpoint)
    prompts = Prompts(str(folder), Geometry((90, 120)))
    assert prompts.ids("what?", 2, [prompts.family.tokens()]).count(tiny.IMAGE) == 2 * prompts.family.tokens()


def test_checkpoints_that_do_not_fit_together_are_refused() -> None:
    made = tiny.config("ov-mha")
    settings = tiny.image_processor(made).to_dict()
    with pytest.raises(EdgecompError, match="do not both have 350x70"):
        LlavaOnevision(made, {**settings, "image_grid_pinpoints": [*settings["image_grid_pinpoints"], [350, 70]]}).image_info()
    with pytest.raises(EdgecompError, match="image_grid_pinpoints has 100x70, which 70x70 tiles do not fill"):
        made.image_grid_pinpoints = [[100, 70]]
        LlavaOnevision(made, {**settings, "image_grid_pinpoints": None}).image_info()
    made = tiny.config("ov-mha")
    made.vision_aspect_ratio = "pad"
    with pytest.raises(EdgecompError, match="vision_aspect_ratio 'pad' is not anyres_max_ and a number"):
        LlavaOnevision(made, settings).image_info()
    next_settings = tiny.image_processor(tiny.config("next-llama")).to_dict()
    with pytest.raises(EdgecompError, match="resizes tiles to 90 before it cuts 70x70"):
        LlavaNext(tiny.config("next-llama"), {**next_settings, "size": {"shortest_edge": 90}}).image_info()
