"""From a budget as people write it to a number of visual tokens for each tile, and each window, of a picture."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from edgecomp.methods.base import BudgetError, Method, Place
from edgecomp_runtime.manifest import Manifest, TileInfo


@dataclass(frozen=True)
class Part:
    """A tile or window of a picture and what a method has to make of it."""
    tile: TileInfo
    place: Place


@dataclass(frozen=True)
class Tokens:
    """A picture's visual tokens where a step finds them: how many, their tiles, and whether those are grids still."""
    count: int
    tiles: tuple[TileInfo, ...]
    overview: int
    regular: bool = True

    @staticmethod
    def of(manifest: Manifest) -> Tokens:
        """A picture's tokens before any step."""
        tiles = manifest.vision.tiles
        return Tokens(manifest.vision.tokens, tiles, len(tiles) - 1 if manifest.image.overview.startswith("last") else 0)


@dataclass(frozen=True)
class Reduction:
    """One step, all numbers known: the method, the tokens it finds, the tiles or windows with the part of each, and how many go on."""
    method: Method
    tokens: Tokens
    parts: tuple[Part, ...]
    keep: int

    @staticmethod
    def of(method: Method, tokens: Tokens, keep: int, site: str = "projector", windows: tuple[int, int] | None = None) -> Reduction:
        """Shares a budget out. Raises BudgetError where `parts_of` or the method does."""
        if method.taxonomy.grid and not tokens.regular:
            raise BudgetError(f"method {method.name!r} needs tokens that form a grid, and an earlier step has chosen among these: put it first")
        parts = parts_of(tokens, keep, site, windows)
        for part in parts:
            method.check(part.place)
        return Reduction(method, tokens, parts, keep)

    @property
    def nothing(self) -> bool:
        """Whether all tokens go on, separators too, of tiles or windows that a method would see one by one."""
        return self.keep == self.tokens.count and (len(self.parts) > 1 or self.parts[0].place.tokens != self.keep)

    @property
    def tile_tokens(self) -> tuple[int, ...]:
        """What goes on of each tile."""
        return tuple(sum(part.place.keep for part in self.parts if inside(part.tile, tile)) for tile in self.tokens.tiles)

    def after(self) -> Tokens:
        """The tokens that are left. Which tile each is of stays known where tiles lie behind each other, and is given up where not."""
        if self.keep == self.tokens.count:
            return self.tokens
        kept = self.tile_tokens
        grids = [self.method.cells(part.place) for part in self.parts] if len(self.parts) == len(kept) else [None]
        if not behind_each_other(self.tokens.tiles):
            kept, grids = (sum(kept),), [None]
        regular, found, start = None not in grids, [], 0
        for count, grid in zip(kept, grids if None not in grids else [None] * len(kept)):
            rows, columns = grid or (1, count)
            found.append(TileInfo(start, rows, columns, columns))
            start += count
        return Tokens(start, tuple(found), self.tokens.overview if len(found) > 1 else 0, regular)


def tokens_of(keep: str, tokens: int) -> int:
    """'64' is 64; '25%' is max(1, floor(N p / 100 + 1/2)). Raises BudgetError for anything outside 1..N."""
    text = keep.strip()
    try:  # decimal, for 2.51% of 5000 is exactly 125.5 and in binary a little less
        number = Decimal(text[:-1]) * tokens / 100 if text.endswith("%") else Decimal(int(text))
    except (ValueError, ArithmeticError):
        number = Decimal("nan")
    if not number.is_finite():
        raise BudgetError(f"a budget of {keep!r} is neither a count such as 64 nor a part such as 25%")
    if not 0 < number <= tokens:
        raise BudgetError(f"a budget of {keep} is outside what this model has there: choose 1 to {tokens} visual tokens, or a part up to 100%")
    return max(1, math.floor(number + Decimal("0.5")))


def parts_of(tokens: Tokens, keep: int, site: str = "projector", windows: tuple[int, int] | None = None) -> tuple[Part, ...]:
    """Each tile, or each of its windows, with its part of a picture's budget; windows that get nothing are left out.

    Args:
        tokens: what there is.
        keep: of a picture.
        site: the kind of place, for `Place`.
        windows: rows and columns of windows that each tile is cut into; each window gets the same share.

    Raises:
        BudgetError: fewer tokens than tiles, more than the tiles have and fewer than there are with the separators, or windows
            where there is no grid to lay them over.
    """
    tiles = tokens.tiles
    sizes = [tile.tokens for tile in tiles]
    if keep == tokens.count:
        quota = sizes
    elif len(tiles) <= keep <= sum(sizes):
        quota = quotas(sizes, keep, [tokens.overview, *(n for n in range(len(tiles)) if n != tokens.overview)])
    else:
        every = f", or all {tokens.count}" if sum(sizes) < tokens.count else ""
        raise BudgetError(f"a budget of {keep} cannot be shared among this picture's {len(tiles)} tiles, which have {sum(sizes)} visual tokens: "
                          f"choose {len(tiles)} to {sum(sizes)}{every}")
    if windows is None:
        return tuple(Part(t, Place((t.rows, t.columns), k, site)) for t, k in zip(tiles, quota))
    if not tokens.regular:
        raise BudgetError(f"windows of {windows[0]}x{windows[1]} need tokens that form a grid, and an earlier step has chosen among these: "
                          "put the windows on the first step")
    found = []
    for tile, share in zip(tiles, quota):
        cells = cut_up(tile, windows)
        for cell, part in zip(cells, quotas([c.tokens for c in cells], share, spread(len(cells), share % len(cells)))):
            if part:
                found.append(Part(cell, Place((cell.rows, cell.columns), part, site)))
    return tuple(found)


def quotas(sizes: Sequence[int], keep: int, order: Sequence[int]) -> list[int]:
    """Equal parts of `keep`, none above its tile's size; the remainder goes one each in this order of the tiles."""
    parts, left, waiting = [0] * len(sizes), keep, list(order)
    while full := [n for n in waiting if sizes[n] <= left // len(waiting)]:
        for n in full:
            parts[n] = sizes[n]
        left -= sum(sizes[n] for n in full)
        waiting = [n for n in waiting if n not in full]
        if not waiting:
            return parts
    share, rest = divmod(left, len(waiting))
    for number, n in enumerate(waiting):
        parts[n] = share + (number < rest)
    return parts


def spread(windows: int, rest: int) -> list[int]:
    """All windows, first those at equal steps that a remainder of `rest` tokens goes to, so that it lies as evenly as it can."""
    first = [i * windows // rest for i in range(rest)]
    return [*first, *(n for n in range(windows) if n not in first)]


def cut_up(tile: TileInfo, windows: tuple[int, int]) -> list[TileInfo]:
    """A tile cut into windows (rows, columns) of nearly equal sides. Raises BudgetError where it has fewer tokens on a side."""
    if windows[0] > tile.rows or windows[1] > tile.columns:
        raise BudgetError(f"{windows[0]}x{windows[1]} windows do not fit into a grid of {tile.rows}x{tile.columns} tokens: choose fewer")
    down, across = ([n * side // count for n in range(count + 1)] for side, count in ((tile.rows, windows[0]), (tile.columns, windows[1])))
    return [TileInfo(tile.start + top * tile.stride + left, bottom - top, right - left, tile.stride)
            for top, bottom in pairwise(down) for left, right in pairwise(across)]


def places_of(tile: TileInfo) -> NDArray[np.int64]:
    """The places of a tile's tokens among a picture's visual tokens, row by row: [rows * columns]."""
    return (tile.start + np.arange(tile.rows)[:, None] * tile.stride + np.arange(tile.columns)).reshape(-1).astype(np.int64)


def inside(window: TileInfo, tile: TileInfo) -> bool:
    """Whether a window is cut out of this tile."""
    row, column = divmod(window.start - tile.start, tile.stride)
    return window.start >= tile.start and row < tile.rows and column < tile.columns


def behind_each_other(tiles: Sequence[TileInfo]) -> bool:
    """Whether each tile's tokens are one stretch, in the order of the tiles."""
    ends = [tile.start + tile.tokens for tile in tiles]
    return all(t.stride == t.columns or t.rows == 1 for t in tiles) and all(t.start >= end for t, end in zip(tiles[1:], ends))


def nearest(manifest: Manifest, method: Method, keep: int) -> int:
    """The budget nearest to `keep` that a method can make of a picture at the projector."""
    tokens = Tokens.of(manifest)
    for candidate in sorted(range(1, tokens.count + 1), key=lambda k: (abs(k - keep), k)):
        try:
            Reduction.of(method, tokens, candidate)
            return candidate
        except BudgetError:
            continue
    raise BudgetError(f"{method.name} can make no budget of this picture")
