"""Every method at every site that it suits, in every family: the bundle says what Hugging Face's model says with the same tokens taken out live,
and those tokens are the ones that the method's numpy rule takes of what the graph saw."""
from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import harness
import live
import numpy as np
import pytest
import tiny
import tiny_anyres
import tiny_gemma
import tiny_qwen
import tiny_tiled
from exposed import Exposed, Seen, by_rule, follows
from PIL import Image

from edgecomp import methods
from edgecomp.compress import Cut, Recipe, Stage, compress, plan_name, planned
from edgecomp_export.families.base import Geometry
from edgecomp_export.reference import Reference
from edgecomp_export.verify import verify
from edgecomp_runtime import Bundle, Session
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.generation import Statistics
from edgecomp_runtime.rows import following

TOLERANCE = 1e-4  # absolute, of logits up to about 10
STEPS = 10
ASKED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is written here?"}]}]
TWICE = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "which of these\nis it?"}]}]
TURNS = harness.conversation(True)
ANSWER = [int(i) for i in np.random.default_rng(5).integers(20, 400, STEPS)]


def plan(*stages: str, compact: bool = False) -> Recipe:
    """A recipe from its stages as 'method[,parameter=value] keep site [windows]'."""
    found = []
    for stage in stages:
        name, keep, site, *windows = stage.split()
        method, *given = name.split(",")
        values = {key: int(value) for key, value in (one.split("=") for one in given)}
        rows, columns = map(int, windows[0].split("x")) if windows else (0, 0)
        found.append(Stage(methods.make(method, **values), keep, site, (rows, columns) if windows else None))
    return Recipe(tuple(found), "compact" if compact else "keep")


@dataclass(frozen=True)
class Case:
    """A tiny checkpoint, the plans that are put into it, and the prompts that they are asked: one with a picture and one with two."""
    maker: ModuleType
    variant: str
    plans: tuple[Recipe, ...]
    geometry: Geometry = field(default_factory=Geometry)
    twice: list[dict[str, Any]] = field(default_factory=lambda: TURNS)


CASES = {
    # CLIP with CLS, three decoder layers, grouped heads, tied: every method at each of its sites
    "llava": Case(tiny, "gqa-tied", (
        plan("random 9 decoder:1"), plan("stride 8 decoder:2", compact=True), plan("pool 9 decoder:1"), plan("grid 9 decoder:2"),
        plan("dart 10 decoder:1", compact=True), plan("divprune 9 decoder:2"), plan("fastv 7 decoder:2"), plan("sparsevlm 6 decoder:1"),
        plan("pyramiddrop 5 decoder:1", compact=True), plan("fastv 11 decoder:1 2x2", compact=True), plan("sparsevlm 11 decoder:2 1x3"),
        plan("dart,pivots=3 11 decoder:2 2x2"), plan("stride 6 decoder:0", compact=True), plan("pyramiddrop 9 decoder:0"),
        plan("cdpruner 8 projector"), plan("cdpruner,sign=-1 10 projector 2x2", compact=True), plan("random 9 projector"), plan("stride 8 projector"),
        plan("pool 6 projector", compact=True), plan("grid 9 projector"), plan("cls 7 projector"), plan("dart 12 projector 2x2"),
        plan("divprune 9 projector"), plan("hiprune 12 projector"), plan("vispruner 8 projector"), plan("tome 9 projector", compact=True),
        plan("random 9 encoder:0", compact=True), plan("stride 12 encoder:3"), plan("pool 9 encoder:1"), plan("grid 9 encoder:2"),
        plan("cls 9 encoder:2"), plan("dart 8 encoder:1 2x2"), plan("divprune 9 encoder:3"), plan("vispruner 8 encoder:1"),
        plan("visionzip 10 encoder:3", compact=True), plan("visionzip,columns=1 10 encoder:2"), plan("cls 10 encoder:1 2x2"),
        plan("cls 16 projector", "fastv 6 decoder:1", compact=True), plan("cls 16 encoder:2", "divprune 9 projector", "cdpruner 6 projector"),
        plan("pool 16 projector", "pool 4 decoder:1"), plan("random 16 encoder:0", "cls 9 encoder:2"),
        plan("random 20 encoder:1", "dart 12 decoder:1", "fastv 5 decoder:2"),
        plan("stride 20 projector", "stride 9 projector", compact=True),
        plan("cdpruner 12 projector", "dart 7 decoder:2", compact=True))),
    # SigLIP without CLS, untied
    "siglip": Case(tiny, "siglip-full", (
        plan("random 9 encoder:2"), plan("stride 9 encoder:4", compact=True), plan("visionzip,columns=1 10 encoder:4"), plan("hiprune 10 projector"),
        plan("dart 9 decoder:1"), plan("fastv 8 decoder:1", compact=True), plan("tome 10 projector"))),
    # windows in the first and third layer, logits bent within a cap
    "softcap": Case(tiny, "gemma2-softcap", (
        plan("fastv 7 decoder:2"), plan("sparsevlm 7 decoder:2", compact=True), plan("pyramiddrop,cuts=1 7 decoder:1"),
        plan("stride 5 decoder:1"), plan("dart 7 decoder:2", compact=True), plan("random 6 projector"), plan("cdpruner 6 projector"))),
    "qwen2": Case(tiny_qwen, "qwen2-sliding-tied", (
        plan("fastv 4 decoder:1"), plan("dart 5 decoder:1"), plan("random 4 projector", compact=True),
        plan("fastv 3 decoder:1", compact=True)), Geometry((56, 140))),
    "qwen2.5": Case(tiny_qwen, "qwen2.5-ragged", (
        plan("fastv 13 decoder:1"), plan("dart 13 decoder:1 2x3"), plan("pool 12 decoder:1"), plan("cdpruner 12 projector"),
        plan("random 11 projector", compact=True), plan("stride 20 projector", "fastv 7 decoder:1"), plan("sparsevlm 13 decoder:1"),
        plan("random 5 decoder:1", compact=True), plan("cdpruner 9 projector", compact=True),
        plan("stride 20 projector", "fastv 7 decoder:1", compact=True)),
        Geometry((168, 252))),
    # features go into the decoder behind layers 0 and 1: cuts before, between and after
    "qwen3": Case(tiny_qwen, "qwen3-wide-heads", (
        plan("cdpruner 4 projector"), plan("dart 4 decoder:1"), plan("fastv 4 decoder:2"), plan("pool 2 decoder:1"), plan("random 4 decoder:3"),
        plan("pyramiddrop 2 decoder:1"), plan("pool 5 projector", "fastv 3 decoder:1"), plan("dart 4 projector", compact=True),
        plan("stride 7 projector", "stride 5 projector", "sparsevlm 3 decoder:1"), plan("pool 2 decoder:1", compact=True),
        plan("random 3 decoder:0", compact=True), plan("pyramiddrop 2 decoder:1", compact=True)), Geometry((64, 160))),
    # tiles, each a run of its own in the prompt
    "idefics3": Case(tiny_tiled, "idefics3-2x2", (
        plan("fastv 23 decoder:1"), plan("dart 33 decoder:1", compact=True), plan("pool 20 decoder:1"), plan("cdpruner 21 projector"),
        plan("stride 40 projector", "fastv 17 decoder:1"), plan("random 40 decoder:1 2x2"),
        plan("stride 80 decoder:1")), Geometry(tiles=4)),
    "internvl": Case(tiny_tiled, "internvl-1x2", (
        plan("fastv 7 decoder:1"), plan("sparsevlm 7 decoder:1", compact=True), plan("stride 8 projector", "random 5 decoder:1"),
        plan("cdpruner 7 projector")), Geometry(tiles=2)),
    # tiles packed into one grid, with separators; a key for each head
    "llava_next": Case(tiny_anyres, "next-mistral", (
        plan("fastv 31 decoder:1"), plan("dart 88 decoder:1"), plan("stride 25 decoder:1", compact=True), plan("pool 20 decoder:1"),
        plan("cdpruner 26 projector"), plan("dart 40 projector", "fastv 11 decoder:1"),
        plan("hiprune 50 projector"), plan("tome 40 projector"))),
    # pictures see themselves, the first layer looks through a window
    "gemma3": Case(tiny_gemma, "gemma3", (
        plan("dart 7 decoder:1"), plan("random 6 decoder:1", compact=True), plan("pool 4 decoder:1"), plan("cdpruner 6 projector"),
        plan("pyramiddrop 5 decoder:1"), plan("stride 5 decoder:0"))),
    # the prompt sees itself, also beyond the window
    "paligemma": Case(tiny_gemma, "paligemma2", (
        plan("dart 7 decoder:1"), plan("random 6 decoder:1", compact=True), plan("pyramiddrop 9 decoder:1"),
        plan("cdpruner 6 projector", compact=True), plan("stride 9 encoder:1"), plan("visionzip,columns=1 8 encoder:2")), twice=TWICE),
}


def label(recipe: Recipe) -> str:
    return "+".join(f"{stage.method.name}-{stage.keep}-{stage.site}{'-windows' * bool(stage.windows)}" for stage in recipe.stages) \
        + "-compact" * (recipe.position == "compact")


def named(value: str | Recipe) -> str:
    return value if isinstance(value, str) else label(value)


PLANS = [pytest.param(case, recipe, id=f"{case}-{label(recipe)}") for case in CASES for recipe in CASES[case].plans]


class Recorded:
    """A loaded decoder that remembers what it was last fed with pictures, and what it gave."""

    def __init__(self, graph: Any):
        self.graph = graph
        self.feeds: dict[str, np.ndarray] = {}
        self.out: dict[str, np.ndarray] = {}

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        out: dict[str, np.ndarray] = self.graph.run(feeds)
        if any(key.startswith("visual_rows") and value.size for key, value in feeds.items()):
            self.feeds, self.out = feeds, out
        return out


class Made:
    """A case's checkpoint, bundle and oracle."""

    def __init__(self, case: Case, checkpoint: Path, neutral: Path, folder: Path, scenes: Path):
        self.case = case
        compress(neutral, folder / "bundle", case.plans)
        self.bundle = Bundle.open(folder / "bundle")
        self.live = live.Live(Reference(str(checkpoint), "eager", case.geometry))
        (folder / "exposed").mkdir()
        self.exposed = Exposed(self.bundle, folder / "exposed")
        canvas = self.bundle.manifest.image.canvas
        self.pictures = harness.pictures(canvas, scenes)
        if case.maker is tiny_qwen:  # which are made for exactly one size
            self.pictures = [picture.resize(canvas[::-1]) for picture in self.pictures]

    def prompt(self, session: Session, messages: list[dict[str, Any]]) -> tuple[list[int], list[np.ndarray], list[Image.Image]]:
        """The whole prompt's ids, as HF has them, each picture's rows among those, and the pictures."""
        manifest, given = self.bundle.manifest, self.given(messages)
        ids, _ = session._prepare(messages, given, False, len(ANSWER))
        spans = [tile.tokens for tile in manifest.vision.tiles] if manifest.vision.runs > 1 else [manifest.vision.tokens]
        every, number = list[int](), 0
        for i in ids:
            every += [i] * spans[number % len(spans)] if i == manifest.text.image_id else [i]
            number += i == manifest.text.image_id
        rows = np.flatnonzero(np.array(every) == manifest.text.image_id).reshape(len(given), -1)
        return every, list(rows), given

    def given(self, messages: list[dict[str, Any]]) -> list[Image.Image]:
        """As many pictures as a conversation has places."""
        return self.pictures[:sum(part["type"] == "image" for message in messages for part in message["content"])]


@pytest.fixture(scope="module")
def made(compiled: Callable[..., tuple[Path, Path]], scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Makes a case, once."""
    found: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in found:
            case = CASES[name]
            found[name] = Made(case, *compiled(case.maker, case.variant, **vars(case.geometry)), tmp_path_factory.mktemp(name), scenes)
        return found[name]
    return make


def told(session: Session, messages: list[dict[str, Any]], pictures: Sequence[Any]) -> np.ndarray:
    """The logits [1 + STEPS, V] of a prefill and a decode step for each id of ANSWER."""
    found = [session.score(messages, pictures, [])]
    ids, pixels = session._prepare(messages, pictures, False, len(ANSWER))
    rows, statistics = session._rows(ids, pixels, Statistics()), session._running
    assert statistics is not None
    for step, token in enumerate(ANSWER):
        row = following([token], session._embed([token]), rows.next_position + step, len(rows.positions))
        found.append(session._step(row, len(session._cached), statistics).copy())
    return np.concatenate(found)


@dataclass(frozen=True)
class Step:
    """A step by the numpy rule of what the graph saw: each picture's weights [K, N] and places [K]."""
    cut: Cut
    weights: list[np.ndarray]
    places: list[np.ndarray]

    @staticmethod
    def of(cut: Cut, seen: Seen, pictures: int) -> Step:
        made = [by_rule(cut, seen, picture) for picture in range(pictures)]
        return Step(cut, [weights for weights, _ in made], [places for _, places in made])


def imposed(steps: Sequence[Step]) -> list[live.Cut]:
    """The steps as the oracle makes them. What was cut in the tower leaves the decoder before its first layer."""
    inside_tower = [step for step in steps if step.cut.kind == "encoder"]
    found = [live.Cut("encoder", step.cut.layer, step.weights, step.places) for step in inside_tower]
    if inside_tower:
        tokens = inside_tower[0].cut.step.tokens.count
        places = [np.arange(tokens)] * len(inside_tower[0].places)
        for step in inside_tower:
            places = [before[now] for before, now in zip(places, step.places)]
        found.append(live.Cut("decoder", 0, [np.eye(tokens)[p] for p in places], places))
    rest = [step for step in steps if step.cut.kind != "encoder"]
    return [*found, *(live.Cut("decoder", step.cut.layer if step.cut.kind == "decoder" else 0, step.weights, step.places, follows(step.cut.step))
                      for step in rest)]


@pytest.mark.parametrize(("case", "recipe"), PLANS)
def test_the_bundle_is_hugging_face_pruned_live(made: Callable[[str], Made], case: str, recipe: Recipe) -> None:
    it = made(case)
    cuts = planned(recipe, it.bundle.manifest)
    for messages in (ASKED, it.case.twice):
        compare(it, recipe, cuts, messages)


def compare(it: Made, recipe: Recipe, cuts: Sequence[Cut], messages: list[dict[str, Any]]) -> None:
    """One prompt and ten decode steps."""
    outside, inside = [cut for cut in cuts if not cut.in_decoder], [cut for cut in cuts if cut.in_decoder]
    compact = recipe.position == "compact"
    session = Session(it.bundle, plan=plan_name(recipe, cuts), threads=1)
    session._decoder = decoder = Recorded(session._decoder)
    ids, rows, pictures = it.prompt(session, messages)
    mine, pixels = told(session, messages, pictures), it.live.pixels(pictures)
    seen = one_by_one([it.exposed.vision(outside, picture[None].numpy()) for picture in pixels]) if outside else []
    if inside:
        seen += it.exposed.decoder(inside, decoder.feeds, compact=compact)
    steps = [Step.of(cut, saw, len(pictures)) for cut, saw in zip(cuts, seen, strict=True)]
    for number, picture in enumerate(pictures):
        places = np.arange(it.bundle.manifest.vision.tokens)
        for step in steps[:len(outside)]:
            places = places[step.places[number]]
        assert session.visual_tokens(picture).kept.tolist() == places.tolist()
        for step in steps[len(outside):]:
            assert decoder.out[f"kept.{step.cut.layer}"][number].tolist() == step.places[number].tolist()
    text = len(ids) - 1 - rows[-1][-1]
    for step in steps[len(outside):]:
        if f"text_rows.{step.cut.layer}" in decoder.feeds:  # those behind the last picture, as many times as make eight
            before = len(ids) - len(pictures) * (len(rows[0]) - step.cut.step.tokens.count)
            expected = np.resize(np.arange(before - text, before), max(8, text))
            assert decoder.feeds[f"text_rows.{step.cut.layer}"].tolist() == expected.tolist()
    theirs = it.live.logits(ids, pixels, rows, imposed(steps), ANSWER, compact=compact)
    assert np.abs(theirs).max() > 0.5
    np.testing.assert_allclose(mine, theirs, atol=TOLERANCE, rtol=0)


def one_by_one(looks: Sequence[Sequence[Seen]]) -> list[Seen]:
    """What the steps saw of pictures that went through the vision graph one at a time."""
    return [Seen(np.concatenate([one.features for one in step]), [np.concatenate(signals) for signals in zip(*(one.signals for one in step))], None)
            for step in zip(*looks)]


@pytest.mark.parametrize("case", CASES)
def test_the_oracle_without_cuts_is_hugging_face_and_the_full_plan_is_it(made: Callable[[str], Made], case: str) -> None:
    it = made(case)
    session = Session(it.bundle, plan="full", threads=1)
    for messages in (ASKED, it.case.twice):
        ids, rows, pictures = it.prompt(session, messages)
        pixels = it.live.pixels(pictures)
        for theirs, mine in it.live.masks(ids, pixels):
            np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_allclose(told(session, messages, pictures), it.live.logits(ids, pixels, rows, [], ANSWER), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("recipe", [plan("fastv 25 decoder:1"), plan("dart 25 decoder:2 2x2", compact=True), plan("cdpruner 25 projector"),
                                    plan("cls 25 encoder:2", "pyramiddrop 25 decoder:1"), plan("divprune 25 encoder:1")], ids=label)
def test_keeping_all_changes_nothing(made: Callable[[str], Made], tmp_path: Path, recipe: Recipe) -> None:
    it = made("llava")
    name, = compress(it.bundle.path, tmp_path / "bundle", [recipe])
    pruned, full = Session(Bundle.open(tmp_path / "bundle"), plan=name, threads=1), Session(it.bundle, plan="full", threads=1)
    for messages in (ASKED, TURNS):
        _, _, pictures = it.prompt(full, messages)
        np.testing.assert_allclose(told(pruned, messages, pictures), told(full, messages, pictures), atol=1e-5, rtol=0)


@pytest.mark.parametrize("recipe", [plan("sparsevlm 6 decoder:1"), plan("dart 10 decoder:1", compact=True), plan("cdpruner 8 projector")], ids=label)
def test_a_text_of_few_rows_behind_the_picture_is_read_as_often_as_it_takes(made: Callable[[str], Made], recipe: Recipe) -> None:
    it = made("llava")
    said = "look at the number that is written here: "
    messages = [{"role": "user", "content": [{"type": "text", "text": said}, {"type": "image"}]}]
    compare(it, recipe, planned(recipe, it.bundle.manifest), messages)


@pytest.mark.parametrize(("case", "recipe"), [
    ("llava", plan("pool 9 decoder:1")), ("llava", plan("stride 20 projector", "stride 9 projector", compact=True)),
    ("llava", plan("cls 9 encoder:2")), ("softcap", plan("stride 5 decoder:1")), ("qwen2", plan("dart 5 decoder:1")),
    ("qwen2.5", plan("random 5 decoder:1", compact=True)), ("qwen3", plan("pyramiddrop 2 decoder:1", compact=True)),
    ("qwen3", plan("dart 4 decoder:1")), ("qwen3", plan("pool 5 projector", "fastv 3 decoder:1")), ("gemma3", plan("stride 5 decoder:0")),
    ("gemma3", plan("random 6 decoder:1", compact=True)), ("paligemma", plan("pyramiddrop 9 decoder:1")),
    ("llava_next", plan("dart 88 decoder:1"))], ids=named)
def test_verify_finds_them_the_same(made: Callable[[str], Made], case: str, recipe: Recipe) -> None:
    it = made(case)
    session = Session(it.bundle, plan=plan_name(recipe, planned(recipe, it.bundle.manifest)), threads=1)
    found, = verify(session, it.live.reference, [(it.pictures[0], "what is written here?")], most=STEPS)
    assert found.same and found.logits < TOLERANCE


FIRST = TURNS[:1]
CALLS = {"first": FIRST, "second": TURNS, "again": TURNS, "back": [*FIRST, {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
                                                                   {"role": "user", "content": [{"type": "text", "text": "and now?"}]}],
         "another": ASKED, "text": [{"role": "user", "content": [{"type": "text", "text": "nothing to see"}]}]}


@pytest.mark.parametrize(("case", "recipe"), [
    ("llava", plan("random 9 decoder:1")), ("llava", plan("stride 8 decoder:2", compact=True)), ("llava", plan("pool 9 decoder:1")),
    ("llava", plan("divprune 9 decoder:2")), ("llava", plan("cls 16 projector", "fastv 6 decoder:1", compact=True)),
    ("llava", plan("dart 10 decoder:1", compact=True)), ("llava", plan("cdpruner 8 projector")), ("qwen2.5", plan("pool 12 decoder:1")),
    ("qwen3", plan("random 4 decoder:3")), ("qwen2.5", plan("random 5 decoder:1", compact=True)),
    ("idefics3", plan("random 40 decoder:1 2x2")), ("gemma3", plan("random 6 decoder:1", compact=True)),
    ("softcap", plan("stride 5 decoder:1"))], ids=named)
def test_a_later_turn_reuses_what_it_may_and_says_the_same(made: Callable[[str], Made], case: str, recipe: Recipe) -> None:
    it = made(case)
    name = plan_name(recipe, planned(recipe, it.bundle.manifest))
    warm, reused = Session(it.bundle, plan=name, threads=1), dict[str, int]()
    for call, messages in CALLS.items():
        fresh = Session(it.bundle, plan=name, threads=1)
        pictures = it.given(messages)
        asked = warm.generate(messages, pictures, max_new_tokens=1)
        asked.finish()
        reused[call] = asked.statistics.reused_rows
        np.testing.assert_allclose(told(warm, messages, pictures), told(fresh, messages, pictures), atol=2e-5, rtol=0)
    first = len(it.prompt(warm, FIRST)[0]) - it.bundle.manifest.vision.tokens + warm._layout.rows
    if warm.plan.needs_prompt:
        assert [reused[call] for call in CALLS if call != "text"] == [0] * 5, "which tokens go on depends on the question"
    else:
        assert reused["first"] == 0 and first - 20 < reused["second"] <= first and reused["again"] > first and reused["back"] > first - 20


REFUSED = {
    ("siglip", "cls 9 projector"): "no CLS token", ("siglip", "cls 9 encoder:2"): "no CLS token", ("siglip", "visionzip 9 encoder:2"): "no CLS token",
    ("qwen2.5", "random 9 encoder:1"): "cannot be cut inside; cut at the projector", ("qwen3", "stride 4 encoder:1"): "cut at the projector",
    ("idefics3", "random 20 encoder:1"): "cut at the projector", ("internvl", "random 5 encoder:1"): "cut at the projector",
    ("llava_next", "random 20 encoder:1"): "cut at the projector", ("gemma3", "random 5 encoder:1"): "cut at the projector",
    ("llava_next", "cls 20 projector"): "no CLS token", ("qwen2.5", "tome 20 projector"): "cannot rank them",
    ("paligemma", "fastv 9 decoder:1"): "decoder layer 0 looks through a sliding window", ("softcap", "sparsevlm 9 decoder:1"): "a sliding window",
    ("gemma3", "fastv 9 decoder:1"): "cut before another layer, or use another method",
    ("softcap", "pyramiddrop 9 decoder:1"): "decoder layer 2 looks through a sliding window",
    ("llava", "fastv 9 decoder:0"): "there is none before decoder:0",
    ("qwen2.5", "tome 20 encoder:0"): "rotates by position", ("idefics3", "tome 20 encoder:0"): "tiles",
    ("gemma3", "tome 5 encoder:0"): "projector joins rows",
}


@pytest.mark.parametrize(("case", "stage"), REFUSED)
def test_where_a_method_cannot_stand_is_one_line_and_leaves_the_bundle(made: Callable[[str], Made], tmp_path: Path, case: str, stage: str) -> None:
    it = made(case)
    with pytest.raises(EdgecompError, match=re.escape(REFUSED[case, stage])) as refused:
        compress(it.bundle.path, tmp_path / "bundle", [plan(stage)])
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []

