"""Rules that read a picture alone, against plain loops written from the papers and their authors' code; graphs run by onnxruntime."""
from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from method_harness import one_picture, run

from edgecomp import methods
from edgecomp.methods.base import BudgetError, Place
from edgecomp.methods.vispruner import VisPruner
from edgecomp_runtime.errors import EdgecompError

RULES = settings(deadline=None, max_examples=60)
SEEDS = st.integers(0, 2**32 - 1)
GRIDS = st.sampled_from([(1, 2), (2, 3), (3, 8), (5, 5), (7, 6), (6, 9)])
SURE = 1e-6  # decisions nearer than that are left to rounding


def order_of(name: str, place: Place, features: np.ndarray, *signals: np.ndarray, **parameters: Any) -> list[int]:
    """The graph's choice for one picture, in the order of choice."""
    return run(one_picture(name, place, features, *signals, **parameters))[2][0].tolist()  # type: ignore[no-any-return]


def kept_of(name: str, place: Place, features: np.ndarray, *signals: np.ndarray, **parameters: Any) -> list[int]:
    """The graph's choice for one picture, ascending."""
    return run(one_picture(name, place, features, *signals, **parameters))[1][0].tolist()  # type: ignore[no-any-return]


def normal(seed: int, tokens: int, width: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (tokens, width)).astype(np.float32).astype(np.float64)


def attention(seed: int, tokens: int) -> np.ndarray:
    """What each token gets of one row of attention, all different."""
    drawn = np.random.default_rng(seed).permutation(tokens) + 1.0
    return drawn / 2 ** math.ceil(math.log2(drawn.sum()))


def drawn_place(data: st.DataObject, site: str = "projector") -> Place:
    grid = data.draw(GRIDS)
    return Place(grid, data.draw(st.integers(1, grid[0] * grid[1])), site)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b) / max(math.sqrt(float(a @ a)) * math.sqrt(float(b @ b)), 1e-300)


def ahead(values: list[float], count: int) -> None:
    """Leaves an example out where the `count` largest values are not clearly larger than the rest."""
    ranked = sorted(values, reverse=True)
    assume(count == 0 or count == len(ranked) or ranked[count - 1] - ranked[count] > SURE)


# grid

@RULES
@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.sampled_from(["projector", "encoder", "decoder"]), st.data())
def test_grid_takes_the_token_under_each_cells_centre(grid: tuple[int, int], site: str, data: st.DataObject) -> None:
    rows, columns = grid
    keep = data.draw(st.integers(1, rows * columns))
    stretch = {}  # of each way to lay keep cells over the grid: how far a cell's shape is from a token's
    for high, wide in itertools.product(range(1, rows + 1), range(1, columns + 1)):
        if high * wide == keep:
            ratio = Fraction(wide * rows, high * columns)
            stretch[high, wide] = max(ratio, 1 / ratio)
    if not stretch or min(stretch.values()) > 2:
        with pytest.raises(BudgetError, match=f"grid cannot make {keep} tokens of a {rows}x{columns} grid.* the nearest budgets are"):
            methods.make("grid").check(Place(grid, keep, site))
        return
    expected = []
    for high, wide in (cells for cells in stretch if stretch[cells] == min(stretch.values())):
        expected.append([math.floor(Fraction((2 * i + 1) * rows, 2 * high)) * columns + math.floor(Fraction((2 * j + 1) * columns, 2 * wide))
                         for i in range(high) for j in range(wide)])
    assert kept_of("grid", Place(grid, keep, site), normal(0, rows * columns)) in expected


def test_grid_of_llavas_picture() -> None:
    """64 of 24 x 24: every third row and column, the middle one of three."""
    expected = [row * 24 + column for row in range(1, 24, 3) for column in range(1, 24, 3)]
    assert kept_of("grid", Place((24, 24), 64), normal(0, 576)) == expected


@pytest.mark.parametrize("site", ["projector", "encoder", "decoder"])
def test_grid_and_pool_stand_at_the_same_places_and_leave_the_same_grid(site: str) -> None:
    for keep in (1, 4, 12, 30, 63, 72):
        place = Place((8, 9), keep, site)
        assert kept_of("grid", place, normal(1, 72)) == kept_of("pool", place, normal(1, 72))
        assert methods.make("grid").cells(place) == methods.make("pool").cells(place)


# divprune

def farthest_first(features: np.ndarray, keep: int) -> list[int]:
    """Max-min diversity from its definition: distances to every kept token, in every step anew."""
    tokens = range(len(features))
    apart = [[1 - cosine(features[i], features[j]) for j in tokens] for i in tokens]
    chosen: list[int] = []
    for _ in range(keep):
        scores = [math.inf if i in chosen else min((apart[i][j] for j in (chosen or tokens) if j != i), default=2.0) for i in tokens]
        left = [score for i, score in enumerate(scores) if i not in chosen]
        ahead(left, 1)
        chosen.append(max((i for i in tokens if i not in chosen), key=lambda i: scores[i]))
    return chosen


@RULES
@given(SEEDS, st.sampled_from(["projector", "encoder", "decoder"]), st.data())
def test_divprune_is_greedy_max_min(seed: int, site: str, data: st.DataObject) -> None:
    place = drawn_place(data, site)
    features = normal(seed, place.tokens)
    assert order_of("divprune", place, features) == farthest_first(features, place.keep)


def test_divprune_by_hand() -> None:
    """Directions at 0, 10, 90 and 180 degrees: 180 is alone, 0 lies opposite, 90 between them, 10 beside 0. Length does not matter."""
    angles = np.radians([0, 10, 90, 180])
    features = np.stack([np.cos(angles), np.sin(angles)], 1) * np.array([[1], [100], [0.01], [5]])
    assert order_of("divprune", Place((2, 2), 4), features) == [3, 0, 2, 1]


def test_divprune_keeps_no_token_twice_where_all_left_are_duplicates() -> None:
    features = np.eye(12)[[0, 1, 0, 1, 0, 1, 0, 1]]
    assert order_of("divprune", Place((2, 4), 5), features) == [0, 1, 2, 3, 4]


# hiprune

def anchors_buffers_registers(deep: np.ndarray, middle: np.ndarray, width: int, keep: int, alpha: float) -> list[int]:
    """HiPrune's set as the authors' code makes it, where anchors and buffers fit into the budget."""
    tokens = len(deep)
    chosen: set[int] = set()
    for anchor in sorted(range(tokens), key=lambda i: -middle[i])[:round(keep * alpha / 5)]:
        chosen |= {min(max(anchor + step, 0), tokens - 1) for step in (0, -1, 1, -width, width)}
    for register in sorted(range(tokens), key=lambda i: -deep[i]):
        if len(chosen) < keep:
            chosen.add(register)
    return sorted(chosen)


@RULES
@given(SEEDS, st.sampled_from([0, 0.1, 0.3, 0.5, 0.8, 1]), st.data())
def test_hiprune_is_anchors_their_neighbours_and_registers(seed: int, alpha: float, data: st.DataObject) -> None:
    place = drawn_place(data)
    deep, middle = attention(seed, place.tokens), attention(seed + 1, place.tokens)
    expected = anchors_buffers_registers(deep, middle, place.grid[1], place.keep, alpha)
    found = kept_of("hiprune", place, normal(seed, place.tokens), deep, middle, alpha=alpha)
    if len(expected) == place.keep:
        assert found == expected
    else:  # more anchors and buffers than the budget: the authors' code stops here; those of most deep attention stay
        assert found == sorted(sorted(expected, key=lambda i: -deep[i])[:place.keep])


@pytest.mark.parametrize(("anchor", "around"), [
    (8, {2, 7, 8, 9, 14}), (12, {6, 11, 12, 13, 18}), (17, {11, 16, 17, 18, 23}), (2, {0, 1, 2, 3, 8}), (0, {0, 1, 6}), (23, {17, 22, 23})])
def test_hiprunes_buffers_wrap_at_row_ends_and_stop_at_the_pictures(anchor: int, around: set[int]) -> None:
    """In a 4 x 6 grid, one anchor of a budget of ten."""
    deep, middle = attention(0, 24), np.zeros(24)
    middle[anchor] = 0.5
    registers = [i for i in np.argsort(-deep) if i not in around][:10 - len(around)]
    assert kept_of("hiprune", Place((4, 6), 10), normal(0, 24), deep, middle, alpha=0.5) == sorted({*around, *map(int, registers)})


@pytest.mark.parametrize(("keep", "alpha", "anchors"), [(25, 0.1, 0), (26, 0.1, 1), (15, 0.5, 2), (25, 0.5, 2), (7, 1, 1), (8, 1, 2)])
def test_hiprune_rounds_the_number_of_anchors_as_python_does(keep: int, alpha: float, anchors: int) -> None:
    """In a column of 54 tokens, where the first get most attention in the middle and least above; half an anchor is none, one and a half are two."""
    deep, middle = np.arange(54) / 2048, np.arange(54, 0, -1) / 2048
    around = {0, 1, *range(anchors + 1)} if anchors else set()
    expected = sorted(around | set(range(54 - keep + len(around), 54)))
    assert kept_of("hiprune", Place((54, 1), keep), normal(0, 54), deep, middle, alpha=alpha) == expected


def test_hiprune_reads_the_layer_it_is_told_to() -> None:
    assert methods.make("hiprune").signals("projector") == ("column_attention", "column_attention:middle")
    assert methods.make("hiprune", layer=0).signals("projector") == ("column_attention", "column_attention:0")
    assert methods.make("hiprune", layer=15).signals("projector") == ("column_attention", "column_attention:15")


# vispruner

def dealt_out(features: np.ndarray, scores: np.ndarray, keep: int, important: int, steps: list[int]) -> list[int]:
    """VisPruner's set: `important` tokens by attention, then in each step so many of the first pile go."""
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
    chosen, rest = ranked[:important], ranked[important:]
    for drop in steps:
        first, second = rest[0::2], rest[1::2]
        duplicated = [max(cosine(features[i], features[j]) for j in second) for i in first]
        ranks = sorted(range(len(first)), key=lambda n: -duplicated[n])
        for n in range(drop, len(first)):  # the order of what stays decides how it is dealt out next
            ahead(duplicated, n)
        rest = [first[n] for n in ranks[drop:]] + second
    assert len(chosen) + len(rest) == keep
    return sorted(chosen + rest)


@RULES
@given(SEEDS, st.sampled_from(["projector", "encoder"]), st.integers(0, 99), st.sampled_from([8, 64]), st.data())
def test_vispruner_of_eight_a_step_is_the_authors_loop_and_by_default_drops_half_a_pile(
        seed: int, site: str, important: int, step: int, data: st.DataObject) -> None:
    place = drawn_place(data, site)
    features, scores = normal(seed, place.tokens), attention(seed, place.tokens)
    by_attention = place.keep * important // 100
    left, steps = place.tokens - by_attention, []
    while left > place.keep - by_attention:
        pile = len(range(0, left, 2))
        most = min(pile, 8) if step == 8 or pile <= 16 else pile // 2  # here no picture has piles of more than 128
        steps.append(min(most, left - (place.keep - by_attention)))
        left -= steps[-1]
    expected = dealt_out(features, scores, place.keep, by_attention, steps)
    assert kept_of("vispruner", place, features, scores, important=important, step=step) == expected


@pytest.mark.parametrize(("keep", "steps"), [
    (64, [64, 64, 64, 64, 64, 56, 42, 31, 24, 18, 13, 8]), (192, [64, 64, 64, 64, 56, 42, 30]), (500, [64, 12]), (576, [])])
def test_vispruners_steps_from_576_tokens(keep: int, steps: list[int]) -> None:
    """The first of 544 tokens leaves 480, ... the sixth finds 224, a pile of 112, and drops half of it."""
    assert [drop for _, drop in VisPruner().drops(Place((24, 24), keep))] == steps
    assert [drop for _, drop in VisPruner(step=8).drops(Place((24, 24), 64))] == [8] * 64


def test_vispruner_drops_what_is_there_twice() -> None:
    """Eight tokens by falling attention; 0 and 1, and 4 and 5, are the same, so 0 and 4 of the first pile (0, 2, 4, 6) go."""
    features = np.eye(12)[[0, 0, 1, 2, 3, 3, 4, 5]]
    scores = np.arange(8, 0, -1) / 64
    assert kept_of("vispruner", Place((2, 4), 6), features, scores, important=0) == [1, 2, 3, 5, 6, 7]
    assert kept_of("vispruner", Place((2, 4), 6), features, scores, important=100) == [0, 1, 2, 3, 4, 5]


# parameters

@pytest.mark.parametrize(("name", "values", "message"), [
    ("hiprune", {"alpha": -0.1}, "hiprune's alpha is a part of the budget, 0 to 1, not -0.1"),
    ("hiprune", {"alpha": float("nan")}, "hiprune's alpha is a part of the budget, 0 to 1, not nan"),
    ("hiprune", {"layer": -2}, "hiprune's layer counts from 0, or is -1 .* not -2"),
    ("vispruner", {"important": 101}, "vispruner's important is a percentage, 0 to 100, not 101"),
    ("vispruner", {"important": -1}, "vispruner's important is a percentage, 0 to 100, not -1"),
    ("vispruner", {"step": 0}, "vispruner drops at least one token a step, not 0")])
def test_parameters_out_of_range_are_one_clear_line(name: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(EdgecompError, match=f"^{message}$"):
        methods.make(name, **values)
