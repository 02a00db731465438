"""What holds for every method, on small made-up grids run by onnxruntime: counts, order, ties, batches, types, budgets."""
from __future__ import annotations

import itertools
import math
import random
import re
from fractions import Fraction
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import manifest_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from method_harness import ATTENTION, HIDDEN, Case, one_picture, run, shape_of

from edgecomp import methods
from edgecomp.budget import nearest, tokens_of
from edgecomp.methods import reference
from edgecomp.methods.base import Averaging, BudgetError, Merging, Method, Place, Selection
from edgecomp.methods.dart import Dart
from edgecomp.methods.pool import Pool
from edgecomp_runtime.manifest import TileInfo

TIE = 1e-5  # relative; below it, rounding in fp32 may decide
LAWS = settings(deadline=None, max_examples=12)  # of each method at each of its sites
MANY = settings(deadline=None, max_examples=60)
SEEDS = st.integers(0, 2**32 - 1)
GRIDS = st.sampled_from([(1, 1), (1, 7), (5, 1), (2, 3), (3, 8), (5, 5), (7, 6), (8, 8)])
ANY_GRID = st.tuples(st.integers(1, 8), st.integers(1, 8))
PERCENT = st.sampled_from([75, 50, 33, 11, 5])

# Parameters to draw: the one row that a method with parameters has here.
PARAMETERS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "random": {"seed": st.integers(0, 9)},
    "dart": {"pivots": st.sampled_from([1, 2, 3, 8, 12])},
    "cdpruner": {"sign": st.sampled_from([1, -1])},
    "hiprune": {"alpha": st.sampled_from([0, 0.1, 0.5, 1]), "layer": st.sampled_from([-1, 0, 5])},
    "visionzip": {"share": st.sampled_from([0, 50, 84.375, 100]), "mean": st.sampled_from([0, 1]), "columns": st.sampled_from([0, 1])},
    "vispruner": {"important": st.sampled_from([0, 30, 50, 100]), "step": st.sampled_from([1, 3, 8, 64])},
}

EVERY = [pytest.param(name, site, id=f"{name}-{site}") for name in methods.METHODS for site in methods.method_type(name).taxonomy.sites]
SELECTING = [case for case in EVERY if issubclass(methods.method_type(str(case.values[0])), Selection)]
MERGING = [case for case in EVERY if case not in SELECTING]


def possible(grid: tuple[int, int]) -> set[int]:
    """The budgets that pooling can make, in whole numbers: h x w cells within the grid, aspects within a factor of two."""
    rows, columns = grid
    return {h * w for h in range(1, rows + 1) for w in range(1, columns + 1) if w * rows <= 2 * h * columns and h * columns <= 2 * w * rows}


# drawing methods, places and pictures

def drawn_method(draw: st.DrawFn, name: str) -> Method:
    return methods.make(name, **{key: draw(values) for key, values in PARAMETERS.get(name, {}).items()})


def takes(method: Method, place: Place) -> bool:
    try:
        method.check(place)
    except BudgetError:
        return False
    return True


def drawn_place(draw: st.DrawFn, method: Method, site: str, everything: bool = False) -> Place:
    """A place whose budget the method can make: a usual part of the tokens or any count, or the nearest to it."""
    grid = draw(GRIDS)
    tokens = grid[0] * grid[1]
    regular = method.taxonomy.grid or draw(st.booleans())
    grid = grid if regular else (1, tokens)
    if everything:
        return Place(grid, tokens, site)
    wanted = draw(st.one_of(PERCENT.map(lambda percent: max(1, math.floor(tokens * percent / 100 + 0.5))), st.integers(1, tokens)))
    budgets = sorted(range(1, tokens + 1), key=lambda keep: (abs(keep - wanted), keep))
    return next(place for keep in budgets if takes(method, place := Place(grid, keep, site)))


KINDS = ("plain", "duplicates", "zeros", "huge", "ties")


def made_up(kind: str, seed: int, images: int, method: Method, place: Place, dtype: Any = np.float32, text: int = 9) -> Case:
    """Pictures: without ties, with duplicates of a few tokens, with tokens of zeros, of huge values, of small whole numbers."""
    generator = np.random.default_rng(seed)
    same = generator.integers(0, 3, place.tokens)  # which tokens are duplicates, where the kind has any

    def rows(shape: list[int]) -> np.ndarray:
        values = generator.normal(0, 3, (images, *shape))
        if kind == "ties":
            values = generator.integers(-2, 3, (images, *shape)).astype(float)
        elif kind == "huge":
            values = generator.uniform(-1e4, 1e4, (images, *shape))
        elif kind == "duplicates" and shape[0] == place.tokens:
            values = values[:, same % place.tokens]
        elif kind == "zeros" and shape[0] == place.tokens:
            values[:, same == 0] = 0
        return values.astype(dtype)

    def attention(shape: list[int]) -> np.ndarray:
        values = generator.random((images, *shape))
        if kind == "ties":
            values = generator.integers(0, 3, (images, *shape)) / 4.0
        elif kind == "duplicates":
            values = values[..., same % place.tokens]
        elif kind == "zeros":
            values[..., same == 0] = 0
        return (values / 2 ** math.ceil(math.log2(place.tokens + 1))).astype(np.float32)  # a row sums to 1 at most

    inputs = [rows([place.tokens, HIDDEN])]
    for signal in method.signals(place.site):
        shape = [int(n) for n in shape_of(signal, place.tokens, text)]
        inputs.append(attention(shape) if signal.split(":")[0] in ATTENTION else rows(shape))
    return Case(method, place, tuple(inputs))


@st.composite
def cases(draw: st.DrawFn, name: str, site: str, *, kinds: tuple[str, ...] = KINDS, images: int | None = None, dtype: Any = np.float32,
          everything: bool = False) -> Case:
    method = drawn_method(draw, name)
    place = drawn_place(draw, method, site, everything)
    images = images or draw(st.integers(1, 3))
    return made_up(draw(st.sampled_from(kinds)), draw(SEEDS), images, method, place, dtype, text=draw(st.sampled_from([9, 9, 8, 14])))


def close(method: Method, tokens: np.ndarray, expected: np.ndarray, size: float = 1.0) -> None:
    """Selected tokens are the same to the bit; merged ones to rounding, relative to the size of the features."""
    np.testing.assert_allclose(tokens, expected, atol=2e-6 * size if isinstance(method, Merging) else 0, rtol=0)


def followed(case: Case, order: np.ndarray) -> list[reference.StepCheck]:
    """The steps of a selection of one picture, each given those before it."""
    assert isinstance(case.method, Selection)
    return reference.follow(case.method.rule(case.place, *(values[0].astype(np.float64) for values in case.inputs)), order)


def faults(case: Case, order: np.ndarray) -> list[tuple[int, reference.StepCheck]]:
    """The steps where a choice is not the rule's and not a tie up to rounding either."""
    return [(n, check) for n, check in enumerate(followed(case, order)) if not check.agrees and check.margin > TIE]


# every method

@pytest.mark.parametrize(("name", "site"), EVERY)
@LAWS
@given(st.data())
def test_exactly_k_tokens_at_unique_ascending_places(name: str, site: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, site))
    tokens, kept, order = run(case)
    place = case.place
    assert tokens.shape == (case.images, place.keep, HIDDEN) and tokens.dtype == np.float32
    assert np.isfinite(tokens).all()
    assert kept.shape == order.shape == (case.images, place.keep) and kept.dtype == order.dtype == np.int64
    assert kept.min() >= 0 and kept.max() < place.tokens
    assert (np.diff(kept, axis=1) > 0).all()
    np.testing.assert_array_equal(np.sort(order, 1), kept)


@pytest.mark.parametrize(("name", "site"), EVERY)
@LAWS
@given(st.data())
def test_keeping_everything_changes_nothing(name: str, site: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, site, everything=True))
    tokens, kept, _ = run(case)
    assert kept.tolist() == [list(range(case.place.tokens))] * case.images
    close(case.method, tokens, case.inputs[0], np.abs(case.inputs[0]).max())


@pytest.mark.parametrize(("name", "site"), EVERY)
@LAWS
@given(st.data())
def test_a_picture_fares_the_same_alone_and_in_a_batch(name: str, site: str, data: st.DataObject) -> None:
    merging = issubclass(methods.method_type(name), Merging)
    case = data.draw(cases(name, site, images=3, kinds=("plain", "huge") if merging else KINDS))
    together = run(case)
    for picture in range(3):
        single = case.picture(picture)
        alone = run(single)
        if not merging and (alone[2][0] != together[2][picture]).any():  # kernels round another way: no fault where two tokens tie
            assert faults(single, alone[2][0]) == faults(single, together[2][picture]) == []
            continue
        np.testing.assert_array_equal(alone[1][0], together[1][picture])
        close(case.method, alone[0][0], together[0][picture], np.abs(case.inputs[0]).max())


@pytest.mark.parametrize(("name", "site"), EVERY)
@LAWS
@given(st.data())
def test_the_graph_chooses_as_the_numpy_rule_does(name: str, site: str, data: st.DataObject) -> None:
    """Where a graph parts from its rule, the rule's own choice must have been a tie up to rounding."""
    merging = issubclass(methods.method_type(name), Merging)
    case = data.draw(cases(name, site, images=1, kinds=("plain",) if merging else KINDS))  # a merging's trajectory cannot be followed through ties
    tokens, kept, order = run(case)
    if not merging:
        assert faults(case, order[0]) == []
        if not all(check.agrees for check in followed(case, order[0])):
            return
    expected, places = reference.compress(case.method, case.place, *(values[0] for values in case.inputs))
    assert kept[0].tolist() == places.tolist()
    np.testing.assert_allclose(tokens[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "site"), EVERY)
@LAWS
@given(st.data())
def test_half_precision_features_stay_half(name: str, site: str, data: st.DataObject) -> None:
    """The rule is computed in fp32 all the same: it keeps what it keeps of the same values given in fp32."""
    half = data.draw(cases(name, site, dtype=np.float16))
    tokens, _, order = run(half)
    assert tokens.dtype == np.float16
    single = run(Case(half.method, half.place, tuple(values.astype(np.float32) for values in half.inputs)))
    np.testing.assert_array_equal(order, single[2])
    size = np.abs(half.inputs[0]).astype(np.float32).max() if isinstance(half.method, Merging) else 0
    np.testing.assert_allclose(tokens.astype(np.float32), single[0], atol=2e-3 * size, rtol=0)


FORBIDDEN = {"NonZero", "Compress", "Unique", "Loop", "If", "Scan", "CumSum", "RandomUniform", "RandomNormal", "Multinomial"}


@pytest.mark.parametrize(("name", "site"), EVERY)
def test_no_operator_that_an_engine_refuses(name: str, site: str) -> None:
    """What TensorRT takes: no shapes that depend on values, no reducing scatter, no TopK of more than 3840, no fp64."""
    method = methods.make(name)
    function = method.function(Place((24, 24), 64, site))
    numbers: dict[str, ir.TensorProtocol] = {}
    for node in function:
        assert node.domain == "" and node.op_type not in FORBIDDEN, node.op_type
        assert not [a for a in node.attributes.values() if a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)]
        if node.op_type.startswith("Scatter"):
            assert "reduction" not in node.attributes or node.attributes["reduction"].as_string() == "none"
        if node.op_type == "Constant":
            numbers[str(node.outputs[0].name)] = tensor = node_value(node)
            assert tensor.dtype != ir.DataType.DOUBLE
        if node.op_type == "Cast":
            assert node.attributes["to"].as_int() != ir.DataType.DOUBLE
        if node.op_type == "TopK":
            assert int(numbers[str(node.inputs[1].name)].numpy()[0]) <= 3840  # a constant, and not too large


def node_value(node: ir.Node) -> ir.TensorProtocol:
    """A Constant's tensor, however its attribute gives it."""
    (attribute,) = node.attributes.values()
    return attribute.as_tensor() if attribute.type == ir.AttributeType.TENSOR else ir.tensor(attribute.value)


# selection

@pytest.mark.parametrize(("name", "site"), SELECTING)
@LAWS
@given(st.data())
def test_selected_tokens_are_features_bit_for_bit(name: str, site: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, site))
    features = case.inputs[0]
    features.reshape(-1)[::7] = -0.0
    tokens, kept, _ = run(case)
    for picture in range(case.images):
        np.testing.assert_array_equal(tokens[picture].view(np.int32), features[picture][kept[picture]].view(np.int32))


@MANY
@given(ANY_GRID, st.sampled_from([("cls", "projector"), ("fastv", "decoder"), ("pyramiddrop", "decoder")]), st.data())
def test_ties_of_attention_go_to_the_lower_index(grid: tuple[int, int], method: tuple[str, str], data: st.DataObject) -> None:
    tokens, (name, site) = grid[0] * grid[1], method
    keep = data.draw(st.integers(1, tokens))
    scores = data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.5]), min_size=tokens, max_size=tokens))
    _, kept, order = run(one_picture(name, Place(grid, keep, site), np.zeros((tokens, HIDDEN)), np.array(scores)))
    expected = sorted(range(tokens), key=lambda i: (-scores[i], i))[:keep]
    assert order[0].tolist() == expected and kept[0].tolist() == sorted(expected)


@pytest.mark.parametrize(("name", "site"), [("cls", "projector"), ("dart", "projector"), ("divprune", "projector"), ("cdpruner", "projector"),
                                            ("dart", "decoder"), ("fastv", "decoder"), ("pyramiddrop", "decoder"), ("sparsevlm", "decoder")])
@pytest.mark.parametrize(("grid", "keep"), [((1, 1), 1), ((2, 3), 4), ((8, 8), 5), ((8, 8), 37), ((24, 24), 64)])
def test_where_all_tokens_are_equal_the_first_ones_stay(name: str, site: str, grid: tuple[int, int], keep: int) -> None:
    method, place = methods.make(name), Place(grid, keep, site)
    inputs = []
    for signal in ("features", *method.signals(site)):
        shape = [2, place.tokens, HIDDEN] if signal == "features" else [2, *(int(n) for n in shape_of(signal, place.tokens, 9))]
        values = np.full(shape, 1 / 1024, np.float32)
        if signal not in ATTENTION:
            values[...] = 0
            values[..., :4] = 1  # of length 2: nothing is rounded
        inputs.append(values)
    _, kept, _ = run(Case(method, place, tuple(inputs)))
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


@MANY
@given(ANY_GRID, st.integers(1, 12), st.data())
def test_dart_on_tokens_full_of_ties_is_the_greedy_loop(grid: tuple[int, int], pivots: int, data: st.DataObject) -> None:
    place = Place(grid, data.draw(st.integers(1, grid[0] * grid[1])))
    token = st.tuples(st.integers(0, HIDDEN - 1), st.sampled_from([-4, -2, -1, 0, 1, 2]))
    along = data.draw(st.lists(token, min_size=place.tokens, max_size=place.tokens))
    features = np.zeros((place.tokens, HIDDEN))
    for index, (axis, length) in enumerate(along):
        features[index, axis] = length
    expected = greedy_dart(along, place.keep, pivots)
    assert run(one_picture("dart", place, features, pivots=pivots))[2][0].tolist() == expected
    assert reference.select(Dart(pivots).rule(place, features)).tolist() == expected


@given(ANY_GRID, st.integers(1, 16), st.sampled_from(["projector", "encoder", "decoder"]), st.data())
def test_darts_pivots_share_the_budget_evenly(grid: tuple[int, int], pivots: int, site: str, data: st.DataObject) -> None:
    place = Place(grid, data.draw(st.integers(1, grid[0] * grid[1])), site)
    shares = Dart(pivots).shares(place)
    assert Dart(pivots).split(place)[0] + sum(shares) == place.keep
    assert max(shares) - min(shares) <= 1 and shares == sorted(shares, reverse=True)


@MANY
@given(ANY_GRID, st.integers(0, 10**6), st.data())
def test_random_is_pythons_sample_whatever_the_picture(grid: tuple[int, int], seed: int, data: st.DataObject) -> None:
    place = Place(grid, data.draw(st.integers(1, grid[0] * grid[1])))
    _, kept, _ = run(made_up("plain", seed, 2, methods.make("random", seed=seed), place))
    assert kept.tolist() == [sorted(random.Random(seed).sample(range(place.tokens), place.keep))] * 2


@MANY
@given(ANY_GRID, st.data())
def test_stride_is_the_floor_of_equal_steps(grid: tuple[int, int], data: st.DataObject) -> None:
    place = Place(grid, data.draw(st.integers(1, grid[0] * grid[1])))
    _, kept, _ = run(made_up("plain", 0, 2, methods.make("stride"), place))
    assert kept.tolist() == [[math.floor(Fraction(i * place.tokens, place.keep)) for i in range(place.keep)]] * 2


# merging

def weights_of(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The matrix [K, N] that the graph itself applies to a case of one picture, and its places: its answer to the N unit vectors, HIDDEN at a time.

    That is the whole matrix, since no merging here reads features to find its weights.
    """
    tokens = case.place.tokens
    unit = np.eye(tokens, -(-tokens // HIDDEN) * HIDDEN, dtype=np.float32)
    parts = np.stack(np.split(unit, unit.shape[1] // HIDDEN, axis=1))  # [B, N, HIDDEN]
    found, kept, _ = run(Case(case.method, case.place, (parts, *(np.repeat(values, len(parts), 0) for values in case.inputs[1:]))))
    return np.concatenate(list(found), 1)[:, :tokens], kept[0]


@pytest.mark.parametrize(("name", "site"), MERGING)
@LAWS
@given(st.data())
def test_each_merged_token_stands_at_one_of_its_sources(name: str, site: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, site, images=1, kinds=("plain",)))
    weights, kept = weights_of(case)
    assert (weights >= 0).all() and (weights[np.arange(case.place.keep), kept] > 0).all()
    assert (np.diff(kept) > 0).all()
    assert isinstance(case.method, Merging)
    expected, places = case.method.matrix(case.place, *(values[0].astype(np.float64) for values in case.inputs))
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    assert kept.tolist() == places.tolist()


@pytest.mark.parametrize(("name", "site"), MERGING)
@LAWS
@given(st.data())
def test_merging_loses_no_source(name: str, site: str, data: st.DataObject) -> None:
    """Rows sum to 1 and every token has a part, but in VisionZip as it is: target plus mean, and without a target the rest is dropped."""
    case = data.draw(cases(name, site, images=1, kinds=KINDS))
    weights, _ = weights_of(case)
    sums = weights.sum(1)
    if name == "visionzip":
        assert ((np.abs(sums - 1) < 1e-5) | (np.abs(sums - 2) < 1e-5)).all()
        assert ((weights > 0).sum(0) <= 1).all()
        return
    np.testing.assert_allclose(sums, 1, atol=1e-5)
    assert (weights.sum(0) > 0).all()
    if isinstance(case.method, Averaging):
        np.testing.assert_allclose(weights.sum(0), case.place.keep / case.place.tokens, atol=1e-6)
    else:
        assert ((weights > 0).sum(0) == 1).all()


@st.composite
def pooling(draw: st.DrawFn) -> Place:
    grid = draw(ANY_GRID)
    return Place(grid, draw(st.sampled_from(sorted(possible(grid)))))


@MANY
@given(pooling())
def test_pooling_averages_over_cells_of_the_nearest_aspect(place: Place) -> None:
    (rows, columns), (weights, _) = place.grid, weights_of(made_up("plain", 0, 1, Pool(), place))
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


@pytest.mark.parametrize("name", ["pool", "grid"])
def test_pooling_refuses_just_the_budgets_it_cannot_make_and_names_the_nearest(name: str) -> None:
    method = methods.make(name)
    for grid, step in [*((grid, 1) for grid in itertools.product(range(1, 9), range(1, 9))), ((24, 24), 41)]:
        fits, picture = possible(grid), manifest_of([TileInfo(0, *grid, grid[1])])
        for keep in range(1, grid[0] * grid[1] + 1, step):
            place = Place(grid, keep)
            if keep in fits:
                method.check(place)
                assert nearest(picture, method, keep) == keep
                continue
            with pytest.raises(BudgetError, match=f"{name} cannot make {keep} tokens of a {grid[0]}x{grid[1]} grid") as refused:
                method.check(place)
            named = [int(n) for n in re.findall(r"\d+", str(refused.value).split("nearest budgets are ")[1])]
            assert named == sorted(set(named)) and set(named) <= fits
            assert sorted(abs(n - keep) for n in named) == sorted(abs(n - keep) for n in fits)[:2]
            assert abs(nearest(picture, method, keep) - keep) == min(abs(n - keep) for n in fits)


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
