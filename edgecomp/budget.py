"""From a budget as people write it to a number of visual tokens for each tile of a picture."""
from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal

from edgecomp.methods.base import BudgetError, Method, Place
from edgecomp_runtime.manifest import Manifest


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
        raise BudgetError(f"a budget of {keep} is outside what this model has: choose 1 to {tokens} visual tokens, or a part up to 100%")
    return max(1, math.floor(number + Decimal("0.5")))


def places(manifest: Manifest, keep: int) -> tuple[Place, ...]:
    """Each tile's grid and its part of a picture's budget.

    Raises:
        BudgetError: fewer tokens than tiles, or more than the tiles have and fewer than there are with the separators.
    """
    tiles = manifest.vision.tiles
    sizes = [tile.tokens for tile in tiles]
    if keep == manifest.vision.tokens:
        return tuple(Place((t.rows, t.columns), t.tokens) for t in tiles)
    if not len(tiles) <= keep <= sum(sizes):
        every = f", or all {manifest.vision.tokens}" if sum(sizes) < manifest.vision.tokens else ""
        raise BudgetError(f"a budget of {keep} cannot be shared among this picture's {len(tiles)} tiles, which have {sum(sizes)} visual tokens: "
                          f"choose {len(tiles)} to {sum(sizes)}{every}")
    parts = quotas(sizes, keep, len(tiles) - 1 if manifest.image.overview.startswith("last") else 0)
    return tuple(Place((t.rows, t.columns), part) for t, part in zip(tiles, parts))


def quotas(sizes: Sequence[int], keep: int, overview: int) -> list[int]:
    """Equal parts of `keep`, none above its tile's size; the remainder goes to the overview, then to the first tiles."""
    parts, left = [0] * len(sizes), keep
    waiting = [overview, *(n for n in range(len(sizes)) if n != overview)]
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


def nearest(manifest: Manifest, method: Method, keep: int) -> int:
    """The budget nearest to `keep` that a method can make of a picture."""
    for candidate in sorted(range(1, manifest.vision.tokens + 1), key=lambda k: (abs(k - keep), k)):
        try:
            for place in places(manifest, candidate):
                method.check(place)
            return candidate
        except BudgetError:
            continue
    raise BudgetError(f"{method.name} can make no budget of this picture")
