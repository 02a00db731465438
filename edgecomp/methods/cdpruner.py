"""CDPruner: tokens unlike each other and near to the prompt, by a determinantal point process (arXiv 2506.10967)."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgecomp.methods.base import Op, Place, Rule, Selection, Step, Taxonomy, units, units_of
from edgecomp_runtime.errors import EdgecompError

RANGE = 1e-6  # the authors' floor of relevance; also of its range, so that where all tokens are as relevant all weigh the same
FLOOR = 1e-5  # of a token's part outside the chosen ones, squared: less is rounding in fp32


@dataclass(frozen=True)
class CDPruner(Selection):
    """K times the token of largest r_i^2 s_i: relevance r in 0..1, and s, the part of its direction u (squared) outside the span of
    the chosen. That is greedy MAP inference of the process with kernel diag(r) S diag(r), S = U U^T [N, N], for fixed r.

    r_i = the mean over text rows t of cos(x_i, t), stretched over one picture to 0..1, on the embeddings that enter the decoder. The authors
    take CLIP's own pair of towers for it, whose text tower no deployed model carries, and NEGATE it, since in CLIP's space patches
    that answer the prompt have the lower cosine (`sign=-1`); they stretch over all crops of a picture at once. Their code also has
    a weight between relevance and diversity, commented out: there is none here.

    Each step needs one row of what is left of S. We keep the Cholesky rows of the chosen, [step, N]: 16 nodes and step x N
    multiplications a step, so N^2 D + N K^2 / 2 in all. Downdating S itself would be 12 nodes and N^2 a step: twice the
    time on a CPU for K = 64 of N = 576, and hopeless for thousands of tokens. Relevance stays outside the factor, so rounding in it is
    relative to each token's own direction; a token within FLOOR of the span (a duplicate, zeros, all where K exceeds D)
    goes by relevance, then by index.

    Attributes:
        sign: 1, or -1 to prefer tokens far from the prompt.
    """

    name = "cdpruner"
    taxonomy = Taxonomy("diverse tokens near to the prompt (CDPruner)", "arXiv 2506.10967", "pruning", sites={"projector": ("text_embeddings",)})
    sign: int = 1

    def __post_init__(self) -> None:
        if self.sign not in (1, -1):
            raise EdgecompError(f"cdpruner's sign is 1 or -1, not {self.sign}")

    def choose(self, op: Op, place: Place, features: ir.Value, *signals: ir.Value) -> ir.Value:
        directions = units(op, features)
        across = op.Transpose(directions, perm=[0, 2, 1])  # [B, D, N]
        alike = op.MatMul(directions, across)  # [B, N, N]
        relevance = op.MatMul(op.Mul(op.ReduceMean(units(op, signals[0]), [1], keepdims=1), float(self.sign)), across)  # [B, 1, N]
        low = op.ReduceMin(relevance, [2], keepdims=1)
        span = op.Max(op.Sub(op.ReduceMax(relevance, [2], keepdims=1), low), RANGE)
        relevance = op.Div(op.Add(op.Sub(relevance, low), RANGE), span)
        weights = op.Mul(relevance, relevance)
        taken = op.Expand(-1.0, op.Shape(low))  # below every other score, as those are positive
        left = op.ReduceSumSquare(across, [1], keepdims=1)
        floor = op.Constant(value_float=FLOOR)  # one for all steps
        rows, chosen = None, []
        for step in range(place.keep):
            left = op.Max(left, floor)
            index = op.ArgMax(op.Mul(weights, left), axis=2)  # [B, 1, 1]
            chosen.append(index)
            if step == place.keep - 1:
                break
            weights = op.ScatterElements(weights, index, taken, axis=2)
            row = op.GatherND(alike, index, batch_dims=1)  # [B, 1, N]
            if rows is not None:
                column = op.GatherElements(rows, op.Expand(index, [1, step, 1]), axis=2)
                row = op.Sub(row, op.MatMul(op.Reshape(column, [0, 1, step]), rows))
            row = op.Div(row, op.Sqrt(op.GatherElements(left, index, axis=2)))
            left = op.Sub(left, op.Mul(row, row))
            rows = row if rows is None else op.Concat(rows, row, axis=1)  # [B, step + 1, N]
        return op.Reshape(op.Concat(*chosen, axis=1), [0, place.keep])  # type: ignore[no-any-return]

    def rule(self, place: Place, features: NDArray[np.float64], *signals: NDArray[np.float64]) -> Rule:
        directions, text = (units_of(x) for x in (features, signals[0]))
        alike = directions @ directions.T
        relevance = self.sign * (directions @ text.mean(0))
        relevance = (relevance - relevance.min() + RANGE) / max(np.ptp(relevance), RANGE)
        left = np.diagonal(alike)
        rows, taken = np.zeros((place.keep, place.tokens)), np.zeros(place.tokens, bool)
        for step in range(place.keep):
            left = np.maximum(left, FLOOR)
            # what is left of a token is a difference of lengths about 1, whose rounding it has
            index = (yield Step(np.where(taken, -np.inf, relevance ** 2 * left), 1, size=1.0))[0]
            taken[index] = True
            rows[step] = (alike[index] - rows[:step, index] @ rows[:step]) / np.sqrt(left[index])
            left = left - rows[step] ** 2
