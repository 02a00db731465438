"""VisPruner: half of the tokens by CLS attention, half by dropping duplicates (Beyond Text-Visual Attention, arXiv 2412.01818)."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgecomp.methods.base import Op, Place, Rule, Selection, Step, Taxonomy, gather, top, units, units_of
from edgecomp_runtime.errors import EdgecompError

AUTHORS = 8  # tokens that the authors drop at a time
ROUNDING = 16  # differences of cosines below 1e-5 / 16 are what fp32 rounds away


@dataclass(frozen=True)
class VisPruner(Selection):
    """The tokens that CLS looks at most, and of the others those that are duplicated least.

    The others, in order of attention, are dealt out in two piles in turn; of the first pile the tokens whose best cosine
    to the second is highest go, the rest of it (most duplicated first) and the second pile are dealt out again, until the budget is met.
    What differs from the authors' code: AN APPROXIMATION, for they drop 8 tokens at a time, 64 steps from 576 to 64; by default here it is
    64 at a time and half a pile at most, 12 steps. `step=8` is their rule. They compare what leaves the vision tower, here it is the
    features at the site.

    Attributes:
        important: percent of the budget that goes by attention, rounded down.
        step: how many tokens are dropped at a time; of a pile of more than 16 at most half.
    """

    name = "vispruner"
    taxonomy = Taxonomy("half by CLS attention, half by dropping duplicates (VisPruner)", "arXiv 2412.01818", "pruning",
                        sites={"projector": ("cls_attention",), "encoder": ("cls_attention",)})
    important: int = 50
    step: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.important <= 100:
            raise EdgecompError(f"vispruner's important is a percentage, 0 to 100, not {self.important}")
        if self.step < 1:
            raise EdgecompError(f"vispruner drops at least one token a step, not {self.step}")

    def by_attention(self, place: Place) -> int:
        return place.keep * self.important // 100

    def drops(self, place: Place) -> Iterator[tuple[int, int]]:
        """For each step how many tokens are left before it, and how many it drops."""
        left, wanted = (count - self.by_attention(place) for count in (place.tokens, place.keep))
        while wanted and left > wanted:
            pile = (left + 1) // 2
            drop = min(self.step, left - wanted, max(pile // 2, min(pile, AUTHORS)))
            yield left, drop
            left -= drop

    def choose(self, op: Op, place: Place, features: ir.Value, *signals: ir.Value) -> ir.Value:
        important = self.by_attention(place)
        if important == place.keep:
            return top(op, signals[0], important)
        ranked = top(op, signals[0], place.tokens)
        rest = op.Slice(ranked, [important], [place.tokens], [1])  # [B, R]
        directions = gather(op, units(op, features), rest)  # [B, R, D]

        def pile(values: ir.Value, start: int) -> ir.Value:
            return op.Slice(values, [start], [place.tokens], [1], [2])  # type: ignore[no-any-return]

        for left, drop in self.drops(place):
            first, second, places = pile(directions, 0), pile(directions, 1), pile(rest, 1)
            size = (left + 1) // 2
            if drop < size:
                cosines = op.MatMul(first, op.Transpose(second, perm=[0, 2, 1]))
                unlike = op.Slice(top(op, op.ReduceMax(cosines, [2], keepdims=0), size), [drop], [size], [1])
                second = op.Concat(gather(op, first, unlike), second, axis=1)
                places = op.Concat(op.GatherElements(pile(rest, 0), unlike, axis=1), places, axis=1)
            directions, rest = second, places
        return op.Concat(op.Slice(ranked, [0], [important], [1]), rest, axis=1) if important else rest  # type: ignore[no-any-return]

    def rule(self, place: Place, features: NDArray[np.float64], *signals: NDArray[np.float64]) -> Rule:
        scores = signals[0].copy()
        important = self.by_attention(place)
        if important:
            scores[(yield Step(scores, important))] = -np.inf
        if important == place.keep:
            return
        directions = units_of(features)
        rest, closest = np.argsort(-scores, kind="stable")[:place.tokens - important], 1.0
        wanted = place.keep - important
        for _, drop in self.drops(place):
            first, second = rest[::2], rest[1::2]
            duplicated = (directions[first] @ directions[second].T).max(1)
            by = np.argsort(-duplicated, kind="stable")
            rest = np.concatenate([first[by[drop:]], second])
            gaps = -np.diff(duplicated[by])[drop - 1: drop if len(rest) == wanted else None]  # where the order matters
            closest = min(closest, max(ROUNDING * gaps.min(initial=1), 1e-9))
        # what was dropped on the way is in no trajectory: the margin is that of the closest decision
        survived = np.full(place.tokens, 1 - closest)
        survived[rest] = 1
        survived[scores == -np.inf] = -np.inf
        yield Step(survived, wanted)
