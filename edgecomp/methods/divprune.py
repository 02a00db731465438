"""DivPrune: the tokens that lie farthest apart (Diversity-based Visual Token Pruning, arXiv 2503.02175)."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgecomp.methods.base import EVERYWHERE, TAKEN, Op, Place, Rule, Selection, Step, Taxonomy, units, units_of


@dataclass(frozen=True)
class DivPrune(Selection):
    """Greedy max-min: K times the token whose nearest kept token is farthest, the first by its nearest token of all.

    Distances are 1 - cosine. The graph computes them once, [B, N, N], and keeps a running minimum: three nodes a token.
    What differs from the authors' code: there a token kept already is passed over only because it is at distance 0 from itself,
    so that of equal tokens one can be kept twice; here it is out for good, and exactly K tokens go on. A token of zeros, for
    which theirs has no cosine, is as far from all others as an orthogonal one. They prune before the decoder only.
    """

    name = "divprune"
    taxonomy = Taxonomy("tokens farthest from one another (DivPrune)", "arXiv 2503.02175", "pruning", sites=EVERYWHERE)

    def choose(self, op: Op, place: Place, features: ir.Value, *signals: ir.Value) -> ir.Value:
        directions = units(op, features)
        raster = np.arange(place.tokens, dtype=np.float32)
        itself = op.Equal(op.Constant(value=ir.tensor(raster)), op.Constant(value=ir.tensor(raster[:, None])))
        # a token's distance to itself marks it as taken as soon as it enters the minimum, and stays out of the search for the first
        apart = op.Where(itself, TAKEN, op.Sub(1.0, op.MatMul(directions, op.Transpose(directions, perm=[0, 2, 1]))))  # [B, N, N]
        if place.tokens == 1:
            return op.ArgMax(op.Squeeze(apart, [2]), axis=1, keepdims=1)  # type: ignore[no-any-return]
        nearest, _ = op.TopK(apart, [2], axis=2, largest=0, _outputs=2)
        chosen = [op.ArgMax(op.Squeeze(op.Slice(nearest, [1], [2], [2]), [2]), axis=1, keepdims=1)]  # [B, 1] each
        least = op.GatherND(apart, chosen[0], batch_dims=1)  # [B, N]
        while len(chosen) < place.keep:
            if len(chosen) > 1:
                least = op.Min(least, op.GatherND(apart, chosen[-1], batch_dims=1))
            chosen.append(op.ArgMax(least, axis=1, keepdims=1))
        return op.Concat(*chosen, axis=1)  # type: ignore[no-any-return]

    def rule(self, place: Place, features: NDArray[np.float64], *signals: NDArray[np.float64]) -> Rule:
        directions = units_of(features)
        apart = 1 - directions @ directions.T
        np.fill_diagonal(apart, np.inf)
        nearest = apart.min(1, initial=2)
        np.fill_diagonal(apart, -np.inf)
        (first,) = yield Step(nearest, 1, size=1.0)  # distances are differences of cosines: those of two duplicates are all rounding
        least = apart[first]
        for _ in range(place.keep - 1):
            (found,) = yield Step(least, 1, size=1.0)
            least = np.minimum(least, apart[found])
