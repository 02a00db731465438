"""Coverage, entropy and position bias against counts by hand, and against plain loops."""
from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from conftest import manifest_of
from hypothesis import given
from hypothesis import strategies as st

from edgecomp.spatial import cells_of, coverage, entropy, position_correlation, ranks, spearman
from edgecomp_runtime.manifest import TileInfo

GRID = cells_of(manifest_of([TileInfo(0, 24, 24, 24)]))


def test_cells_of_24_by_24_are_of_three_by_three_tokens() -> None:
    assert GRID.tolist() == [row // 3 * 8 + column // 3 for row in range(24) for column in range(24)]


def test_a_small_grid_has_fewer_cells_and_every_one_can_be_met() -> None:
    assert cells_of(manifest_of([TileInfo(0, 5, 16, 16)])).tolist() == [row * 8 + column // 2 for row in range(5) for column in range(16)]


@pytest.mark.parametrize(("rows", "columns"), [(27, 27), (9, 13), (8, 8), (1, 3)])
def test_every_cell_has_a_token_and_neighbours_differ_by_one_at_most(rows: int, columns: int) -> None:
    cells = cells_of(manifest_of([TileInfo(0, rows, columns, columns)])).reshape(rows, columns)
    assert set(cells.reshape(-1).tolist()) == set(range(min(8, rows) * min(8, columns)))
    across = min(8, columns)
    for lines, sides in ((cells // across, cells.T // across), (cells.T % across, cells % across)):
        assert all(len(set(line.tolist())) == 1 for line in lines)  # a row of tokens is in one row of cells, a column in one column
        assert all(0 <= b - a <= 1 for line in sides for a, b in pairwise(line.tolist()))


def test_tiles_and_overview_lie_in_the_same_cells_and_separators_in_none() -> None:
    # two tiles of 4x4 beside each other, packed with a separator a row, and an overview of 4x4 in front
    tiles = [TileInfo(0, 4, 4, 4), TileInfo(16, 4, 4, 9), TileInfo(20, 4, 4, 9)]
    cells = cells_of(manifest_of(tiles, 16 + 36, cut=(1, 2), overview="first"))
    assert cells[:16].tolist() == list(range(16))  # the smaller of the grids decides: 4x4 cells
    assert cells[16:].tolist() == [c for row in range(4) for c in [*(4 * row + column // 2 for column in range(8)), -1]]
    assert coverage(range(16), cells) == coverage(range(16, 52), cells) == 1
    assert coverage([24, 33], cells) == 0 and entropy([24, 33], cells) == 0  # separators only


def test_by_hand() -> None:
    corner = [row * 24 + column for row in range(6) for column in range(6)]  # four whole cells of 64
    assert coverage(corner, GRID) == 4 / 64 and entropy(corner, GRID) == pytest.approx(math.log(4) / math.log(64))
    assert coverage([0], GRID) == 1 / 64 and entropy([0], GRID) == 0
    assert coverage(range(576), GRID) == 1 and entropy(range(576), GRID) == pytest.approx(1)
    three_and_one = [0, 1, 2, 575]
    assert entropy(three_and_one, GRID) == pytest.approx((0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / math.log(64))


def test_position_by_hand() -> None:
    assert position_correlation([2, 3], 4) == pytest.approx(2 / math.sqrt(5))  # ranks 1.5 1.5 3.5 3.5 against 1 2 3 4
    assert position_correlation([0, 1], 4) == pytest.approx(-2 / math.sqrt(5))
    assert position_correlation([0, 3], 4) == pytest.approx(0)
    assert position_correlation(range(4), 4) is None


def test_ranks_of_ties() -> None:
    assert ranks(np.array([5.0, 1.0, 5.0, 3.0])).tolist() == [3.5, 1, 3.5, 2]


def slow_ranks(values: list[int]) -> list[float]:
    return [1 + sum(v < value for v in values) + (sum(v == value for v in values) - 1) / 2 for value in values]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12)
       .filter(lambda pairs: len({a for a, _ in pairs}) > 1 and len({b for _, b in pairs}) > 1))
def test_spearman_is_the_correlation_of_ranks(pairs: list[tuple[int, int]]) -> None:
    a, b = (slow_ranks([pair[side] for pair in pairs]) for side in (0, 1))
    mean = (len(pairs) + 1) / 2
    over = sum((x - mean) * (y - mean) for x, y in zip(a, b))
    under = math.sqrt(sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b))
    assert spearman(np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])) == pytest.approx(over / under, abs=1e-12)


@given(st.sets(st.integers(0, 575), min_size=1))
def test_coverage_and_entropy_are_those_of_a_count_by_loops(kept: set[int]) -> None:
    counts = Counter((token // 24 // 3, token % 24 // 3) for token in kept)
    assert coverage(sorted(kept), GRID) == len(counts) / 64
    shares = [count / len(kept) for count in counts.values()]
    assert entropy(sorted(kept), GRID) == pytest.approx(sum(s * math.log(1 / s) for s in shares) / math.log(64), abs=1e-12)
