"""Pooling: averages over the cells of a coarser grid, the baseline that beat many pruning methods (arXiv 2505.19147)."""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgecomp.methods.base import EVERYWHERE, Averaging, BudgetError, Op, Place, Taxonomy, fixed


@dataclass(frozen=True)
class Pool(Averaging):
    """K = h x w cells, each the mean of the tokens below it by area (a token on a border counts in parts).

    The cells' grid is the one of h * w = K whose aspect is nearest to the picture's; none within a factor of two is an
    error. Being separable, the [K, N] averaging matrix is applied as one small product a side.
    """

    name = "pool"
    taxonomy = Taxonomy("averages over a coarser grid", "arXiv 2505.19147", "merging", sites=EVERYWHERE, grid=True)

    def check(self, place: Place) -> None:
        cells(place)

    def cells(self, place: Place) -> tuple[int, int]:
        return cells(place)

    def weights(self, place: Place) -> NDArray[np.float64]:
        (rows, columns), (high, wide) = place.grid, cells(place)
        return np.kron(shares(rows, high), shares(columns, wide)).astype(np.float64)

    def places(self, place: Place) -> NDArray[np.int64]:
        """The token at each cell's centre: an average stands for the middle of its cell, not for its corner."""
        return centres(place.grid, cells(place))

    def build(self, op: Op, place: Place, features: ir.Value, *signals: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        (rows, columns), (high, wide) = place.grid, cells(place)

        def matrix(weights: NDArray[np.float64]) -> ir.Value:
            return op.CastLike(op.Constant(value=ir.tensor(weights.astype(np.float32))), features)  # type: ignore[no-any-return]

        # a 0 in Reshape keeps the batch
        by_row = op.MatMul(matrix(shares(rows, high)), op.Reshape(features, [0, rows, -1]))  # [B, high, columns * D]
        by_cell = op.MatMul(matrix(shares(columns, wide)), op.Reshape(by_row, [0, high, columns, -1]))  # [B, high, wide, D]
        tokens = op.Reshape(by_cell, [0, place.keep, -1])
        kept = fixed(op, features, self.places(place))
        return tokens, kept, op.Identity(kept)  # one value under two names would lose one of them when inlined


def shares(tokens: int, cells: int) -> NDArray[np.float64]:
    """One side's averaging matrix [cells, tokens]: the part of each cell that each token covers."""
    edges = np.arange(cells + 1) * tokens / cells
    at = np.arange(tokens)
    overlap = np.minimum(edges[1:, None], at + 1) - np.maximum(edges[:-1, None], at)
    return np.where(overlap > 1e-9, overlap, 0.0).astype(np.float64) * (cells / tokens)


def centres(grid: tuple[int, int], cells: tuple[int, int]) -> NDArray[np.int64]:
    """The raster places [K], ascending, of the tokens at the centres of (rows, columns) equal cells."""
    down, across = ((2 * np.arange(n) + 1) * side // (2 * n) for n, side in zip(cells, grid))
    return (down[:, None] * grid[1] + across).reshape(-1)


def cells(place: Place, method: str = "pool") -> tuple[int, int]:
    """The (rows, columns) of K cells nearest to the grid's aspect. Raises BudgetError in the method's name, with the nearest budgets."""
    found = _best(place.keep, place.grid)
    if found is None:
        near = sorted(_nearest(place)[:2])
        raise BudgetError(f"{method} cannot make {place.keep} tokens of a {place.grid[0]}x{place.grid[1]} grid: no h x w = {place.keep} "
                          f"within a factor of two of its aspect; the nearest budgets are {' and '.join(map(str, near))}")
    return found


def _best(keep: int, grid: tuple[int, int]) -> tuple[int, int] | None:
    def stretch(high: int) -> float:
        return abs(math.log((keep / high / high) / (grid[1] / grid[0])))
    sides = [h for h in range(1, keep + 1) if keep % h == 0 and h <= grid[0] and keep // h <= grid[1] and stretch(h) <= math.log(2) + 1e-9]
    high = min(sides, key=stretch, default=None)
    return None if high is None else (high, keep // high)


def _nearest(place: Place) -> list[int]:
    fits = [k for k in range(1, place.tokens + 1) if _best(k, place.grid)]
    return sorted(fits, key=lambda k: (abs(k - place.keep), k))
