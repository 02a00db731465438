"""Budgets and methods on pictures of several tiles: how a budget is shared, what is kept of each tile, and where that is on the picture.

Graphs are made by hand: features in, a mark on them and on deepstack features, both out; run by onnxruntime after splicing and lowering.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from conftest import manifest_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgecomp import methods
from edgecomp.budget import Reduction, Tokens, nearest, parts_of, places_of, quotas
from edgecomp.canvas import on_canvas
from edgecomp.dialects import lowering
from edgecomp.ir.graphs import describe
from edgecomp.methods import reference
from edgecomp.methods.base import BudgetError, Merging, Method, Place
from edgecomp.passes.splice import at_projector
from edgecomp_runtime.manifest import Manifest, TileInfo

WIDTH = 5
LAWS = settings(deadline=None, max_examples=80)
METHODS = [methods.make("stride"), methods.make("random", seed=3), methods.make("dart", pivots=2), methods.make("pool")]


# how a budget is shared

def shared(sizes: Sequence[int], keep: int, overview: int) -> list[int]:
    """One token at a time, to the tile that has the fewest and is not full; among equals to the overview, then to the first."""
    order = [overview, *(n for n in range(len(sizes)) if n != overview)]
    parts = [0] * len(sizes)
    for _ in range(keep):
        tile = min((n for n in order if parts[n] < sizes[n]), key=lambda n: (parts[n], order.index(n)))
        parts[tile] += 1
    return parts


@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.data())
def test_parts_are_equal_but_for_full_tiles_and_the_remainder(sizes: list[int], data: st.DataObject) -> None:
    keep = data.draw(st.integers(len(sizes), sum(sizes)))
    overview = data.draw(st.sampled_from([0, len(sizes) - 1]))
    parts = quotas(sizes, keep, [overview, *(n for n in range(len(sizes)) if n != overview)])
    assert parts == shared(sizes, keep, overview)
    assert sum(parts) == keep and all(1 <= part <= size for part, size in zip(parts, sizes))
    waiting = [part for part, size in zip(parts, sizes) if part < size]
    assert not waiting or max(waiting) - min(waiting) <= 1


@pytest.mark.parametrize(("sizes", "keep", "overview", "parts"), [
    ([576] * 5, 100, 0, [20] * 5), ([576] * 5, 103, 0, [21, 21, 21, 20, 20]), ([576] * 5, 103, 4, [21, 21, 20, 20, 21]),
    ([9, 100, 100], 60, 0, [9, 26, 25]), ([9, 100, 100], 60, 2, [9, 25, 26]), ([4, 4], 8, 1, [4, 4]), ([7], 3, 0, [3]), ([2, 9], 11, 0, [2, 9])])
def test_parts_as_they_are_documented(sizes: list[int], keep: int, overview: int, parts: list[int]) -> None:
    assert quotas(sizes, keep, [overview, *(n for n in range(len(sizes)) if n != overview)]) == parts


@st.composite
def pictures(draw: st.DrawFn) -> Manifest:
    """Tiles side by side in one raster with or without newlines, or one behind another with or without separators; an overview or none."""
    overview = draw(st.sampled_from(["", "first", "last", "last of canvas"]))
    rows, columns, high, wide = (draw(st.integers(1, 3)) for _ in range(4))
    newline, raster = draw(st.integers(0, 1)), draw(st.booleans())
    small = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    tiles: list[TileInfo] = []
    tokens = 0
    if overview == "first":
        tiles.append(TileInfo(0, *small, small[1] + newline))
        tokens = small[0] * (small[1] + newline)
    if raster:
        stride = columns * wide + newline
        tiles += [TileInfo(tokens + r * high * stride + c * wide, high, wide, stride) for r in range(rows) for c in range(columns)]
        tokens += rows * high * stride
    else:
        tiles += [TileInfo(tokens + n * (high * wide + newline), high, wide, wide) for n in range(rows * columns)]
        tokens += rows * columns * (high * wide + newline)
    if overview.startswith("last"):
        tiles.append(TileInfo(tokens, *small, small[1]))
        tokens += small[0] * small[1]
    return manifest_of(tiles, tokens, cut=(rows, columns), overview=overview)


def inside(tile: TileInfo) -> list[int]:
    return [tile.start + r * tile.stride + c for r in range(tile.rows) for c in range(tile.columns)]


@LAWS
@given(pictures())
def test_the_made_up_pictures_have_each_token_in_one_tile_at_most(picture: Manifest) -> None:
    every = [k for tile in picture.vision.tiles for k in inside(tile)]
    assert len(every) == len(set(every)) and set(every) <= set(range(picture.vision.tokens))
    assert [places_of(tile).tolist() for tile in picture.vision.tiles] == [inside(tile) for tile in picture.vision.tiles]


@LAWS
@given(pictures(), st.data())
def test_places_are_the_tiles_grids_and_parts_or_one_clear_line(picture: Manifest, data: st.DataObject) -> None:
    vision = picture.vision
    sizes = [len(inside(tile)) for tile in vision.tiles]
    keep = data.draw(st.integers(1, vision.tokens))
    if keep == vision.tokens or len(sizes) <= keep <= sum(sizes):
        found = places(picture, keep)
        assert [place.grid for place in found] == [(tile.rows, tile.columns) for tile in vision.tiles]
        last = picture.image.overview.startswith("last")
        assert [place.keep for place in found] == (sizes if keep == vision.tokens else shared(sizes, keep, len(sizes) - 1 if last else 0))
        return
    with pytest.raises(BudgetError) as refused:
        places(picture, keep)
    every = f", or all {vision.tokens}" if vision.tokens > sum(sizes) else ""
    assert str(refused.value) == (f"a budget of {keep} cannot be shared among this picture's {len(sizes)} tiles, which have {sum(sizes)} visual "
                                  f"tokens: choose {len(sizes)} to {sum(sizes)}{every}")


@LAWS
@given(pictures(), st.sampled_from(METHODS), st.data())
def test_the_nearest_budget_is_one_that_can_be_made_and_none_is_nearer(picture: Manifest, method: Method, data: st.DataObject) -> None:
    def can(keep: int) -> bool:
        try:
            for place in places(picture, keep):
                method.check(place)
        except BudgetError:
            return False
        return True
    keep = data.draw(st.integers(1, picture.vision.tokens))
    assert can(picture.vision.tokens), "all tokens can always be kept"
    assert nearest(picture, method, keep) == min(filter(can, range(1, picture.vision.tokens + 1)), key=lambda k: (abs(k - keep), k))


def places(picture: Manifest, keep: int) -> tuple[Place, ...]:
    return tuple(part.place for part in parts_of(Tokens.of(picture), keep))


# what is kept

def graph(picture: Manifest, stacked: int, dtype: ir.DataType) -> ir.Model:
    """pixels [images, N, WIDTH], and so many times as deepstack features what they are times 2, 3 ..., each with its mark."""
    shape = ["images", picture.vision.tokens, WIDTH]
    pixels = ir.Value(name="pixels", type=ir.TensorType(dtype), shape=ir.Shape(shape))
    nodes, outputs, constants = [], [], []
    for layer in range(-1, stacked):
        factor = ir.tensor(np.array(layer + 2, dtype.numpy()), name=f"factor{layer}")
        constants.append(ir.Value(name=f"factor{layer}", type=ir.TensorType(dtype), shape=ir.Shape([]), const_value=factor))
        nodes.append(ir.node("Mul", [pixels, constants[-1]]))
        signal = "deepstack" if layer >= 0 else "visual_tokens"
        nodes.append(ir.node("Mark", nodes[-1].outputs, {"signal": signal, "layer": layer}, domain="edgecomp"))
        for value in (*nodes[-2].outputs, *nodes[-1].outputs):
            value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
        outputs.append(nodes[-1].outputs[0])
        outputs[-1].name = f"deepstack.{layer}" if layer >= 0 else "visual_tokens"
    made = ir.Graph([pixels], outputs, nodes=nodes, initializers=constants, opset_imports={"": 23, "edgecomp": 1}, name="vision")
    return ir.Model(made, ir_version=10)


def run(model: ir.Model, pixels: np.ndarray) -> dict[str, np.ndarray]:
    lowering("onnxruntime")(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, {"pixels": pixels})))


@st.composite
def compressing(draw: st.DrawFn) -> tuple[Manifest, Method, tuple[Place, ...]]:
    picture, method = draw(pictures()), draw(st.sampled_from(METHODS))
    sizes = [len(inside(tile)) for tile in picture.vision.tiles]
    keep = draw(st.integers(len(sizes), sum(sizes)))
    if isinstance(method, Merging):
        keep = nearest(picture, method, keep)
        assume(keep <= sum(sizes))
    return picture, method, places(picture, keep)


@LAWS
@given(compressing(), st.integers(1, 2), st.integers(0, 2), st.sampled_from([ir.DataType.FLOAT, ir.DataType.FLOAT16]), st.integers(0, 10**6))
def test_each_tile_keeps_its_part_by_the_methods_own_rule(case: tuple[Manifest, Method, tuple[Place, ...]], images: int, stacked: int,
                                                          dtype: ir.DataType, seed: int) -> None:
    picture, method, parts = case
    pixels = np.random.default_rng(seed).normal(0, 2, (images, picture.vision.tokens, WIDTH)).astype(dtype.numpy())
    model = graph(picture, stacked, dtype)
    at_projector(model, picture.vision, Reduction.of(method, Tokens.of(picture), sum(place.keep for place in parts)))
    described = {t.name: (t.role, t.shape, t.layer) for t in describe(model).outputs}
    total = sum(place.keep for place in parts)
    assert described == {"visual_tokens": ("visual_tokens", ("images", total, WIDTH), None), "kept": ("kept", ("images", total), None),
                         **{f"deepstack.{n}": ("deepstack", ("images", total, WIDTH), n) for n in range(stacked)}}
    out = run(model, pixels)
    assert list(out) == list(described)
    near = {"atol": 2e-2 if dtype == ir.DataType.FLOAT16 else 1e-5, "rtol": 1e-3} if isinstance(method, Merging) else {"atol": 0, "rtol": 0}
    for image in range(images):
        rows: list[tuple[int, list[np.ndarray]]] = []
        for tile, place in zip(picture.vision.tiles, parts):
            mine = inside(tile)
            _, kept = reference.compress(method, place, pixels[image][mine].astype(np.float64))
            assert len(kept) == place.keep
            for at, k in enumerate(kept):
                token = pixels[image][mine[k]].astype(np.float64)
                if isinstance(method, Merging):
                    token = method.weights(place)[at] @ pixels[image][mine].astype(np.float64)
                rows.append((mine[k], [token * factor for factor in range(1, stacked + 2)]))
        rows.sort(key=lambda row: row[0])
        assert out["kept"][image].tolist() == [place for place, _ in rows]
        for factor, name in enumerate(["visual_tokens", *(f"deepstack.{n}" for n in range(stacked))]):
            assert out[name].dtype == dtype.numpy()
            np.testing.assert_allclose(out[name][image], np.stack([values[factor] for _, values in rows]).astype(dtype.numpy()), **near)


@LAWS
@given(pictures(), st.sampled_from(METHODS), st.integers(1, 2), st.integers(0, 2), st.integers(0, 10**6))
def test_a_budget_of_everything_keeps_everything_separators_among_it(picture: Manifest, method: Method, images: int, stacked: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).normal(0, 2, (images, picture.vision.tokens, WIDTH)).astype(np.float32)
    model = graph(picture, stacked, ir.DataType.FLOAT)
    at_projector(model, picture.vision, Reduction.of(method, Tokens.of(picture), picture.vision.tokens))
    out = run(model, pixels)
    assert out["kept"].tolist() == [list(range(picture.vision.tokens))] * images
    for factor, name in enumerate(["visual_tokens", *(f"deepstack.{n}" for n in range(stacked))], 1):
        np.testing.assert_allclose(out[name], pixels * np.float32(factor), atol=1e-5 if isinstance(method, Merging) else 0, rtol=0)


# where it is on the picture

@LAWS
@given(pictures())
def test_kept_tokens_are_shown_where_their_tile_is(picture: Manifest) -> None:
    (rows, columns), tiles = picture.image.tiles, list(picture.vision.tiles)
    if picture.image.overview:
        del tiles[0 if picture.image.overview == "first" else -1]
    high, wide = tiles[0].rows, tiles[0].columns
    canvas = np.full((rows * high, columns * wide), -1)
    for number, tile in enumerate(tiles):
        down, across = divmod(number, columns)
        canvas[down * high:(down + 1) * high, across * wide:(across + 1) * wide] = np.array(inside(tile)).reshape(high, wide)
    grid, shown = on_canvas(picture, canvas.reshape(-1).tolist())
    assert grid == canvas.shape and shown == list(range(canvas.size))
    beside = sorted(set(range(picture.vision.tokens)) - set(canvas.reshape(-1).tolist()))
    assert on_canvas(picture, beside) == (canvas.shape, [])


def test_a_grid_of_one_tile_is_the_pictures() -> None:
    assert on_canvas(manifest_of([TileInfo(0, 2, 3, 3)]), [0, 5]) == ((2, 3), [0, 5])
    assert math.prod(on_canvas(manifest_of([TileInfo(0, 24, 24, 24)]), [])[0]) == 576
