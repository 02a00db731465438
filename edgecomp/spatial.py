"""How the tokens that a plan keeps lie on a picture: coverage, entropy, and bias to a position (arXiv 2505.19147, section 5).

The paper holds that many methods lose to random choice and to pooling because of where they choose: attention clusters tokens,
and prefers late ones whatever is to be seen there. These three figures show it without a question being asked.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgecomp.canvas import views
from edgecomp_runtime.manifest import Manifest

SIDE = 8  # cells on a side of the picture


def cells_of(manifest: Manifest, side: int = SIDE) -> NDArray[np.int64]:
    """The cell [N] that each visual token of a picture lies in, of side x side equal ones, by its centre; -1 for separators.

    A grid with fewer rows or columns than that has as many cells there as it has rows or columns. Tokens of an overview lie in the
    same cells as those of the tiles below it.
    """
    found = np.full(manifest.vision.tokens, -1, np.int64)
    grids = views(manifest)
    down, across = (min(side, *(view.grid[axis] for view in grids)) for axis in (0, 1))
    for view in grids:
        rows, columns = view.grid
        for token, place in view.places.items():
            row, column = divmod(place, columns)
            found[token] = (2 * row + 1) * down // (2 * rows) * across + (2 * column + 1) * across // (2 * columns)
    return found


def coverage(kept: Sequence[int] | NDArray[np.int64], cells: NDArray[np.int64]) -> float:
    """The share of cells in which at least one token was kept: 0 to 1.

    Args:
        kept: numbers [K] of the tokens; a merged one is where its place is.
        cells: of `cells_of` [N].
    """
    return len(set(_cells(kept, cells))) / (int(cells.max()) + 1)


def entropy(kept: Sequence[int] | NDArray[np.int64], cells: NDArray[np.int64]) -> float:
    """The entropy of the kept tokens' distribution over the cells, as a share of the largest there is, log(cells): 0 to 1.

    1 where every cell has as many; log K / log(cells) at most where K tokens are fewer than the cells.
    """
    counts = np.bincount(_cells(kept, cells))
    shares = counts[counts > 0] / max(1, counts.sum())
    most = math.log(int(cells.max()) + 1)
    return float(-(shares * np.log(shares)).sum() / most) + 0.0 if most else 1.0


def position_correlation(kept: Sequence[int] | NDArray[np.int64], tokens: int) -> float | None:
    """Spearman's correlation of being kept (1) or not (0) with a token's number in the raster: -1 to 1, ties at their mean rank.

    Above 0: later tokens, which mostly lie lower, are preferred. None where all tokens are kept, and none of the two varies.
    """
    chosen = np.zeros(tokens)
    chosen[np.asarray(kept, np.int64)] = 1
    return None if chosen.all() or not chosen.any() else spearman(chosen, np.arange(tokens))


def spearman(a: NDArray[np.float64] | NDArray[np.int64], b: NDArray[np.float64] | NDArray[np.int64]) -> float:
    """The correlation of two rows' ranks. Neither may be constant."""
    x, y = (ranks(values) - (len(values) + 1) / 2 for values in (a, b))
    return float((x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum()))


def ranks(values: NDArray[np.float64] | NDArray[np.int64]) -> NDArray[np.float64]:
    """The rank of each value from 1; equal values share the mean of theirs."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]


def _cells(kept: Sequence[int] | NDArray[np.int64], cells: NDArray[np.int64]) -> NDArray[np.int64]:
    found = cells[np.asarray(kept, np.int64)]
    return found[found >= 0]
