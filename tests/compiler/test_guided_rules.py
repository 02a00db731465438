"""The rules that the prompt guides, and PyramidDrop's schedule, against plain loops written from the papers; graphs run by onnxruntime."""
from __future__ import annotations

import functools
import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgecomp import methods
from edgecomp.methods import reference
from edgecomp.methods.base import DOMAIN, Method, Place, Selection
from edgecomp_runtime.errors import EdgecompError

WIDTH = 6  # of features, and of every signal that has a width
LAWS = settings(deadline=None, max_examples=60)
SEEDS = st.integers(0, 2**32 - 1)
GUIDED = [("fastv", "decoder"), ("pyramiddrop", "decoder"), ("sparsevlm", "decoder"), ("dart", "decoder"), ("cdpruner", "projector")]
PER_TEXT_ROW = ("text_embeddings", "text_normed", "text_keys", "text_attention")
PROBABILITIES = ("last_attention", "own_attention", "text_attention")


def shape(signal: str, images: Any, tokens: int, text: Any, width: int = WIDTH) -> list[Any]:
    rows = [text] if signal in PER_TEXT_ROW else [tokens]
    return [images, *rows] + ([] if signal in PROBABILITIES[:2] else [tokens] if signal == "text_attention" else [width])


@functools.lru_cache(maxsize=128)
def session(method: Method, place: Place, width: int, dtype: np.dtype) -> ort.InferenceSession:
    """A graph that is one call of the method's ONNX function; pictures and text rows are symbols."""
    kind = ir.DataType.from_numpy(dtype)
    shapes = {"features": ["images", place.tokens, width],
              **{s: shape(s, "images", place.tokens, "text", width) for s in method.signals(place.site)}}
    inputs = [ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(dims)) for name, dims in shapes.items()]
    function = method.function(place)
    call = ir.node(function.name, inputs, domain=DOMAIN, num_outputs=3)
    for value, name, of in zip(call.outputs, ("tokens", "kept", "order"), (kind, ir.DataType.INT64, ir.DataType.INT64)):
        value.name, value.type = name, ir.TensorType(of)
    graph = ir.Graph(inputs, call.outputs, nodes=[call], opset_imports={"": 23, DOMAIN: 1}, name="rule")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    model = ir.to_proto(ir.Model(graph, ir_version=10, functions=[function])).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(method: Method, place: Place, features: np.ndarray, *signals: np.ndarray) -> list[np.ndarray]:
    """The method in onnxruntime: features [B, N, D] and its signals -> tokens, kept, order."""
    feeds = dict(zip(("features", *method.signals(place.site)), (features, *signals)))
    return session(method, place, features.shape[2], features.dtype).run(None, feeds)  # type: ignore[no-any-return]


def order_of(method: Method, place: Place, features: np.ndarray, *signals: np.ndarray) -> list[int]:
    """The choice for one picture, from values without a batch axis."""
    return run(method, place, *(x[None].astype(np.float32) for x in (features, *signals)))[2][0].tolist()  # type: ignore[no-any-return]


def made_up(method: Method, place: Place, seed: int, images: int = 1, text: int = 8, width: int = WIDTH) -> list[np.ndarray]:
    """Features and signals without ties: attention rows are positive, the rest normal."""
    generator = np.random.default_rng(seed)
    values = [generator.normal(0, 2, (images, place.tokens, width))]
    for signal in method.signals(place.site):
        dims = shape(signal, images, place.tokens, text, width)
        values.append(generator.random(dims) if signal in PROBABILITIES else generator.normal(0, 2, dims))
    return [value.astype(np.float32) for value in values]


def follows(method: Selection, place: Place, order: np.ndarray, *values: np.ndarray) -> list[bool]:
    """For each step of a graph's choice for one picture: the numpy rule agrees, or in fp32 could not tell the two apart."""
    checks = reference.follow(method.rule(place, *(v.astype(np.float64) for v in values)), order)
    return [check.agrees or check.margin < 1e-3 for check in checks]


PLACES = st.tuples(st.integers(1, 6), st.integers(1, 6)).flatmap(
    lambda grid: st.tuples(st.just(grid), st.integers(1, grid[0] * grid[1])))
CALLS = st.tuples(st.sampled_from(GUIDED), PLACES).map(lambda x: (methods.make(x[0][0]), Place(*x[1], x[0][1])))


# what holds for all of them

@LAWS
@given(CALLS, st.integers(1, 3), st.sampled_from([8, 13]), SEEDS)
def test_the_graph_takes_the_rules_steps_and_each_picture_its_own(call: tuple[Selection, Place], images: int, text: int, seed: int) -> None:
    method, place = call
    values = made_up(method, place, seed, images, text)
    tokens, kept, order = run(method, place, *values)
    assert kept.shape == (images, place.keep) and (np.diff(kept, axis=1) > 0).all() and kept.min() >= 0 and kept.max() < place.tokens
    np.testing.assert_array_equal(np.sort(order, 1), kept)
    for picture in range(images):
        own = [value[picture] for value in values]
        np.testing.assert_array_equal(tokens[picture], own[0][kept[picture]])
        assert all(follows(method, place, order[picture], *own))
        np.testing.assert_array_equal(run(method, place, *(value[None] for value in own))[2][0], order[picture])


@LAWS
@given(CALLS, SEEDS)
def test_half_precision_values_are_compared_in_single(call: tuple[Selection, Place], seed: int) -> None:
    method, place = call
    values = [value.astype(np.float16) for value in made_up(method, place, seed)]
    tokens, _, order = run(method, place, *values)
    assert tokens.dtype == np.float16
    np.testing.assert_array_equal(order, run(method, place, *(value.astype(np.float32) for value in values))[2])


@pytest.mark.parametrize(("name", "site"), GUIDED)
@pytest.mark.parametrize("value", [0.0, 0.5, -60000.0, 1e30])
@pytest.mark.parametrize("keep", [1, 7, 16])
def test_where_nothing_tells_tokens_apart_the_first_ones_stay(name: str, site: str, value: float, keep: int) -> None:
    method, place = methods.make(name), Place((4, 4), keep, site)
    values = [np.full_like(v[:, :, :4], value) if v.ndim == 3 and v.shape[2] == WIDTH else np.full_like(v, 0.0625)
              for v in made_up(method, place, 0, 2)]
    tokens, kept, order = run(method, place, *values)
    assert kept.tolist() == order.tolist() == [list(range(keep))] * 2
    np.testing.assert_array_equal(tokens, values[0][:, :keep])


@LAWS
@given(CALLS, st.sampled_from([1e-30, 1e-6, 6e4, 1e30]), st.data())
def test_tokens_stay_distinct_with_zeros_duplicates_and_extremes(call: tuple[Selection, Place], scale: float, data: st.DataObject) -> None:
    method, place = call
    values = [value * np.float32(scale) for value in made_up(method, place, data.draw(SEEDS))]
    source = data.draw(st.lists(st.integers(0, place.tokens - 1), min_size=place.tokens, max_size=place.tokens))
    values = [v[:, source] if v.shape[1] == place.tokens else v for v in values]
    values[0][:, data.draw(st.integers(0, place.tokens - 1))] = 0
    kept = run(method, place, *values)[1][0]
    assert (np.diff(kept) > 0).all() and kept.min() >= 0 and kept.max() < place.tokens


# FastV and PyramidDrop

@LAWS
@given(st.sampled_from(["fastv", "pyramiddrop"]), PLACES, st.data())
def test_the_last_rows_largest_stay_ties_to_the_lower_index(name: str, at: tuple[tuple[int, int], int], data: st.DataObject) -> None:
    place = Place(*at, "decoder")
    row = data.draw(st.lists(st.sampled_from([0.0, 0.125, 0.25, 0.5]), min_size=place.tokens, max_size=place.tokens))
    expected = sorted(range(place.tokens), key=lambda i: (-row[i], i))[:place.keep]
    assert order_of(methods.make(name), place, np.zeros((place.tokens, WIDTH)), np.array(row)) == expected


def test_the_authors_schedule_of_pyramiddrop_is_a_half_at_each_quarter_of_the_layers() -> None:
    drop = methods.make("pyramiddrop")
    assert drop.stages(8, 32, 576, 72) == [(8, 288), (16, 144), (24, 72)]
    assert drop.stages(10, 40, 2880, 360) == [(10, 1440), (20, 720), (30, 360)]
    assert drop.stages(2, 32, 576, 64) == [(2, 276), (12, 133), (22, 64)]
    assert methods.make("pyramiddrop", cuts=1).stages(2, 32, 576, 64) == [(2, 64)]


@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 5000), st.data(), st.integers(1, 6))
def test_pyramiddrops_stages_fall_and_end_at_the_budget(layer: int, left: int, tokens: int, data: st.DataObject, cuts: int) -> None:
    keep = data.draw(st.integers(1, tokens))
    stages = methods.make("pyramiddrop", cuts=cuts).stages(layer, layer + left, tokens, keep)
    layers, kept = [at for at, _ in stages], [count for _, count in stages]
    assert 1 <= len(stages) <= cuts and kept[-1] == keep and layers[0] == layer and layers[-1] < layer + left
    assert all(a < b for a, b in itertools.pairwise(layers)) and all(a > b for a, b in itertools.pairwise(kept))
    assert kept[0] < tokens or keep == tokens
    # the largest whole k with (k / N)^cuts <= (K / N)^n, in exact arithmetic, for a stage n = 1..cuts
    roots = [next(k for k in range(keep, tokens + 1) if (k + 1) ** cuts > tokens ** (cuts - n) * keep ** n) for n in range(1, cuts + 1)] \
        if tokens < 700 else []
    assert not roots or set(kept) <= set(roots)
    if roots and left >= cuts:  # no two cuts on one layer: only stages that keep what the last one kept are missing
        assert kept == sorted(set(roots), reverse=True)


def test_other_methods_cut_once() -> None:
    assert methods.make("fastv").stages(2, 32, 576, 64) == methods.make("dart").stages(2, 32, 576, 64) == [(2, 64)]


@pytest.mark.parametrize(("name", "values", "message"), [
    ("pyramiddrop", {"cuts": 0}, "pyramiddrop needs at least one cut, not 0"),
    ("cdpruner", {"sign": 0}, "cdpruner's sign is 1 or -1, not 0"),
    ("dart", {"pivots": 0}, "dart needs at least one pivot, not 0"),
])
def test_a_parameter_out_of_range_is_refused(name: str, values: dict[str, int], message: str) -> None:
    with pytest.raises(EdgecompError, match=message):
        methods.make(name, **values)


# SparseVLM

def raters_of(visual: np.ndarray, text: np.ndarray) -> tuple[list[int], float]:
    """The text rows whose share of the visual tokens' attention is above the mean, and how near the nearest one is to the mean."""
    near = [0.0] * len(text)
    for v in visual.astype(float):
        products = [math.fsum(a * b for a, b in zip(v, t)) for t in text.astype(float)]
        powers = [math.exp(p - max(products)) for p in products]
        near = [n + power / math.fsum(powers) / len(visual) for n, power in zip(near, powers)]
    mean = math.fsum(near) / len(near)
    return [t for t, n in enumerate(near) if n > mean], min(abs(n - mean) for n in near)


@LAWS
@given(PLACES, st.sampled_from([8, 13]), st.sampled_from([0.1, 1.0, 200.0]), SEEDS)
def test_sparsevlm_sums_the_rows_of_its_raters(at: tuple[tuple[int, int], int], text: int, scale: float, seed: int) -> None:
    method, place = methods.make("sparsevlm"), Place(*at, "decoder")
    features, visual, words, _ = (v[0] for v in made_up(method, place, seed, text=text))
    visual = visual * np.float32(scale)
    attention = np.random.default_rng(seed).integers(0, 64, (text, place.tokens)) / 64  # sums are exact: ties are ties
    raters, margin = raters_of(visual, words)
    assume(margin > 1e-5)
    assert 0 < len(raters) < text
    scores = [sum(Fraction(attention[t, i]) for t in raters) for i in range(place.tokens)]
    expected = sorted(range(place.tokens), key=lambda i: (-scores[i], i))[:place.keep]
    assert order_of(method, place, features, visual, words, attention) == expected


def test_sparsevlm_counts_raters_a_picture() -> None:
    method, place = methods.make("sparsevlm"), Place((2, 2), 1, "decoder")
    visual, text, attention = np.zeros((3, 4, WIDTH)), np.zeros((3, 8, WIDTH)), np.zeros((3, 8, 4))
    visual[:, :, 0] = 1
    text[0, 5, 0], text[1, 2:4, 0] = 4, 4  # picture 0 has one rater, 1 has two, 2 none, so that all rate
    attention[:, 5, 3], attention[:, 2, 1], attention[:, :, 2] = 0.5, 0.25, 0.1
    values = [np.zeros((3, 4, WIDTH)), visual, text, attention]
    assert run(method, place, *(v.astype(np.float32) for v in values))[1].tolist() == [[3], [1], [2]]
    assert [reference.compress(method, place, *(v[n] for v in values))[1].tolist() for n in range(3)] == [[3], [1], [2]]


# CDPruner

def kernel(features: np.ndarray, text: np.ndarray, sign: int) -> np.ndarray:
    """The authors' conditional kernel diag(r) S diag(r), in float64."""
    cosine = [[x @ t / np.linalg.norm(x) / np.linalg.norm(t) for t in text] for x in features]
    relevance = sign * np.array(cosine).mean(1)
    relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    alike = np.array([[x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in features] for x in features])
    return np.asarray(relevance[:, None] * alike * relevance[None])


@settings(deadline=None, max_examples=40)
@given(st.integers(4, 14), st.integers(1, 6), st.sampled_from([1, -1]), SEEDS)
def test_cdpruner_adds_the_token_of_the_largest_determinant(tokens: int, keep: int, sign: int, seed: int) -> None:
    keep = min(keep, tokens - 1)
    method, place = methods.make("cdpruner", sign=sign), Place((1, tokens), keep)
    features, text = (v[0] for v in made_up(method, place, seed, width=16))
    process, order = kernel(features.astype(float), text.astype(float), sign), order_of(method, place, features, text)
    for step, index in enumerate(order):
        sets = {i: [*order[:step], i] for i in range(tokens) if i not in order[:step]}
        determinants = {i: float(np.linalg.det(process[subset][:, subset])) for i, subset in sets.items()}
        best = max(determinants, key=lambda i: determinants[i])
        assert index == best or determinants[index] > determinants[best] * (1 - 1e-3)


@LAWS
@given(st.integers(1, 20), st.sampled_from([1, -1]), st.data())
def test_cdpruner_on_tokens_along_axes_goes_by_novelty_relevance_and_index(tokens: int, sign: int, data: st.DataObject) -> None:
    """Duplicates, opposites and zeros in exact arithmetic: what is left of a token is all of it, or nothing."""
    keep = data.draw(st.integers(1, tokens))
    along = st.tuples(st.integers(0, 3), st.sampled_from([-4, -2, -1, 0, 1, 2]))
    picture, prompt = (data.draw(st.lists(along, min_size=n, max_size=n)) for n in (tokens, 8))
    features, text = np.zeros((tokens, WIDTH)), np.zeros((8, WIDTH))
    for values, rows in ((features, picture), (text, prompt)):
        for index, (axis, length) in enumerate(rows):
            values[index, axis] = length

    def cosine(a: tuple[int, int], b: tuple[int, int]) -> int:
        return 0 if a[0] != b[0] or not a[1] * b[1] else int(math.copysign(1, a[1] * b[1]))

    means = [sign * Fraction(sum(cosine(token, row) for row in prompt), 8) for token in picture]
    tiny, low = Fraction(1, 10**6), min(means)
    span = max(max(means) - low, tiny)
    expected: list[int] = []
    for _ in range(keep):
        seen = {picture[i][0] for i in expected if picture[i][1]}
        scores = {i: ((means[i] - low + tiny) / span) ** 2 * (1 if length and axis not in seen else Fraction(1, 10**5))
                  for i, (axis, length) in enumerate(picture) if i not in expected}
        expected.append(max(scores, key=lambda i: (scores[i], -i)))
    method, place = methods.make("cdpruner", sign=sign), Place((1, tokens), keep)
    assert order_of(method, place, features, text) == expected
    assert reference.select(method.rule(place, features, text)).tolist() == expected  # type: ignore[attr-defined]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("width", "keep"), [(64, 48), (64, 128), (8, 64), (256, 64)])
def test_cdpruner_stays_on_its_rule_at_scale_even_beyond_the_rank(width: int, keep: int, sign: int) -> None:
    """Clustered tokens, many near-duplicates; with more tokens to keep than dimensions the rest goes by relevance."""
    generator = np.random.default_rng(width + keep)
    centres = generator.normal(size=(24, width))
    features = (centres[generator.integers(0, 24, 256)] + 0.3 * generator.normal(size=(256, width))).astype(np.float32)
    text = generator.normal(size=(20, width)).astype(np.float32)
    method, place = methods.make("cdpruner", sign=sign), Place((16, 16), keep)
    order = np.array(order_of(method, place, features, text))
    assert len(set(order.tolist())) == keep
    assert all(follows(method, place, order, features, text))  # type: ignore[arg-type]


# DART in the decoder

def published(compared: list[tuple[int, int]], sized: list[int], words: list[tuple[int, int]], word_sizes: list[int], keep: int,
              pivots: int) -> list[int]:
    """DART in whole numbers where a state is (axis, signed length), so that cosines are -1, 0 or 1 and nothing is rounded."""
    def cosine(a: tuple[int, int], b: tuple[int, int]) -> int:
        return 0 if a[0] != b[0] or not a[1] * b[1] else int(math.copysign(1, a[1] * b[1]))

    of_text = pivots // 2
    chosen = sorted(range(len(sized)), key=lambda i: (-sized[i], i))[:min(pivots - of_text, keep)]
    visited = [compared[i] for i in chosen]
    visited += [words[i] for i in sorted(range(len(words)), key=lambda i: (-word_sizes[i], i))[:of_text]]
    rest = keep - len(chosen)
    for n, pivot in enumerate(visited):
        share = rest // len(visited) + (1 if n < rest % len(visited) else 0)
        chosen += sorted((i for i in range(len(compared)) if i not in chosen), key=lambda i: (cosine(compared[i], pivot), i))[:share]
    return chosen


@LAWS
@given(PLACES, st.integers(1, 17), st.sampled_from([8, 11]), st.data())
def test_dart_in_the_decoder_is_the_published_loop(at: tuple[tuple[int, int], int], pivots: int, text: int, data: st.DataObject) -> None:
    place = Place(*at, "decoder")
    state = st.tuples(st.integers(0, WIDTH - 1), st.sampled_from([-4, -2, -1, 0, 1, 2]))
    compared, words = (data.draw(st.lists(state, min_size=n, max_size=n)) for n in (place.tokens, text))
    signals = []
    for rows in (compared, words):
        states, keys = np.zeros((len(rows), WIDTH)), np.array(data.draw(st.lists(
            st.lists(st.integers(-2, 2), min_size=WIDTH, max_size=WIDTH), min_size=len(rows), max_size=len(rows))))
        for index, (axis, length) in enumerate(rows):
            states[index, axis] = length
        signals += [states, keys.astype(float)]
    sizes, word_sizes = ([sum(abs(int(x)) for x in key) for key in keys] for keys in (signals[1], signals[3]))
    expected = published(compared, sizes, words, word_sizes, place.keep, pivots)
    method, features = methods.make("dart", pivots=pivots), np.zeros((place.tokens, WIDTH))
    assert order_of(method, place, features, *signals) == expected
    assert reference.select(method.rule(place, features, *signals)).tolist() == expected  # type: ignore[attr-defined]


def test_dart_in_the_decoder_has_four_pivots_of_each_and_its_shares_are_the_authors() -> None:
    """The authors bring in K / 8 tokens a pivot and have the picture's four beside them; counted in, 4 + 8 x 16 are 132."""
    dart = methods.make("dart")
    place = Place((24, 24), 132, "decoder")
    assert dart.split(place) == (4, 4) and dart.shares(place) == [16] * 8  # type: ignore[attr-defined]
    assert dart.split(Place((24, 24), 132)) == (8, 0)  # type: ignore[attr-defined]


@given(PLACES, st.integers(1, 17))
def test_darts_shares_in_the_decoder_make_the_budget(at: tuple[tuple[int, int], int], pivots: int) -> None:
    dart, place = methods.make("dart", pivots=pivots), Place(*at, "decoder")
    dart.check(place)
    picture, text = dart.split(place)  # type: ignore[attr-defined]
    shares = dart.shares(place)  # type: ignore[attr-defined]
    assert picture + sum(shares) == place.keep and len(shares) == picture + text
    assert max(shares) - min(shares) <= 1 and shares == sorted(shares, reverse=True)


def test_dart_refuses_more_pivots_of_the_text_than_a_prompt_may_have() -> None:
    dart = methods.make("dart", pivots=18)
    dart.check(Place((4, 4), 8))
    with pytest.raises(EdgecompError, match=r"9 of 18 pivots from a prompt, .* choose 1\.\.17 pivots"):
        dart.check(Place((4, 4), 8, "decoder"))
