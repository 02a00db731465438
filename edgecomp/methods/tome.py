"""ToMe: pairs of like tokens merged in every layer of the vision tower (Token Merging, arXiv 2210.09461)."""
from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgecomp.methods.base import TAKEN, BudgetError, Merging, Op, Place, Taxonomy, ascending, fixed, gather, units, units_of, wide

FAR = 2.0**24  # behind every place


@dataclass(frozen=True)
class ToMe(Merging):
    """Bipartite matching: rows are dealt out to A (even ones) and B (odd ones), the r rows of A that are most like one of B join it.

    Likeness is the cosine of the layer's keys, mean over heads. A merged row is the mean of its sources, weighted by how many
    patches each stands for (its size), and attention counts a row as often: its logits gain log(size). At encoder:L this happens
    in every layer from L on, between attention and MLP (`edgecomp.passes.merge_layers`); at the projector in as few rounds as halving
    takes, all by the keys of the last layer. After each round rows stand as in the authors' code: A's unmerged ones (in order where there
    is a CLS row, which is never merged; else by falling likeness), then B.

    What differs from the authors' code: r is not the same in each layer but what makes exactly K tokens, spread evenly where
    at most half of the rows in each layer allows it; tokens are put in the order of their places at the end, each in that of its first source.
    """

    name = "tome"
    taxonomy = Taxonomy("like tokens merged in every layer of the tower (ToMe)", "arXiv 2210.09461", "merging",
                        sites={"encoder": ("keys",), "projector": ("keys",)})

    every_layer = True

    def first_layer(self, site: str, layers: int) -> int:
        return 0

    def stages(self, layer: int, layers: int, tokens: int, keep: int) -> list[tuple[int, int]]:
        schedule(layers - layer, tokens, keep)
        return [(layer, keep)]

    def build(self, op: Op, place: Place, features: ir.Value, *signals: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        x, end = op.Concat(wide(op, features), wide(op, signals[0]), axis=2), np.iinfo(np.int32).max
        width = op.Shape(features, start=2, end=3)
        size = op.Add(op.Mul(op.Slice(x, [0], [1], [2]), 0.0), 1.0)  # [B, N, 1]
        places = fixed(op, features, np.arange(place.tokens, dtype=np.float32))
        rows = place.tokens
        for remove in rounds(place):
            x, size, places = merge(op, x, op.Slice(x, width, [end], [2]), size, places, rows, remove, has_cls=False)
            rows -= remove
        tokens, kept = in_order(op, op.Slice(x, [0], width, [2]), places, place.keep)
        return op.CastLike(tokens, features), kept, op.Identity(kept)  # one value under two names would lose one of them when inlined

    def matrix(self, place: Place, features: NDArray[np.float64], *signals: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        counts, metric = np.eye(place.tokens), signals[0]
        for remove in rounds(place):
            weights = merged(metric, remove, has_cls=False) @ counts  # 0 or 1: which patches each row stands for
            metric, counts = weights @ signals[0] / weights.sum(1, keepdims=True), weights
        places = counts.argmax(1)
        rank = np.argsort(places)
        return (counts / counts.sum(1, keepdims=True))[rank], places[rank]


def schedule(layers: int, tokens: int, keep: int) -> list[int]:
    """How many rows each of so many layers merges away, at most half of what there are: evenly, or fewer at the end where K is small.

    Raises:
        BudgetError: halving in each layer leaves more than `keep`.
    """
    if tokens > keep * 2**layers:
        raise BudgetError(f"tome merges at most half of the tokens in a layer, so {layers} layers leave at least {-(-tokens // 2**layers)} "
                          f"of {tokens}, not {keep}: begin in an earlier layer or keep more")
    # a straight line from N to K, but never above what the layers behind can still halve to K
    left = [min(tokens - (tokens - keep) * n // layers, keep * 2**(layers - n)) for n in range(layers)] + [keep]
    return [before - after for before, after in pairwise(left)]


def rounds(place: Place) -> list[int]:
    """The schedule of as few rounds as there can be."""
    count = (-(-place.tokens // place.keep) - 1).bit_length()
    return schedule(count, place.tokens, place.keep) if count else []


def merge(op: Op, x: ir.Value, metric: ir.Value, size: ir.Value, places: ir.Value, rows: int, remove: int, *,
          has_cls: bool) -> tuple[ir.Value, ir.Value, ir.Value]:
    """One round: the `remove` rows of A that are most like one of B join it. All float32.

    Args:
        op: adds operators.
        x: what is merged, [B, S, D].
        metric: what likeness is the cosine of, [B, S, d].
        size: how many patches each row stands for, [B, S, 1].
        places: each row's place, [B, S].
        rows: S.
        remove: 1 to half of the rows, CLS not counted.
        has_cls: row 0 is CLS.

    Returns:
        x, size and places of S - remove rows.
    """
    evens, odds, end = (rows + 1) // 2, rows // 2, np.iinfo(np.int32).max

    def deal(value: ir.Value) -> tuple[ir.Value, ir.Value]:
        return op.Slice(value, [0], [end], [1], [2]), op.Slice(value, [1], [end], [1], [2])

    left, right = deal(units(op, metric))
    alike = op.MatMul(left, op.Transpose(right, perm=[0, 2, 1]))  # [B, A, B]
    best = op.ReduceMax(alike, [2], keepdims=0)
    if has_cls:
        best = op.Add(best, op.Constant(value=ir.tensor(np.array([TAKEN] + [0] * (evens - 1), np.float32))))
    _, ranked = op.TopK(best, [evens], axis=1, _outputs=2)
    source, stay = op.Slice(ranked, [0], [remove], [1]), op.Slice(ranked, [remove], [evens], [1])
    if has_cls:
        stay = ascending(op, stay, evens - remove)
    target = op.GatherElements(op.ArgMax(alike, axis=2, keepdims=0), source, axis=1)  # [B, r]
    joins = op.OneHot(target, odds, op.Constant(value=ir.tensor(np.array([0, 1], np.float32))), axis=1)  # [B, B, r]

    one, other = deal(op.Concat(op.Mul(x, size), size, axis=2))  # sizes are summed as one more column
    total = op.Concat(gather(op, one, stay), op.Add(other, op.MatMul(joins, gather(op, one, source))), axis=1)
    size = op.Slice(total, [-1], [end], [2])

    one, other = deal(places)
    joining = op.Unsqueeze(op.GatherElements(one, source, axis=1), [1])  # [B, 1, r]
    first = op.ReduceMin(op.Where(op.Cast(joins, to=ir.DataType.BOOL), joining, FAR), [2], keepdims=0)
    places = op.Concat(op.GatherElements(one, stay, axis=1), op.Min(other, first), axis=1)
    return op.Div(op.Slice(total, [0], [-1], [2]), size), size, places


def in_order(op: Op, tokens: ir.Value, places: ir.Value, count: int) -> tuple[ir.Value, ir.Value]:
    """Tokens [B, K, D] by ascending places [B, K], and these."""
    found, rank = op.TopK(places, [count], axis=1, largest=0, _outputs=2)
    return gather(op, tokens, rank), op.Cast(found, to=ir.DataType.INT64)


def merged(metric: NDArray[np.float64], remove: int, *, has_cls: bool) -> NDArray[np.float64]:
    """`merge` in numpy: which rows [S - remove, S] each row is the sum of, by the metric [S, d]."""
    unit = units_of(metric)
    alike = unit[::2] @ unit[1::2].T
    best = alike.max(1)
    if has_cls:
        best[0] = -np.inf
    ranked = np.argsort(-best, kind="stable")
    source, stay = ranked[:remove], ranked[remove:]
    rows = np.eye(len(metric))
    right = rows[1::2].copy()
    np.add.at(right, alike[source].argmax(1), rows[::2][source])
    return np.concatenate([rows[::2][np.sort(stay) if has_cls else stay], right])
