"""Random: a seeded subset, the baseline that many methods lose to (arXiv 2505.19147, section 5)."""
from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgecomp.methods.base import EVERYWHERE, Op, Place, Rule, Selection, Step, Taxonomy, fixed


@dataclass(frozen=True)
class Random(Selection):
    """K of N uniformly, a constant of the graph: the same raster places for every image.

    Attributes:
        seed: of Python's Mersenne Twister, whose `sample` is stable over versions.
    """

    name = "random"
    taxonomy = Taxonomy("a seeded random subset", "arXiv 2505.19147", "pruning", sites=EVERYWHERE)
    seed: int = 0

    def indices(self, place: Place) -> NDArray[np.int64]:
        """The chosen raster places, ascending [K]."""
        return np.array(sorted(random.Random(self.seed).sample(range(place.tokens), place.keep)), np.int64)

    def choose(self, op: Op, place: Place, features: ir.Value, *signals: ir.Value) -> ir.Value:
        return fixed(op, features, self.indices(place))

    def rule(self, place: Place, features: NDArray[np.float64], *signals: NDArray[np.float64]) -> Rule:
        scores = np.zeros(place.tokens)
        scores[random.Random(self.seed).sample(range(place.tokens), place.keep)] = 1
        yield Step(scores, place.keep)
