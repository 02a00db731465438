"""The session's own part of a model, on made-up bundles: what it feeds, in which chunks, what it reuses, which prompts it takes.

The decoder is a toy in numpy that keeps a cache as a real one does, so that a segment cut in two, a row reused that should not be,
or a wrong position changes its logits. What it should have said is computed in one go, without a cache, over the rows of the whole prompt.
"""
from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, manifest_of
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgecomp.writer import writing
from edgecomp_runtime import Bundle, InputError, Session
from edgecomp_runtime.images import preprocess
from edgecomp_runtime.manifest import GraphInfo, Manifest, PlanInfo, StepInfo, TableInfo, TensorInfo, TextInfo, TileInfo
from edgecomp_runtime.rows import Layout, VisualTokens, lay_out

WIDTH, VOCABULARY, CONTEXT, LAYERS = 6, 411, 300, 2
RANDOM = np.random.default_rng(0)
TABLE = RANDOM.normal(0, 1, (VOCABULARY, WIDTH)).astype(np.float32)
HEAD = RANDOM.normal(0, 1, (WIDTH, VOCABULARY))
WORDS = ["what", " is", " this", " and", " a", " red", " ring", "?"]
TILES = (TileInfo(0, 2, 3, 3), TileInfo(6, 2, 2, 2))
KINDS = {  # tiles, what stands around the tokens, axes, bidirectional, deepstack layers, the picture's placeholder
    "plain": (TILES[:1], ("", ""), 1, "", 0, "<image>"),
    "images see themselves": (TILES[:1], ("(", ")"), 1, "images", 0, "[PIC]"),
    "a run a tile": (TILES, ("left ", " mid ", " right"), 1, "images", 0, "[PIC]"),
    "the prompt sees itself": (TILES[:1], ("", " that was it"), 1, "prompt", 0, "<image>"),
    "three axes and deepstack": (TILES[:1], ("start ", " end"), 3, "", LAYERS, "[PIC]"),
}
PLANS = {"full": ("keep", [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]]), "some": ("keep", [[1, 4], [6, 8, 9]]), "few": ("compact", [[2, 3], [7]])}
SCALE = 2.5


def made(kind: str, folder: Path) -> Bundle:
    """A bundle whose graphs are described and empty."""
    tiles, texts, axes, both, stacked, placeholder = KINDS[kind]
    info: Manifest = manifest_of(tiles, context=CONTEXT)
    tokens = sum(t.rows * t.columns for t in tiles)
    info = replace(
        info, image=replace(info.image, size=(4, 4)), vision=replace(info.vision, texts=texts, max_images=2),
        decoder=replace(info.decoder, hidden=WIDTH, position_axes=axes, bidirectional=both, first_position=int(kind == "a run a tile")),
        text=TextInfo("text/tokenizer.json", "text/chat_template.jinja", {"bos_token": "<s>", "eos_token": "</s>"}, (), "<image>", 3, placeholder),
        embeddings=TableInfo("graphs/weights.bin", 64, (VOCABULARY, WIDTH), "float32", SCALE))
    rows, where = ("images", "rows"), (("images", "rows") if axes == 1 else (axes, "images", "rows"))
    inputs = [TensorInfo("embeddings", "embeddings", "float32", (*rows, WIDTH)), TensorInfo("positions", "positions", "int64", where),
              TensorInfo("length", "length", "int64", (1,)), TensorInfo("logit_rows", "logit_rows", "int64", ("logit_rows",)),
              *([TensorInfo("segments", "segments", "int64", rows)] if both else []),
              *(TensorInfo(f"deepstack.{n}", "deepstack", "float32", (*rows, WIDTH), n) for n in range(stacked))]
    pixels: tuple[int | str, ...] = ("images", *([] if len(tiles) == 1 else [len(tiles)]), 3, 4, 4)
    logits = TensorInfo("logits", "logits", "float32", ("images", "logit_rows", VOCABULARY))
    plans, graphs = {}, {"graphs/decoder.onnx": GraphInfo(tuple(inputs), (logits,))}
    for name, (position, kept) in PLANS.items():
        parts = tuple(len(part) for part in kept[:len(tiles)])
        outputs = [TensorInfo("visual_tokens", "visual_tokens", "float32", ("images", sum(parts), WIDTH)),
                   TensorInfo("kept", "kept", "int64", ("images", sum(parts))),
                   *(TensorInfo(f"deepstack.{n}", "deepstack", "float32", ("images", sum(parts), WIDTH), n) for n in range(stacked))]
        graphs[f"graphs/{name}.onnx"] = GraphInfo((TensorInfo("pixels", "pixels", "float32", pixels),), tuple(outputs))
        steps = () if name == "full" else (StepInfo("stride", "projector", sum(parts)),)
        plans[name] = PlanInfo(steps, position, sum(parts), parts, (CONTEXT - tokens + sum(parts),) * 2,
                               {"neutral": {"vision": f"graphs/{name}.onnx", "prefill": "graphs/decoder.onnx", "decode": "graphs/decoder.onnx"}})
    with writing(folder) as (partial, finish):
        (partial / "graphs").mkdir()
        (partial / "text").mkdir()
        for name in graphs:
            (partial / name).write_bytes(b"")
        (partial / "graphs/weights.bin").write_bytes(b"\0" * 64 + TABLE.tobytes())
        shutil.copy(ROOT / "examples/scenes-llava/tokenizer.json", partial / "text")
        template = (ROOT / "examples/scenes-llava/chat_template.jinja").read_text()
        (partial / "text/chat_template.jinja").write_text(template.replace("<image>", placeholder))
        finish(replace(info, plans=plans, graphs=graphs))
    return Bundle.open(folder)


class Tower:
    """Visual tokens that depend on the pixels and on their place; counts how often it ran."""

    def __init__(self, kept: list[int], stacked: int):
        self.kept, self.stacked, self.runs = kept, stacked, 0

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.runs += 1
        assert len(feeds["pixels"]) == 1
        return {"kept": np.array([self.kept]), "visual_tokens": seen(feeds["pixels"][0], self.kept)[None],
                **{f"deepstack.{n}": seen(feeds["pixels"][0], self.kept, n + 1)[None] for n in range(self.stacked)}}


def seen(pixels: np.ndarray, kept: list[int], layer: int = 0) -> np.ndarray:
    return np.array([[np.sin(float(pixels.sum()) + 7 * k + 3 * layer + d) for d in range(WIDTH)] for k in kept], np.float32)


class Toy:
    """Two layers of attention with equal weights over what a row sees, with a cache of both layers' values.

    `calls` has each call's length, rows and segments.
    """

    def __init__(self) -> None:
        self.cache = np.full((2, CONTEXT, WIDTH), np.nan)
        self.calls: list[tuple[int, int, np.ndarray | None]] = []

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        (length,), new = feeds["length"], feeds["embeddings"].shape[1]
        assert feeds["embeddings"].shape == (1, new, WIDTH) and feeds["embeddings"].dtype == np.float32
        positions = feeds["positions"].reshape(-1, new)
        segments = feeds["segments"][0] if "segments" in feeds else None
        stacked = [feeds[name][0] for name in sorted(feeds) if name.startswith("deepstack.")]
        self.calls.append((int(length), new, segments))
        logits = toy(feeds["embeddings"][0], positions, segments, stacked, self.cache, int(length))
        return {"logits": logits[None, feeds["logit_rows"]].astype(np.float32)}


def toy(embeddings: np.ndarray, positions: np.ndarray, segments: np.ndarray | None, stacked: list[np.ndarray], cache: np.ndarray,
        length: int) -> np.ndarray:
    """Logits [rows, V] of new rows behind the first `length` of the cache [2, capacity, WIDTH], which takes theirs in."""
    new = len(embeddings)
    hidden = embeddings * np.cos(positions.T @ np.array([1.0, 0.37, 0.11])[:len(positions)])[:, None]
    for layer in range(2):
        cache[layer, length:length + new] = hidden
        out = []
        for row in range(new):
            sees = [*range(length + row + 1)]
            if segments is not None and segments[row]:
                sees += [length + other for other in range(row + 1, new) if segments[other] == segments[row]]
            out.append(np.tanh(cache[layer, sees].mean(0) * 3) + hidden[row])
        hidden = np.array(out) + (stacked[layer] if stacked else 0)
    return hidden @ HEAD


class Loaded:
    """A session of a made-up bundle, with the toys in it."""

    def __init__(self, bundle: Bundle, plan: str):
        self.session, self.manifest, self.plan = Session(bundle, plan=plan, backend="null"), bundle.manifest, bundle.manifest.plans[plan]
        self.kept = [k for part in PLANS[plan][1][:len(bundle.manifest.vision.tiles)] for k in part]
        self.stacked = sum(t.role == "deepstack" for t in bundle.manifest.graphs["graphs/decoder.onnx"].inputs)
        self.decoder, self.tower = Toy(), Tower(self.kept, self.stacked)
        self.session._decoder, self.session._vision = self.decoder, self.tower  # type: ignore[assignment]

    def expected(self, prompt: str, pictures: list[np.ndarray], answer: list[int]) -> np.ndarray:
        """The logits of the prompt's last row and of the answer's, all rows at once."""
        text, vision = self.manifest.text, self.manifest.vision
        ids = self.session.text.encode(prompt.replace(text.placeholder, "<image>".join(vision.texts)))
        images = []
        for picture in pictures:
            pixels = preprocess(Image.fromarray(picture), self.manifest.image)
            deepstack = np.stack([seen(pixels, self.kept, n + 1) for n in range(self.stacked)]) if self.stacked else None
            images.append(VisualTokens(str(picture.sum()), seen(pixels, self.kept), np.array(self.kept), deepstack))
        rows = lay_out(ids, 3, images, lambda some: TABLE[list(some)] * np.float32(SCALE), Layout.of(vision, self.manifest.decoder, self.plan))
        rows = rows.then(answer, TABLE[answer] * np.float32(SCALE))
        stacked = [] if not self.stacked else [np.zeros_like(rows.embeddings)] * self.stacked if rows.deepstack is None else list(rows.deepstack)
        segments = rows.segments if self.manifest.decoder.bidirectional else None
        return toy(rows.embeddings, rows.positions, segments, stacked, np.full((2, CONTEXT, WIDTH), np.nan), 0)[-len(answer) - 1:]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Loaded]:
    bundles = {kind: made(kind, tmp_path_factory.mktemp("bundle") / "it") for kind in KINDS}
    return {(kind, plan): Loaded(bundle, plan) for kind, bundle in bundles.items() for plan in PLANS}


PICTURES = [np.full((5, 7, 3), shade, np.uint8) for shade in (10, 90, 200)]
PIECES = st.lists(st.sampled_from(["PICTURE", *WORDS]), min_size=1, max_size=10).filter(lambda some: some.count("PICTURE") < 3)
CALLS = st.lists(st.tuples(PIECES, st.lists(st.integers(0, 2), min_size=2, max_size=2), st.lists(st.integers(4, 400), max_size=3)),
                 min_size=1, max_size=4)


@settings(deadline=None, max_examples=120)
@given(st.sampled_from(list(KINDS)), st.sampled_from(list(PLANS)), CALLS, st.integers(1, 7), st.booleans())
def test_whatever_is_reused_and_however_it_is_cut_the_logits_are_those_of_the_whole(
        loaded: dict[tuple[str, str], Loaded], kind: str, plan: str, calls: Any, chunk: int, again: bool) -> None:
    it = loaded[kind, plan]
    it.session.reset()
    it.session._chunk = chunk
    for pieces, which, answer in calls + calls[-1:] * again:
        prompt = "".join(it.manifest.text.placeholder if piece == "PICTURE" else piece for piece in pieces)
        pictures = [PICTURES[n] for n in which[:pieces.count("PICTURE")]]
        it.decoder.calls.clear()
        logits = it.session.score(prompt, pictures, answer, raw=True)
        np.testing.assert_allclose(logits, it.expected(prompt, pictures, answer), atol=1e-4)
        ends = [length + rows for length, rows, _ in it.decoder.calls]
        assert [length for length, _, _ in it.decoder.calls][1:] == ends[:-1], "each chunk stands behind the one before"


@pytest.mark.parametrize("kind", ["images see themselves", "a run a tile", "the prompt sees itself"])
def test_no_chunk_begins_inside_a_segment_and_all_are_as_small_as_they_can_be(loaded: dict[tuple[str, str], Loaded], kind: str) -> None:
    it = loaded[kind, "full"]
    it.session.reset()
    it.session._chunk = 2
    it.decoder.calls.clear()
    prompt = f"what is{it.manifest.text.placeholder} this and a{it.manifest.text.placeholder} ring"
    it.session.score(prompt, PICTURES[:2], [], raw=True)
    chunks = [segments.tolist() for _, _, segments in it.decoder.calls if segments is not None]
    assert len(chunks) == len(it.decoder.calls)
    if kind == "the prompt sees itself":
        assert len(chunks) == 1
        return
    for before, after in itertools.pairwise(chunks):
        assert after[0] == 0 or before[-1] != after[0]
    assert all(len(chunk) == 2 or chunk[-1] > 0 for chunk in chunks[:-1]), "only the end of a segment makes a chunk longer"
    assert max(len(chunk) for chunk in chunks) <= 1 + max(t.tokens for t in it.manifest.vision.tiles)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_reused_ends_where_a_segment_ends(loaded: dict[tuple[str, str], Loaded], kind: str) -> None:
    """A second question about a picture computes its new rows; one that ends in the picture computes all of the picture anew."""
    it = loaded[kind, "some"]
    it.session.reset()
    it.session._chunk = 100
    place, (before, *inside, after) = it.manifest.text.placeholder, it.manifest.vision.texts
    first, second = f"what is{place} this", f"what is{place} red"
    it.session.score(first, PICTURES[:1], [], raw=True)
    it.decoder.calls.clear()
    it.session.score(second, PICTURES[:1], [], raw=True)
    whole = len(it.session.text.encode(second.replace(place, "<image>".join([before, *inside, after])))) - len(inside) - 1 + len(it.kept)
    (length, rows, _), = it.decoder.calls
    assert length + rows == whole
    assert rows == (whole if kind == "the prompt sees itself" else 1)


def test_a_picture_is_looked_at_once(loaded: dict[tuple[str, str], Loaded]) -> None:
    it = loaded["plain", "some"]
    it.session.reset()
    it.tower.runs = 0
    for pictures, runs in [([0], 1), ([0, 0], 1), ([0, 1], 2), ([1], 2), ([0], 3)]:  # what the last call had not is forgotten
        it.session.score("<image>" * len(pictures) + " a", [PICTURES[n] for n in pictures], [], raw=True)
        assert it.tower.runs == runs


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_goes_through_the_template_and_the_pictures_texts(loaded: dict[tuple[str, str], Loaded], kind: str) -> None:
    it = loaded[kind, "full"]
    it.session.reset()
    it.session._chunk = 100
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]}]
    place = it.manifest.text.placeholder
    np.testing.assert_allclose(it.session.score(turns, PICTURES[:1], [7]),
                               it.expected(f"<s>USER: {place}\nwhat is this? ASSISTANT:", PICTURES[:1], [7]), atol=1e-4)


def test_generating_is_scoring_token_by_token(loaded: dict[tuple[str, str], Loaded]) -> None:
    for (kind, plan), it in loaded.items():
        it.session.reset()
        it.session._chunk = 4
        prompt = f"what is{it.manifest.text.placeholder} this"
        generation = it.session.generate(prompt, PICTURES[:1], max_new_tokens=6, raw=True)
        generation.finish()
        expected = it.expected(prompt, PICTURES[:1], generation.token_ids[:-1])
        assert generation.token_ids == expected.argmax(1).tolist(), (kind, plan)
        assert generation.statistics.visual_tokens_kept == len(it.kept)


def test_embeddings_are_the_tables_rows_times_their_scale(loaded: dict[tuple[str, str], Loaded]) -> None:
    session = loaded["plain", "full"].session
    np.testing.assert_allclose(session._embed([5, 5, 9]), TABLE[[5, 5, 9]] * SCALE, rtol=1e-6)
    assert session._embed([5]).dtype == np.float32 and session._embed([]).shape == (0, WIDTH)


@pytest.mark.parametrize("kind", KINDS)
def test_more_pictures_than_the_bundle_was_compiled_for_are_refused(loaded: dict[tuple[str, str], Loaded], kind: str) -> None:
    it = loaded[kind, "some"]
    it.session.score(it.manifest.text.placeholder * 2 + " a", PICTURES[:2], [], raw=True)
    with pytest.raises(InputError) as refused:
        it.session.score(it.manifest.text.placeholder * 3 + " a", PICTURES, [], raw=True)
    assert str(refused.value) == "3 images are more than the 2 that this bundle was compiled for: compile with a larger --max-images"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("places", "pictures"), [(1, 0), (0, 1), (2, 1), (1, 2)])
def test_pictures_and_their_places_are_counted(loaded: dict[tuple[str, str], Loaded], kind: str, places: int, pictures: int) -> None:
    it = loaded[kind, "full"]
    place = it.manifest.text.placeholder
    with pytest.raises(InputError) as refused:
        it.session.generate(place * places + " a", PICTURES[:pictures], raw=True)
    assert str(refused.value) == (f"the prompt has {places} places for images and {pictures} images were given: give one for each {place}")


@pytest.mark.parametrize("kind", [kind for kind, facts in KINDS.items() if facts[-1] != "<image>"])
def test_a_visual_token_that_stands_in_a_prompt_by_itself_is_refused(loaded: dict[tuple[str, str], Loaded], kind: str) -> None:
    it = loaded[kind, "full"]
    with pytest.raises(InputError) as refused:
        it.session.generate("[PIC] and <image>", PICTURES[:1], raw=True)
    assert str(refused.value) == "the prompt has <image> in it, which stands for visual tokens: put [PIC] where a picture goes"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plan", PLANS)
def test_a_prompt_may_fill_the_window_but_not_exceed_it(loaded: dict[tuple[str, str], Loaded], kind: str, plan: str) -> None:
    """Rows count what is kept; positions count, under 'keep', what was there."""
    it = loaded[kind, plan]
    it.session.reset()
    it.session._chunk = 400
    place, texts = it.manifest.text.placeholder, it.manifest.vision.texts
    rows = CONTEXT - sum(t.tokens for t in it.manifest.vision.tiles) + len(it.kept)

    def prompt(words: int) -> str:
        return place + " a" * words

    def taken(words: int) -> int:
        return len(it.session.text.encode(prompt(words).replace(place, "<image>".join(texts)))) - (len(texts) - 1) + len(it.kept)
    words = next(n for n in range(400) if taken(n + 1) > rows - 1)
    generation = it.session.generate(prompt(words), PICTURES[:1], raw=True)
    generation.finish()
    assert len(generation.token_ids) == rows - taken(words) and generation.statistics.stopped_by == "length"
    with pytest.raises(InputError, match=f"window of {rows} rows and {CONTEXT} positions"):
        it.session.generate(prompt(words + 1), PICTURES[:1], raw=True)
