"""Prompts as decoder rows: pictures of one or several runs, one or three axes, both position policies, segments and deepstack features.

The oracle goes token by token and keeps a Python list of rows; nothing of it is numpy arithmetic on whole runs.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp_runtime.manifest import DecoderInfo, PlanInfo, TileInfo, VisionInfo
from edgecomp_runtime.rows import Layout, VisualTokens, following, lay_out

LAWS = settings(deadline=None, max_examples=150)
IMAGE = 9  # the image token's id; others are text
WIDTH = 2
LAYERS = 2  # of deepstack
TABLE = np.arange(10, dtype=np.float32)[:, None].repeat(WIDTH, 1)


def embed(ids: object) -> np.ndarray:
    return TABLE[list(ids)]  # type: ignore[call-overload]


@dataclass
class Case:
    """A model's facts and a prompt about pictures."""
    vision: VisionInfo
    decoder: DecoderInfo
    plan: PlanInfo
    ids: list[int]
    images: list[VisualTokens]

    @property
    def layout(self) -> Layout:
        return Layout.of(self.vision, self.decoder, self.plan)

    def rows(self):  # type: ignore[no-untyped-def]
        return lay_out(self.ids, IMAGE, self.images, embed, self.layout)


@st.composite
def cases(draw: st.DrawFn, everything: bool = False, policies: tuple[str, ...] = ("keep", "compact")) -> Case:
    """Pictures of one run over all tokens (with separators, where tiles leave room for them), of a run a tile, or of one grid with three axes."""
    kind = draw(st.sampled_from(["one run", "a run a tile", "three axes"]))
    sides = st.tuples(st.integers(1, 3), st.integers(1, 3))
    grids = [draw(sides)] if kind == "three axes" else draw(st.lists(sides, min_size=1, max_size=3))
    separator = int(kind == "one run" and draw(st.booleans()))  # a token behind each row
    tiles, tokens = [], 0
    for rows, columns in grids:
        tiles.append(TileInfo(tokens, rows, columns, columns + separator))
        tokens += rows * (columns + separator)
    inside = [[t.start + r * t.stride + c for r in range(t.rows) for c in range(t.columns)] for t in tiles]
    kept_parts = [len(part) if everything else draw(st.integers(1, len(part))) for part in inside]
    whole = everything or (draw(st.booleans()) and all(k == len(p) for k, p in zip(kept_parts, inside)))
    texts = ("",) * (len(tiles) + 1 if kind == "a run a tile" else 2)
    axes = 3 if kind == "three axes" else 1
    runs = len(texts) - 1
    pictures = draw(st.integers(0, 3))
    ids: list[int] = []
    for _ in range(pictures * runs):
        ids += [*draw(st.lists(st.integers(0, 8), max_size=2)), IMAGE]
    ids += draw(st.lists(st.integers(0, 8), min_size=0 if ids else 1, max_size=3))
    images = []
    for number in range(pictures):
        kept = list(range(tokens)) if whole else sorted(k for part, count in zip(inside, kept_parts)
                                                         for k in draw(st.permutations(part))[:count])
        values = 100 * (number + 1) + np.array(kept, np.float32)[:, None].repeat(WIDTH, 1)
        deepstack = np.stack([values + 1000 * (layer + 1) for layer in range(LAYERS)])
        images.append(VisualTokens(f"picture {number}", values, np.array(kept, np.int64), deepstack if axes == 3 else None))
    total = tokens if whole else sum(kept_parts)
    first, both = draw(st.sampled_from([0, 2])), draw(st.sampled_from(["", "images", "prompt"]))
    return Case(VisionInfo(tokens, tuple(tiles), texts, 3, 1, 0, False), DecoderInfo(1, 1, 1, 4, WIDTH, 99, axes, first, both),
                PlanInfo((), draw(st.sampled_from(policies)), total, tuple(kept_parts), (99,), {}), ids, images)


@dataclass
class Expected:
    """Rows as a person would write them down."""
    values: list[float] = field(default_factory=list)
    positions: list[tuple[int, ...]] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    deepstack: list[list[float]] = field(default_factory=list)
    sources: list[object] = field(default_factory=list)
    next_position: int = 0


def expected(case: Case) -> Expected:
    """Row by row: a text row takes one position on every axis, a run of a picture the places that its tokens have in it."""
    axes, compact = case.decoder.position_axes, case.plan.position == "compact"
    one_run = len(case.vision.texts) == 2
    found, at, segment, picture, tile = Expected(), case.decoder.first_position, 0, 0, 0
    for token in case.ids:
        if token != IMAGE:
            found.values.append(token)
            found.positions.append((at,) * axes)
            found.segments.append(0)
            found.deepstack.append([0.0] * LAYERS)
            found.sources.append(token)
            at += 1
            continue
        image, segment = case.images[picture], segment + 1
        if one_run:
            numbers, first = list(range(case.vision.tokens)), 0
        else:
            t = case.vision.tiles[tile]
            numbers, first = [t.start + n for n in range(t.rows * t.columns)], t.start
        where = {n: (n - first,) if axes == 1 else (0, n // case.vision.tiles[0].columns, n % case.vision.tiles[0].columns) for n in numbers}
        mine = [(row, n) for row, n in enumerate(image.kept.tolist()) if n in where]
        if compact:
            ranks = [sorted({where[n][axis] for _, n in mine}) for axis in range(axes)]
            where = {n: tuple(ranks[axis].index(where[n][axis]) for axis in range(axes)) for _, n in mine}
        for row, n in mine:
            found.values.append(float(image.tokens[row, 0]))
            found.positions.append(tuple(at + place for place in where[n]))
            found.segments.append(segment)
            found.deepstack.append([0.0] * LAYERS if image.deepstack is None else [float(layer[row, 0]) for layer in image.deepstack])
            found.sources.append((image.name, row))
        at += 1 + max(max(places) for places in where.values())  # of all places under 'keep', of those left under 'compact'
        tile = (tile + 1) % (len(case.vision.texts) - 1)
        picture += tile == 0
    found.next_position = at
    if case.decoder.bidirectional != "images":
        found.segments = [int(case.decoder.bidirectional == "prompt")] * len(found.values)
    return found


@LAWS
@given(cases())
def test_every_row_is_what_and_where_it_should_be(case: Case) -> None:
    rows, wanted = case.rows(), expected(case)
    assert rows.embeddings.shape == (len(wanted.values), WIDTH)
    assert rows.embeddings[:, 0].tolist() == rows.embeddings[:, 1].tolist() == wanted.values
    assert [tuple(p) for p in rows.positions.T.tolist()] == wanted.positions and rows.positions.dtype == np.int64
    assert rows.segments.tolist() == wanted.segments and rows.segments.dtype == np.int64
    assert rows.sources == wanted.sources
    assert rows.next_position == wanted.next_position
    if case.decoder.position_axes == 3 and case.images:
        assert rows.deepstack is not None and rows.deepstack.shape == (LAYERS, len(wanted.values), WIDTH)
        assert rows.deepstack[:, :, 0].T.tolist() == wanted.deepstack
    else:
        assert rows.deepstack is None


@LAWS
@given(cases())
def test_a_picture_takes_the_rows_and_at_most_the_positions_that_its_layout_says(case: Case) -> None:
    rows, text, layout = case.rows(), sum(token != IMAGE for token in case.ids), case.layout
    assert len(rows.sources) == text + len(case.images) * layout.rows
    took = rows.next_position - case.decoder.first_position - text
    most = len(case.images) * layout.positions
    assert took == most if case.plan.position == "keep" else took <= most
    if case.plan.position == "compact" and case.decoder.position_axes == 1:
        assert rows.positions[0].tolist() == list(range(case.decoder.first_position, rows.next_position)), "no place is left out"


@LAWS
@given(cases(everything=True, policies=("keep",)))
def test_where_everything_is_kept_compact_and_keep_are_the_same(case: Case) -> None:
    keep = case.rows()
    case.plan = PlanInfo((), "compact", *[getattr(case.plan, n) for n in ("visual_tokens", "tile_tokens", "cache_rows", "variants")])
    compact = case.rows()
    np.testing.assert_array_equal(keep.positions, compact.positions)
    assert keep.next_position == compact.next_position and keep.sources == compact.sources


@LAWS
@given(cases(), st.lists(st.integers(0, 8), min_size=1, max_size=4), st.data())
def test_an_answer_stands_behind_its_prompt_and_a_cut_keeps_the_rest(case: Case, answer: list[int], data: st.DataObject) -> None:
    prompt = case.rows()
    whole = prompt.then(answer, embed(answer))
    longer = lay_out([*case.ids, *answer], IMAGE, case.images, embed, case.layout)  # an answer's rows are text rows like any other
    assert whole.sources == longer.sources and whole.next_position == longer.next_position == prompt.next_position + len(answer)
    np.testing.assert_array_equal(whole.embeddings, longer.embeddings)
    np.testing.assert_array_equal(whole.positions, longer.positions)
    assert whole.segments.tolist() == [*prompt.segments.tolist(), *[0] * len(answer)], "an answer is seen from behind only"
    assert (whole.deepstack is None) == (longer.deepstack is None)
    if whole.deepstack is not None and longer.deepstack is not None:
        np.testing.assert_array_equal(whole.deepstack, longer.deepstack)
    cut = data.draw(st.integers(0, len(whole.sources)))
    rest = whole.since(cut)
    assert rest.sources == whole.sources[cut:] and rest.next_position == whole.next_position
    np.testing.assert_array_equal(rest.embeddings, whole.embeddings[cut:])
    np.testing.assert_array_equal(rest.positions, whole.positions[:, cut:])
    np.testing.assert_array_equal(rest.segments, whole.segments[cut:])
    if rest.deepstack is not None and whole.deepstack is not None:
        np.testing.assert_array_equal(rest.deepstack, whole.deepstack[:, cut:])


@pytest.mark.parametrize("axes", [1, 3])
def test_text_goes_on_by_one_on_every_axis(axes: int) -> None:
    rows = following([5, 6, 7], embed([5, 6, 7]), 40, axes)
    assert rows.positions.tolist() == [[40, 41, 42]] * axes and rows.next_position == 43
    assert rows.segments.tolist() == [0, 0, 0] and rows.deepstack is None and rows.sources == [5, 6, 7]


def test_m_rope_goes_on_behind_the_larger_side() -> None:
    """The example of arXiv 2409.12191, section 2.1: a picture of 2 x 3 behind two text rows, then text again."""
    tile = TileInfo(0, 2, 3, 3)
    vision, decoder = VisionInfo(6, (tile,), ("", ""), 1, 1, 0, False), DecoderInfo(1, 1, 1, 4, WIDTH, 99, 3)
    picture = VisualTokens("p", np.zeros((6, WIDTH), np.float32), np.arange(6))
    rows = lay_out([1, 2, IMAGE, 3], IMAGE, [picture], embed, Layout.of(vision, decoder, PlanInfo((), "keep", 6, (6,), (99,), {})))
    assert rows.positions.tolist() == [[0, 1, 2, 2, 2, 2, 2, 2, 5], [0, 1, 2, 2, 2, 3, 3, 3, 5], [0, 1, 2, 3, 4, 2, 3, 4, 5]]
    assert rows.next_position == 6
