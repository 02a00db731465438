"""How a report writes a number, and the five kinds of numbers that it has."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

DASH = "\u2013"
MINUS = "\u2212"
MULTIPLIED = "\u00d7"
# What each number of a report is. A column, a bar or a mark has one of them; an error alone is of two others.
KINDS = {
    "measured": "by a clock, a memory meter, or questions asked, on the machine named here",
    "predicted": "nobody has run this there: from constants fitted to published measurements or to a calibration, with its 90 % interval",
    "counted": "follows exactly from the bundle: tokens, operations, bytes",
    "stated": "in a device's profile, whose sources are listed, or follows from it",
    "error": "how far a prediction lies from its measurement",
}
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def find(tree: Mapping[str, Any], *path: str) -> Any:
    """The value at a path of keys, or None as soon as one is missing or null."""
    value: Any = tree
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def number(value: float | None, digits: int = 3) -> str:
    """About `digits` significant digits, never an exponent; a dash for None."""
    places = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return DASH if value is None else f"{value:.{max(0, min(places, 6))}f}"


def ms(value: float | None) -> str:
    return DASH if value is None else f"{number(value)} ms" if value < 10_000 else f"{number(value / 1000)} s"


def size(value: float | None) -> str:
    unit, scale = next(((u, s) for u, s in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)) if (value or 0) >= s), ("bytes", 1))
    return DASH if value is None else f"{number(value / scale)} {unit}"


def points(value: float | None) -> str:
    return DASH if value is None else f"{value:.1f}"


def percent(value: float | None) -> str:
    """A signed share of one, as percent; from 200 % on as a factor."""
    if value is None:
        return DASH
    if value >= 2:
        return f"{number(value + 1, 2)} times"
    return f"{'+' if value > 0 else MINUS if value < 0 else ''}{number(abs(100 * value), 2)} %"


def metric(value: float | None, digits: int = 3) -> str:
    """With a prefix: 10240000000000 is '10.2 T'."""
    scale, prefix = next(((s, p) for s, p in PREFIXES if (value or 0) >= s), (1, ""))
    return DASH if value is None else f"{number(value / scale, digits)} {prefix}".rstrip()


def span(ends: Sequence[float] | None, form: Callable[[float], str] = number) -> str:
    return f"{form(min(ends))}{DASH}{form(max(ends))}" if ends else ""


def ms_span(ends: Sequence[float] | None) -> str:
    """In milliseconds without their unit, or in seconds from where `ms` has them."""
    return span(ends) if not ends or max(ends) < 10_000 else f"{span([end / 1000 for end in ends])} s"


def size_span(ends: Sequence[float] | None) -> str:
    """The unit once where both ends have it."""
    if not ends:
        return ""
    low, high = size(min(ends)), size(max(ends))
    return f"{low.rpartition(' ')[0] if low.split()[-1] == high.split()[-1] else low}{DASH}{high}"
