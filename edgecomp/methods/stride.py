"""Stride: every (N / K)-th token in raster order, the plainest uniform baseline (arXiv 2505.19147, section 5)."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgecomp.methods.base import EVERYWHERE, Op, Place, Rule, Selection, Step, Taxonomy, fixed


@dataclass(frozen=True)
class Stride(Selection):
    """Token floor(i N / K) for i in 0..K-1: a constant of the graph."""

    name = "stride"
    taxonomy = Taxonomy("every (N/K)-th token in raster order", "arXiv 2505.19147", "pruning", sites=EVERYWHERE)

    def choose(self, op: Op, place: Place, features: ir.Value, *signals: ir.Value) -> ir.Value:
        return fixed(op, features, np.arange(place.keep) * place.tokens // place.keep)

    def rule(self, place: Place, features: NDArray[np.float64], *signals: NDArray[np.float64]) -> Rule:
        scores = np.zeros(place.tokens)
        for i in range(place.keep):
            scores[i * place.tokens // place.keep] = 1
        yield Step(scores, place.keep)
