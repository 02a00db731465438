"""VisionZip: the tokens that the tower looks at most, and the rest merged into a few (arXiv 2412.04467)."""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgecomp.methods.base import Merging, Op, Place, Taxonomy, ascending, gather, top, units, units_of, wide
from edgecomp_runtime.errors import EdgecompError


@dataclass(frozen=True)
class VisionZip(Merging):
    """Dominant tokens by attention, contextual ones by merging what is left along the keys.

    Of K tokens round(K * share / 100) are dominant: those with most attention from CLS, unchanged. Of the others, in raster order, every
    step-th is a target (step = max(1, their number // targets)), and each of the rest goes to the target of the most similar key
    (cosine, mean over heads). Features are the tower's last hidden states without CLS, before the projector.

    What differs from the authors' code: there CLS itself is one of the dominant tokens and enters the LLM (53 patches, CLS and 10
    contextual tokens are their 64), and contextual tokens stand behind all others. Here K tokens are K patches, and a
    contextual token stands where its target was. For Qwen2.5-VL, whose tower has no CLS, they rank by the attention that each patch gets,
    as `columns` does here.

    Attributes:
        share: the dominant part of the budget in percent; 84.375 is theirs: 162 + 30, 108 + 20 and 54 + 10 tokens.
        mean: 1: a contextual token is the mean of its target and what goes to it. 0: it is the target plus the
            mean of what goes to it, about twice as long a vector, as in the authors' code.
        columns: 1: dominant are the tokens with most attention from all rows, for towers without CLS.
    """

    name = "visionzip"
    taxonomy = Taxonomy("what CLS looks at most, the rest merged into a few (VisionZip)", "arXiv 2412.04467", "merging",
                        sites={"encoder": ("cls_attention", "keys")})
    share: float = 84.375
    mean: int = 0
    columns: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 100:
            raise EdgecompError(f"visionzip's share of dominant tokens is a part of the budget in percent, 0 to 100, not {self.share}")
        for name in ("mean", "columns"):
            if getattr(self, name) not in (0, 1):
                raise EdgecompError(f"visionzip's {name} is 0 or 1, not {getattr(self, name)}")

    def signals(self, site: str) -> tuple[str, ...]:
        attention, keys = super().signals(site)
        return "column_attention" if self.columns else attention, keys

    def dominant(self, place: Place) -> int:
        return math.floor(place.keep * self.share / 100 + 0.5)

    def split(self, place: Place) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which of the tokens left over are targets, and which are merged into them: places in their list."""
        dominant = self.dominant(place)
        rest, count = place.tokens - dominant, place.keep - dominant
        targets = np.arange(count) * max(1, rest // max(count, 1))
        return targets, np.setdiff1d(np.arange(rest), targets)

    def build(self, op: Op, place: Place, features: ir.Value, *signals: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        x, (attention, keys) = wide(op, features), (wide(op, s) for s in signals)
        count, (targets, others) = self.dominant(place), self.split(place)
        chosen, tokens = [], []
        left = op.Add(op.Mul(attention, 0.0), op.Constant(value=ir.tensor(np.arange(place.tokens, dtype=np.float32))))  # [B, N], each its place
        if count:
            chosen.append(top(op, attention, count))
            tokens.append(gather(op, x, chosen[0]))
            left = op.ScatterElements(left, chosen[0], op.Expand(float(place.tokens), op.Shape(chosen[0])), axis=1)
        if len(targets):
            rest = ascending(op, left, place.tokens - count)  # [B, R] in raster order
            chosen.append(op.Gather(rest, op.Constant(value=ir.tensor(targets)), axis=1))
            found = gather(op, x, chosen[-1])
            tokens.append(self.merge(op, x, keys, chosen[-1], op.Gather(rest, op.Constant(value=ir.tensor(others)), axis=1), found, len(targets))
                          if len(others) else found)
        order = op.Concat(*chosen, axis=1)
        places, rank = op.TopK(op.Cast(order, to=ir.DataType.FLOAT), [place.keep], axis=1, largest=0, _outputs=2)
        return op.CastLike(gather(op, op.Concat(*tokens, axis=1), rank), features), op.Cast(places, to=ir.DataType.INT64), order

    def merge(self, op: Op, x: ir.Value, keys: ir.Value, targets: ir.Value, others: ir.Value, found: ir.Value, count: int) -> ir.Value:
        """Contextual tokens [B, C, D] of targets [B, C], whose features are `found`, and the others [B, R - C]."""
        alike = op.MatMul(units(op, gather(op, keys, others)), op.Transpose(units(op, gather(op, keys, targets)), perm=[0, 2, 1]))
        mine = op.OneHot(op.ArgMax(alike, axis=2, keepdims=0), count, op.Constant(value=ir.tensor(np.array([0, 1], np.float32))), axis=1)
        members = op.ReduceSum(mine, [2], keepdims=1)  # [B, C, 1]
        gathered = op.MatMul(mine, gather(op, x, others))  # [B, C, R - C] of [B, R - C, D]
        if self.mean:
            return op.Div(op.Add(found, gathered), op.Add(members, 1.0))  # type: ignore[no-any-return]
        return op.Add(found, op.Div(gathered, op.Max(members, 1.0)))  # type: ignore[no-any-return]

    def matrix(self, place: Place, features: NDArray[np.float64], *signals: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        attention, keys = signals
        chosen = np.argsort(-attention, kind="stable")[:self.dominant(place)]
        rest = np.setdiff1d(np.arange(place.tokens), chosen)
        targets, others = (rest[at] for at in self.split(place))
        places = np.concatenate([chosen, targets])
        weights = np.eye(place.tokens)[places]
        if len(targets) and len(others):
            unit = units_of(keys)
            merged = np.zeros((len(targets), place.tokens))
            merged[(unit[others] @ unit[targets].T).argmax(1), others] = 1
            members = merged.sum(1, keepdims=True)
            context = weights[len(chosen):]
            weights[len(chosen):] = (context + merged) / (1 + members) if self.mean else context + merged / np.maximum(members, 1)
        rank = np.argsort(places)
        return weights[rank], places[rank]
