"""Grid: a stride in rows and in columns, the uniform baseline that knows that tokens form a picture (arXiv 2505.19147, section 5)."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgecomp.methods.base import EVERYWHERE, Op, Place, Rule, Selection, Step, Taxonomy, fixed
from edgecomp.methods.pool import cells, centres


@dataclass(frozen=True)
class Grid(Selection):
    """The token at the centre of each of h x w = K equal cells: a constant of the graph.

    Cells, places and the budgets that cannot be made are those of `pool`, so that the two differ in one thing: there a cell's
    token is the average of the cell, here it is the one in its middle.
    """

    name = "grid"
    taxonomy = Taxonomy("the token at the centre of each cell of a coarser grid", "arXiv 2505.19147", "pruning", sites=EVERYWHERE, grid=True)

    def check(self, place: Place) -> None:
        cells(place, self.name)

    def cells(self, place: Place) -> tuple[int, int]:
        return cells(place, self.name)

    def choose(self, op: Op, place: Place, features: ir.Value, *signals: ir.Value) -> ir.Value:
        return fixed(op, features, centres(place.grid, cells(place, self.name)))

    def rule(self, place: Place, features: NDArray[np.float64], *signals: NDArray[np.float64]) -> Rule:
        scores = np.zeros(place.tokens)
        scores[centres(place.grid, cells(place, self.name))] = 1
        yield Step(scores, place.keep)
