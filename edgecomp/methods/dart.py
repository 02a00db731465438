"""DART: keep what duplicates the pivots least (Stop Looking for Important Tokens, arXiv 2502.11494)."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgecomp.methods.base import TAKEN, Op, Place, Rule, Selection, Step, Taxonomy, gather
from edgecomp_runtime.errors import EdgecompError


@dataclass(frozen=True)
class Dart(Selection):
    """Pivots by L1 norm, then for each pivot in turn the tokens of lowest cosine to it, each token once.

    At the projector, on the embeddings that enter the decoder. What differs from the authors' code: there the rule reads
    layer-1 keys inside the decoder, takes four pivots of the picture and four of the text behind it, visits them in the
    order of a Python set, and keeps four tokens more than the budget. Here all pivots are of the picture (so that the
    result can be cached an image), are visited by falling norm, and count in the budget: exactly K tokens go on.

    Attributes:
        pivots: how many; the budget where that is smaller.
    """

    name = "dart"
    taxonomy = Taxonomy("tokens least similar to a few pivots (DART)", "arXiv 2502.11494", "pruning")
    pivots: int = 8

    def __post_init__(self) -> None:
        if self.pivots < 1:
            raise EdgecompError(f"dart needs at least one pivot, not {self.pivots}")

    def shares(self, place: Place) -> list[int]:
        """How many tokens each pivot brings in: the rest of the budget in equal parts, the first ones larger."""
        pivots = min(self.pivots, place.keep)
        rest = place.keep - pivots
        return [rest // pivots + (n < rest % pivots) for n in range(pivots)]

    def choose(self, op: Op, place: Place, features: ir.Value, *signals: ir.Value) -> ir.Value:
        shares = self.shares(place)
        norms = op.ReduceL1(features, [2], keepdims=0)  # [B, N]
        _, pivots = op.TopK(norms, [len(shares)], axis=1, _outputs=2)  # [B, P]
        units = op.Div(features, op.Max(op.ReduceL2(features, [2], keepdims=1), 1e-12))
        unlike = op.Neg(op.MatMul(gather(op, units, pivots), op.Transpose(units, perm=[0, 2, 1])))  # [B, P, N]
        penalty = exclude(op, op.Mul(norms, 0.0), pivots)
        chosen = [pivots]
        for pivot, share in enumerate(shares):
            if share:
                scores = op.Add(op.Squeeze(op.Slice(unlike, [pivot], [pivot + 1], [1]), [1]), penalty)
                _, found = op.TopK(scores, [share], axis=1, _outputs=2)
                penalty = exclude(op, penalty, found)
                chosen.append(found)
        return op.Concat(*chosen, axis=1)  # type: ignore[no-any-return]

    def rule(self, place: Place, features: NDArray[np.float64], *signals: NDArray[np.float64]) -> Rule:
        shares = self.shares(place)
        pivots = yield Step(np.abs(features).sum(1), len(shares))
        units = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        taken = set(pivots.tolist())
        for pivot, share in zip(pivots, shares):
            if share:
                scores = -units @ units[pivot]
                scores[list(taken)] = -np.inf
                taken |= set((yield Step(scores, share)).tolist())


def exclude(op: Op, penalty: ir.Value, indices: ir.Value) -> ir.Value:
    """Marks the indices [B, k] as taken in penalty [B, N]."""
    return op.ScatterElements(penalty, indices, op.Expand(TAKEN, op.Shape(indices)), axis=1)  # type: ignore[no-any-return]
