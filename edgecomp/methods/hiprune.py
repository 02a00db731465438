"""HiPrune: what a middle layer of the tower looks at, its neighbours, and what a deep layer looks at (arXiv 2508.00553)."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgecomp.methods.base import Op, Place, Rule, Selection, Step, Taxonomy, top
from edgecomp_runtime.errors import EdgecompError

FIRST = 2.0  # what anchors and buffers are ahead of the rest: a mean of attention is at most 1


@dataclass(frozen=True)
class HiPrune(Selection):
    """Anchors, buffers and registers, by the attention that each patch gets (mean over heads and all query rows).

    round(K alpha / 5) anchors have most of it at the object layer; buffers are the tokens left, right, above and below of each;
    registers, with most of it at the layer that the projector reads, fill the budget. As in the authors' code a buffer left of a row is
    the last token of the row above, one outside of the picture is its first or last token, and a budget so small that it has no anchor is all
    registers. What differs: theirs cannot run where anchors and buffers are more than the budget (alpha near 1), here those with
    most attention in the deep layer stay; and it rounds each tile's part of the budget down.

    Attributes:
        alpha: the part of the budget for anchors and buffers, 0 to 1.
        layer: the object layer of the vision tower, from 0; -1 is three eighths up, as in LLaVA's CLIP (the authors' ninth of 24, which is
            8 here). For Qwen2.5-VL they take their 16th of 32: 15.
    """

    name = "hiprune"
    taxonomy = Taxonomy("what a middle and a deep layer look at, with neighbours (HiPrune)", "arXiv 2508.00553", "pruning",
                        sites={"projector": ("column_attention", "column_attention:middle")}, grid=True)
    alpha: float = 0.1
    layer: int = -1

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise EdgecompError(f"hiprune's alpha is a part of the budget, 0 to 1, not {self.alpha}")
        if self.layer < -1:
            raise EdgecompError(f"hiprune's layer counts from 0, or is -1 for three eighths up the tower, not {self.layer}")

    def signals(self, site: str) -> tuple[str, ...]:
        deep, _ = super().signals(site)
        return deep, f"{deep}:{'middle' if self.layer < 0 else self.layer}"

    def anchors(self, place: Place) -> int:
        return round(place.keep * self.alpha / 5)

    def choose(self, op: Op, place: Place, features: ir.Value, *signals: ir.Value) -> ir.Value:
        deep, middle = signals
        if not self.anchors(place):
            return top(op, deep, place.keep)
        anchors = op.Unsqueeze(top(op, middle, self.anchors(place)), [2])
        around = op.Add(anchors, op.Constant(value=ir.tensor(np.array([0, -1, 1, -place.grid[1], place.grid[1]]))))
        around = op.Reshape(op.Min(op.Max(around, 0), place.tokens - 1), [0, -1])  # [B, 5 anchors]
        first = op.ScatterElements(op.Mul(deep, 0.0), around, op.Expand(FIRST, op.Shape(around)), axis=1)
        return top(op, op.Add(deep, first), place.keep)

    def rule(self, place: Place, features: NDArray[np.float64], *signals: NDArray[np.float64]) -> Rule:
        deep, middle = signals
        anchors = np.argsort(-middle, kind="stable")[:self.anchors(place)]
        around = np.concatenate([anchors + step for step in (0, -1, 1, -place.grid[1], place.grid[1])]).clip(0, place.tokens - 1)
        scores = deep.copy()
        scores[np.unique(around)] += FIRST
        yield Step(scores, place.keep)
