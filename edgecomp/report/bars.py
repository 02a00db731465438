"""Bars: times and memory of plans as shares of the longest bar, drawn alike for what was measured and what is predicted."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgecomp.report.devices import Target
from edgecomp.report.formats import ms, size
from edgecomp.report.marks import Mark
from edgecomp.report.tables import PHASES

FULL = 99.0  # percent of the width for the longest, so that a line at its end is seen
STACKED = {"vision_ms": "p1", "prefill_ms": "p2"}  # of a prediction; a measurement has preprocessing, too


@dataclass(frozen=True)
class Bar:
    """One bar of a group. parts: CSS class, start and length in percent. line: where the measured total is. text: the number beside it."""
    name: str
    budget: int
    parts: tuple[tuple[str, float, float], ...]
    line: float | None
    text: str
    kind: str
    spoken: str


def bars(rows: Sequence[tuple[Mark, Mapping[str, float | None], float | None, str, str]], kind: str) -> list[Bar]:
    """Rows of (mark, class -> length, total for the line, text, what a screen reader says) -> bars of one scale."""
    longest = max([1e-12, *(max(sum(v or 0 for v in parts.values()), total or 0) for _, parts, total, _, _ in rows)])
    found = []
    for mark, parts, total, text, spoken in rows:
        at, placed = 0.0, []
        for css, value in parts.items():
            long = FULL * (value or 0) / longest
            placed.append((css, round(at, 2), round(long, 2)))
            at += long
        found.append(Bar(mark.name, mark.budget, tuple(placed), None if total is None else round(FULL * total / longest, 2), text, kind, spoken))
    return found


def first_token(marks: Sequence[Mark]) -> list[Bar]:
    """Measured: the phases, and the first token as a line."""
    rows = []
    for mark in marks:
        took = {phase: mark.mean("latency", phase, "median") for phase in PHASES}
        total = mark.mean("latency", "first_token_ms", "median")
        rows.append((mark, {f"p{i}": value for i, value in enumerate(took.values())}, total, ms(total),
                     f"{mark.name}: {', '.join(f'{PHASES[phase]} {ms(value)}' for phase, value in took.items())}"))
    return bars(rows, "measured")


def each_token(marks: Sequence[Mark]) -> list[Bar]:
    took = [(mark, mark.mean("latency", "per_token_ms", "median")) for mark in marks]
    return bars([(mark, {"other": value}, None, ms(value), f"{mark.name}: {ms(value)}") for mark, value in took], "measured")


def memory(marks: Sequence[Mark]) -> list[Bar]:
    """Counted parts, and the measured peak as a line and in words."""
    rows = []
    for mark in marks:
        weights, cache, used = (mark.mean("memory", part) for part in ("weights_bytes", "cache_bytes", "cache_used_bytes"))
        peak = mark.mean("peak", "peak_bytes")
        spare, rest = max((cache or 0) - (used or 0), 0), max((peak or 0) - (weights or 0) - (cache or 0), 0)
        rows.append((mark, {"p0": weights, "used": used, "spare": spare, "other": rest}, peak, size(peak),
                     f"{mark.name}: weights {size(weights)}, cache {size(cache)}, measured peak {size(peak)}"))
    return bars(rows, "measured")


def predicted_first(device: Target, marks: Sequence[Mark]) -> list[Bar]:
    """The phases that are predicted; choosing the tokens is the rest of the first token, and too short to be seen."""
    rows = []
    for mark in marks:
        parts = {css: device.value(mark, name) for name, css in STACKED.items()}
        rows.append((mark, parts, None, ms(device.value(mark, "ttft_ms")),
                     f"{mark.name}: predicted {', '.join(f'{PHASES[name]} {ms(device.value(mark, name))}' for name in STACKED)}"))
    return bars(rows, "predicted")


def predicted_each(device: Target, marks: Sequence[Mark]) -> list[Bar]:
    took = [(mark, device.value(mark, "tpot_ms")) for mark in marks]
    return bars([(mark, {"other": value}, None, ms(value), f"{mark.name}: predicted {ms(value)}") for mark, value in took], "predicted")
