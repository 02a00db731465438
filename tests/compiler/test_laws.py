"""What holds for every method, on small made-up grids run by onnxruntime: counts, order, ties, batches, types, budgets."""
from __future__ import annotations

import functools
import itertools
import math
import random
import re
from fractions import Fraction
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from conftest import manifest_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgecomp import methods
from edgecomp.budget import nearest, tokens_of
from edgecomp.methods import reference
from edgecomp.methods.base import DOMAIN, BudgetError, Merging, Method, Place, Selection
from edgecomp.methods.dart import Dart
from edgecomp.methods.pool import Pool
from edgecomp_runtime.manifest import TileInfo

HIDDEN = 6
LAWS = settings(deadline=None, max_examples=60)
SIDES = st.integers(1, 8)
GRIDS = st.tuples(SIDES, SIDES)
SEEDS = st.integers(0, 2**32 - 1)
SELECTIONS = st.one_of(st.builds(lambda seed: methods.make("random", seed=seed), st.integers(0, 99)),
                       st.sampled_from([methods.make("stride"), methods.make("cls")]),
                       st.builds(lambda pivots: methods.make("dart", pivots=pivots), st.integers(1, 12)))


def possible(grid: tuple[int, int]) -> set[int]:
    """The budgets that pooling can make, in whole numbers: h x w cells within the grid, aspects within a factor of two."""
    rows, columns = grid
    return {h * w for h in range(1, rows + 1) for w in range(1, columns + 1) if w * rows <= 2 * h * columns and h * columns <= 2 * w * rows}


@st.composite
def selecting(draw: st.DrawFn) -> tuple[Method, Place]:
    grid = draw(GRIDS)
    return draw(SELECTIONS), Place(grid, draw(st.integers(1, grid[0] * grid[1])))


@st.composite
def pooling(draw: st.DrawFn) -> tuple[Method, Place]:
    grid = draw(GRIDS)
    return Pool(), Place(grid, draw(st.sampled_from(sorted(possible(grid)))))


COMPRESSING = st.one_of(selecting(), pooling())


@functools.lru_cache(maxsize=64)
def session(method: Method, place: Place, dtype: np.dtype) -> ort.InferenceSession:
    """A graph that is one call of the method's ONNX function."""
    wanted: list[tuple[str, ir.DataType, list[int | str]]] = [("features", ir.DataType.from_numpy(dtype), ["images", place.tokens, HIDDEN])]
    wanted += [(name, ir.DataType.FLOAT, ["images", place.tokens]) for name in method.taxonomy.signals]
    inputs = [ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape)) for name, kind, shape in wanted]
    function = method.function(place)
    call = ir.node(function.name, inputs, domain=DOMAIN, num_outputs=3)
    for value, name, kind in zip(call.outputs, ("tokens", "kept", "order"), (wanted[0][1], ir.DataType.INT64, ir.DataType.INT64)):
        value.name, value.type = name, ir.TensorType(kind)
    graph = ir.Graph(inputs, call.outputs, nodes=[call], opset_imports={"": 23, DOMAIN: 1}, name="law")
    model = ir.Model(graph, ir_version=10, functions=[function])
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # no pool of threads for each of many sessions
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(method: Method, place: Place, features: np.ndarray, attention: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The method in onnxruntime: features [B, N, HIDDEN], CLS attention [B, N] -> tokens, kept, order."""
    feeds = {"features": features, **dict.fromkeys(method.taxonomy.signals, attention)}
    tokens, kept, order = session(method, place, features.dtype).run(None, feeds)
    return tokens, kept, order


def made_up(seed: int, images: int, place: Place, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Features [images, N, D] and a CLS row [images, N], without ties."""
    generator = np.random.default_rng(seed)
    return generator.normal(0, 3, (images, place.tokens, HIDDEN)).astype(dtype), generator.random((images, place.tokens)).astype(np.float32)


# every method

@LAWS
@given(COMPRESSING, st.integers(1, 3), SEEDS)
def test_exactly_k_tokens_at_unique_ascending_places(compressing: tuple[Method, Place], images: int, seed: int) -> None:
    method, place = compressing
    tokens, kept, order = run(method, place, *made_up(seed, images, place))
    assert tokens.shape == (images, place.keep, HIDDEN) and tokens.dtype == np.float32
    assert kept.shape == order.shape == (images, place.keep) and kept.dtype == order.dtype == np.int64
    assert kept.min() >= 0 and kept.max() < place.tokens
    assert (np.diff(kept, axis=1) > 0).all()
    np.testing.assert_array_equal(np.sort(order, 1), kept)


@LAWS
@given(st.one_of(SELECTIONS, st.just(Pool())), GRIDS, st.integers(1, 3), SEEDS)
def test_keeping_everything_changes_nothing(method: Method, grid: tuple[int, int], images: int, seed: int) -> None:
    place = Place(grid, grid[0] * grid[1])
    features, attention = made_up(seed, images, place)
    tokens, kept, _ = run(method, place, features, attention)
    assert kept.tolist() == [list(range(place.tokens))] * images
    np.testing.assert_allclose(tokens, features, atol=1e-6 if isinstance(method, Merging) else 0, rtol=0)


@LAWS
@given(COMPRESSING, SEEDS)
def test_a_picture_fares_the_same_alone_and_in_a_batch(compressing: tuple[Method, Place], seed: int) -> None:
    method, place = compressing
    features, attention = made_up(seed, 3, place)
    together = run(method, place, features, attention)
    for picture in range(3):
        alone = run(method, place, features[picture: picture + 1], attention[picture: picture + 1])
        np.testing.assert_array_equal(alone[1][0], together[1][picture])
        np.testing.assert_allclose(alone[0][0], together[0][picture], atol=1e-6 if isinstance(method, Merging) else 0, rtol=0)


@LAWS
@given(COMPRESSING, SEEDS)
def test_the_numpy_reference_gives_the_same_tokens_and_places(compressing: tuple[Method, Place], seed: int) -> None:
    method, place = compressing
    features, attention = made_up(seed, 1, place)
    tokens, kept, _ = run(method, place, features, attention)
    expected, places = reference.compress(method, place, features[0], *[attention[0] for _ in method.taxonomy.signals])
    assert kept[0].tolist() == places.tolist()
    np.testing.assert_allclose(tokens[0], expected, atol=1e-5, rtol=0)


@LAWS
@given(COMPRESSING, SEEDS)
def test_half_precision_features_stay_half(compressing: tuple[Method, Place], seed: int) -> None:
    method, place = compressing
    features, attention = made_up(seed, 2, place, np.float16)
    tokens, kept, _ = run(method, place, features, attention)
    assert tokens.dtype == np.float16
    for picture in range(2):
        if isinstance(method, Selection):
            np.testing.assert_array_equal(tokens[picture], features[picture][kept[picture]])
        else:
            np.testing.assert_allclose(tokens[picture], reference.compress(method, place, features[picture].astype(np.float64))[0], atol=2e-2, rtol=0)


# selection

@LAWS
@given(selecting(), st.integers(1, 3), SEEDS)
def test_selected_tokens_are_features_bit_for_bit(selecting: tuple[Method, Place], images: int, seed: int) -> None:
    method, place = selecting
    features, attention = made_up(seed, images, place)
    features.reshape(-1)[::7] = -0.0
    tokens, kept, _ = run(method, place, features, attention)
    for picture in range(images):
        np.testing.assert_array_equal(tokens[picture].view(np.int32), features[picture][kept[picture]].view(np.int32))


@LAWS
@given(GRIDS, st.data())
def test_cls_ties_go_to_the_lower_index(grid: tuple[int, int], data: st.DataObject) -> None:
    tokens = grid[0] * grid[1]
    keep = data.draw(st.integers(1, tokens))
    scores = data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.5]), min_size=tokens, max_size=tokens))
    _, kept, order = run(methods.make("cls"), Place(grid, keep), np.zeros((1, tokens, HIDDEN), np.float32), np.array([scores], np.float32))
    expected = sorted(range(tokens), key=lambda i: (-scores[i], i))[:keep]
    assert order[0].tolist() == expected and kept[0].tolist() == sorted(expected)


@pytest.mark.parametrize("name", ["cls", "dart"])
@pytest.mark.parametrize(("grid", "keep"), [((1, 1), 1), ((2, 3), 4), ((8, 8), 5), ((8, 8), 37), ((24, 24), 192)])
def test_where_all_tokens_are_equal_the_first_ones_stay(name: str, grid: tuple[int, int], keep: int) -> None:
    place = Place(grid, keep)
    features = np.zeros((2, place.tokens, HIDDEN), np.float32)
    features[:, :, :4] = 1  # of length 2: nothing is rounded
    _, kept, _ = run(methods.make(name), place, features, np.full((2, place.tokens), 0.125, np.float32))
    assert kept.tolist() == [list(range(keep))] * 2


def greedy_dart(features: list[tuple[int, int]], keep: int, pivots: int) -> list[int]:
    """DART in whole numbers where a token is (axis, signed length): cosines are -1, 0 or 1, and nothing is rounded."""
    def cosine(a: int, b: int) -> int:
        (axis, length), (other, far) = features[a], features[b]
        return 0 if axis != other else int(math.copysign(1, length * far)) if length * far else 0

    pivots = min(pivots, keep)
    chosen = sorted(range(len(features)), key=lambda i: (-abs(features[i][1]), i))[:pivots]
    for n, pivot in enumerate(list(chosen)):
        share = (keep - pivots) // pivots + (1 if n < (keep - pivots) % pivots else 0)
        chosen += sorted((i for i in range(len(features)) if i not in chosen), key=lambda i: (cosine(i, pivot), i))[:share]
    return chosen


@LAWS
@given(GRIDS, st.integers(1, 12), st.data())
def test_dart_on_tokens_full_of_ties_is_the_greedy_loop(grid: tuple[int, int], pivots: int, data: st.DataObject) -> None:
    place = Place(grid, data.draw(st.integers(1, grid[0] * grid[1])))
    token = st.tuples(st.integers(0, HIDDEN - 1), st.sampled_from([-4, -2, -1, 0, 1, 2]))
    along = data.draw(st.lists(token, min_size=place.tokens, max_size=place.tokens))
    features = np.zeros((1, place.tokens, HIDDEN), np.float32)
    for index, (axis, length) in enumerate(along):
        features[0, index, axis] = length
    method = methods.make("dart", pivots=pivots)
    expected = greedy_dart(along, place.keep, pivots)
    assert run(method, place, features, features[:, :, 0])[2][0].tolist() == expected
    assert reference.select(method.rule(place, features[0].astype(np.float64))).tolist() == expected  # type: ignore[attr-defined]


@given(GRIDS, st.integers(1, 20), st.data())
def test_darts_pivots_share_the_budget_evenly(grid: tuple[int, int], pivots: int, data: st.DataObject) -> None:
    place = Place(grid, data.draw(st.integers(1, grid[0] * grid[1])))
    shares = Dart(pivots).shares(place)
    assert len(shares) + sum(shares) == place.keep
    assert max(shares) - min(shares) <= 1 and shares == sorted(shares, reverse=True)


@LAWS
@given(GRIDS, st.integers(0, 10**6), st.data())
def test_random_is_pythons_sample_whatever_the_picture(grid: tuple[int, int], seed: int, data: st.DataObject) -> None:
    place = Place(grid, data.draw(st.integers(1, grid[0] * grid[1])))
    _, kept, _ = run(methods.make("random", seed=seed), place, *made_up(seed, 2, place))
    assert kept.tolist() == [sorted(random.Random(seed).sample(range(place.tokens), place.keep))] * 2


@LAWS
@given(GRIDS, st.data())
def test_stride_is_the_floor_of_equal_steps(grid: tuple[int, int], data: st.DataObject) -> None:
    place = Place(grid, data.draw(st.integers(1, grid[0] * grid[1])))
    _, kept, _ = run(methods.make("stride"), place, *made_up(0, 2, place))
    assert kept.tolist() == [[math.floor(Fraction(i * place.tokens, place.keep)) for i in range(place.keep)]] * 2


# pooling

def averaging(place: Place) -> tuple[np.ndarray, np.ndarray]:
    """The matrix [K, N] that the graph itself applies, and its places: its answer to the N unit vectors, HIDDEN at a time."""
    unit = np.eye(place.tokens, -(-place.tokens // HIDDEN) * HIDDEN, dtype=np.float32)
    parts = np.stack(np.split(unit, unit.shape[1] // HIDDEN, axis=1))  # [B, N, HIDDEN]
    tokens, kept, _ = run(Pool(), place, parts, parts[:, :, 0])
    return np.concatenate(list(tokens), 1)[:, :place.tokens], kept[0]


@LAWS
@given(pooling())
def test_pooling_conserves_weight_and_stands_at_its_sources(pooling: tuple[Method, Place]) -> None:
    _, place = pooling
    weights, kept = averaging(place)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(weights.sum(0), place.keep / place.tokens, atol=1e-6)
    assert (weights >= 0).all() and (weights[np.arange(place.keep), kept] > 0).all()
    assert (np.diff(kept) > 0).all()
    np.testing.assert_allclose(Pool().weights(place), weights, atol=1e-6)


@LAWS
@given(pooling())
def test_pooling_averages_over_cells_of_the_nearest_aspect(pooling: tuple[Method, Place]) -> None:
    _, place = pooling
    (rows, columns), (weights, _) = place.grid, averaging(place)
    matrices = {}
    for high in (h for h in range(1, rows + 1) if place.keep % h == 0 and place.keep // h <= columns):
        wide = place.keep // high
        matrix = np.zeros((place.keep, rows, columns))
        for i, j, y, x in np.ndindex(high, wide, rows, columns):  # the part of cell (i, j) that token (y, x) covers, in exact fractions
            down = min(Fraction((i + 1) * rows, high), y + 1) - max(Fraction(i * rows, high), y)
            across = min(Fraction((j + 1) * columns, wide), x + 1) - max(Fraction(j * columns, wide), x)
            if down > 0 and across > 0:
                matrix[i * wide + j, y, x] = down * across * Fraction(place.keep, place.tokens)
        stretch = Fraction(wide * rows, high * columns)
        matrices[high] = max(stretch, 1 / stretch), matrix.reshape(place.keep, -1)
    best = min(stretch for stretch, _ in matrices.values())
    assert any(stretch == best and np.allclose(matrix, weights, atol=1e-6) for stretch, matrix in matrices.values())


def test_pooling_refuses_just_the_budgets_it_cannot_make_and_names_the_nearest() -> None:
    for grid, step in [*((grid, 1) for grid in itertools.product(range(1, 9), range(1, 9))), ((24, 24), 41)]:
        fits, picture = possible(grid), manifest_of([TileInfo(0, *grid, grid[1])])
        for keep in range(1, grid[0] * grid[1] + 1, step):
            place = Place(grid, keep)
            if keep in fits:
                Pool().check(place)
                assert nearest(picture, Pool(), keep) == keep
                continue
            with pytest.raises(BudgetError, match=f"pool cannot make {keep} tokens of a {grid[0]}x{grid[1]} grid") as refused:
                Pool().check(place)
            named = [int(n) for n in re.findall(r"\d+", str(refused.value).split("nearest budgets are ")[1])]
            assert named == sorted(set(named)) and set(named) <= fits
            assert sorted(abs(n - keep) for n in named) == sorted(abs(n - keep) for n in fits)[:2]
            assert abs(nearest(picture, Pool(), keep) - keep) == min(abs(n - keep) for n in fits)


# budgets

@given(st.integers(1, 5000), st.integers(1, 10**4))
@example(576, 2500)
@example(1, 1)
@example(12, 1250)  # half a token is rounded up
def test_a_part_is_rounded_to_the_nearest_count_and_never_nothing(tokens: int, hundredths: int) -> None:
    percent = Fraction(hundredths, 100)
    assert tokens_of(f"{hundredths // 100}.{hundredths % 100:02}%", tokens) == max(1, math.floor(tokens * percent / 100 + Fraction(1, 2)))


@given(st.integers(1, 5000), st.integers(-10, 6000))
def test_a_count_is_itself_or_outside(tokens: int, count: int) -> None:
    if 1 <= count <= tokens:
        assert tokens_of(str(count), tokens) == count
    else:
        with pytest.raises(BudgetError, match=f"choose 1 to {tokens} visual tokens"):
            tokens_of(str(count), tokens)


@pytest.mark.parametrize(("keep", "count"), [("64", 64), (" 64 ", 64), ("576", 576), ("25%", 144), ("11.1%", 64), ("100%", 576), ("0.001%", 1)])
def test_budgets_that_can_be_had(keep: str, count: int) -> None:
    assert tokens_of(keep, 576) == count


@pytest.mark.parametrize("keep", ["0", "577", "-3", "0%", "-5%", "101%", "100.05%", "abc", "", "%", "6.5", "64 %%", "nan", "nan%",
                                  "inf%", "1e999", "1e999%", "-inf%", "9" * 5000])
def test_budgets_that_cannot_are_one_clear_line(keep: str) -> None:
    with pytest.raises(BudgetError) as refused:
        tokens_of(keep, 576)
    assert "\n" not in str(refused.value)


@given(st.text("0123456789.+-_eE% infa\n", max_size=8), st.integers(1, 600))
def test_any_other_text_is_a_budget_within_or_a_budget_error(keep: str, tokens: int) -> None:
    try:
        count = tokens_of(keep, tokens)
    except BudgetError:
        return
    assert 1 <= count <= tokens
