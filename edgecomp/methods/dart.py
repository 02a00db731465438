"""DART: keep what duplicates the pivots least (Stop Looking for Important Tokens, arXiv 2502.11494)."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgecomp.methods.base import Op, Place, Rule, Selection, Step, Taxonomy, exclude, gather, top, units, units_of
from edgecomp_runtime.errors import EdgecompError

TEXT = 8  # rows of text that every prompt has at least


@dataclass(frozen=True)
class Dart(Selection):
    """Pivots by L1 norm, then for each pivot in turn the tokens of lowest cosine to it, each token once.

    In the decoder as published: norms are of the keys of the layer before the cut, cosines of the hidden state there through the
    final norm; half the pivots are of the picture and half of the text behind it, which only bring in tokens. The authors' is decoder:2.
    What differs from their code: it visits pivots in the order of a Python set and keeps four tokens more than the budget; here
    they are visited by falling norm, the picture's first, and exactly K tokens go on, the picture's pivots among them.

    At the projector norms and cosines are of the embeddings that enter the decoder, and all pivots are of the picture, so that
    the result can be cached an image.

    Attributes:
        pivots: how many. Of the picture they are at most the budget.
    """

    name = "dart"
    taxonomy = Taxonomy("tokens least similar to a few pivots (DART)", "arXiv 2502.11494", "pruning",
                        sites={"projector": (), "encoder": (), "decoder": ("normed", "keys", "text_normed", "text_keys")})
    pivots: int = 8

    def __post_init__(self) -> None:
        if self.pivots < 1:
            raise EdgecompError(f"dart needs at least one pivot, not {self.pivots}")

    def check(self, place: Place) -> None:
        if self.split(place)[1] > TEXT:
            raise EdgecompError(f"dart cannot take {self.split(place)[1]} of {self.pivots} pivots from a prompt, which may have no more "
                                f"than {TEXT} rows; in the decoder choose 1..{2 * TEXT + 1} pivots")

    def split(self, place: Place) -> tuple[int, int]:
        """How many pivots are of the picture, and how many of the text."""
        text = self.pivots // 2 if place.site == "decoder" else 0
        return min(self.pivots - text, place.keep), text

    def shares(self, place: Place) -> list[int]:
        """How many tokens each pivot brings in: the rest of the budget in equal parts, the first ones larger."""
        picture, text = self.split(place)
        rest, pivots = place.keep - picture, picture + text
        return [rest // pivots + (n < rest % pivots) for n in range(pivots)]

    def choose(self, op: Op, place: Place, features: ir.Value, *signals: ir.Value) -> ir.Value:
        compared, sized, *text = signals or (features, features)
        picture, others = self.split(place)
        norms = op.ReduceL1(sized, [2], keepdims=0)  # [B, N]
        pivots = top(op, norms, picture)  # [B, P]
        directions = units(op, compared)
        towards = gather(op, directions, pivots)
        if others:
            best = top(op, op.ReduceL1(text[1], [2], keepdims=0), others)
            towards = op.Concat(towards, units(op, gather(op, text[0], best)), axis=1)
        unlike = op.Neg(op.MatMul(towards, op.Transpose(directions, perm=[0, 2, 1])))  # [B, all pivots, N]
        penalty = exclude(op, op.Expand(0.0, op.Shape(norms)), pivots)
        chosen = [pivots]
        for pivot, share in enumerate(self.shares(place)):
            if share:
                scores = op.Add(op.Squeeze(op.Slice(unlike, [pivot], [pivot + 1], [1]), [1]), penalty)
                found = top(op, scores, share)
                penalty = exclude(op, penalty, found)
                chosen.append(found)
        return op.Concat(*chosen, axis=1)  # type: ignore[no-any-return]

    def rule(self, place: Place, features: NDArray[np.float64], *signals: NDArray[np.float64]) -> Rule:
        compared, sized, *text = signals or (features, features)
        picture, others = self.split(place)
        pivots = yield Step(np.abs(sized).sum(1), picture)
        towards = compared[pivots]
        if others:
            best = np.argsort(-np.abs(text[1]).sum(1), kind="stable")[:others]
            towards = np.concatenate([towards, text[0][best]])
        unlike = -units_of(towards) @ units_of(compared).T
        taken = set(pivots.tolist())
        for pivot, share in enumerate(self.shares(place)):
            if share:
                scores = unlike[pivot]
                scores[list(taken)] = -np.inf
                taken |= set((yield Step(scores, share, size=0.1)).tolist())
