"""SparseVLM: the tokens that the telling rows of the text attend to most (arXiv 2410.04417)."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgecomp.methods.base import Op, Place, Rule, Selection, Step, Taxonomy, top


@dataclass(frozen=True)
class SparseVLM(Selection):
    """Raters: the text rows t with g_t = mean over visual tokens of softmax over text (V T^T) above the mean of g. The K largest of
    a [N] = sum over raters of their rows [T, N] of the attention before the cut, mean over heads.

    V [N, D] and T [T, D] are embeddings as they entered the decoder. How many rows are raters depends on the picture: they are
    a vector of 0 and 1 [T] here, which gives the same sums. The mean of g is 1/T, so without a rater all rows are equal, and all rate.

    This is one stage of the authors' code, which makes three (after layers 2, 6 and 15; the first is decoder:3), and without
    what it does with pruned tokens: merging the best 30% of them by clusters into a few (SparseVLM+, its later version, does not
    either, but replaces the attention). The paper derives the number pruned from the rank of the attention; its code, as this,
    from a table.
    """

    name = "sparsevlm"
    taxonomy = Taxonomy("largest attention from the text rows nearest to the picture (SparseVLM)", "arXiv 2410.04417", "pruning",
                        sites={"decoder": ("visual_embeddings", "text_embeddings", "text_attention")})

    def choose(self, op: Op, place: Place, features: ir.Value, *signals: ir.Value) -> ir.Value:
        visual, text, attention = signals
        shares = op.Softmax(op.MatMul(visual, op.Transpose(text, perm=[0, 2, 1])), axis=2)  # [B, N, T]
        near = op.ReduceMean(shares, [1], keepdims=1)  # [B, 1, T]
        raters = op.Cast(op.Greater(near, op.ReduceMean(near, [2], keepdims=1)), to=ir.DataType.FLOAT)
        raters = op.Max(raters, op.Sub(1.0, op.ReduceMax(raters, [2], keepdims=1)))  # all ones where all were zero
        return top(op, op.Squeeze(op.MatMul(raters, attention), [1]), place.keep)

    def rule(self, place: Place, features: NDArray[np.float64], *signals: NDArray[np.float64]) -> Rule:
        visual, text, attention = signals
        alike = visual @ text.T
        shares = np.exp(alike - alike.max(1, keepdims=True))
        near = (shares / shares.sum(1, keepdims=True)).mean(0)
        raters = near > near.mean()
        # what is rounded are the products in the exponent, so that large ones leave less certainty of who rates
        margin = np.abs(near / near.mean() - 1).min() / max(1, np.abs(alike).max())
        yield Step(attention[raters if raters.any() else ...].sum(0), place.keep, margin=margin)
