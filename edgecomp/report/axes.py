"""Axes of the charts: round ticks, places on a linear or a logarithmic scale, and room for labels."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NEARLY = 1e-9
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` on pixels from `start` to `end`."""
    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value, at the nearest end where it lies outside."""
        low, high, value = (math.log(v) for v in (self.low, self.high, max(value, self.low))) if self.log else (self.low, self.high, value)
        return round(self.start + min(max((value - low) / (high - low), 0), 1) * (self.end - self.start), 1)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Of numbers >= 0: round ones from at or below `low` to at or above `high`, in steps of 1, 2, 2.5 or 5 times a power of ten."""
    width = max(high - low, high / 20, 1e-3)
    power = 10.0 ** math.floor(math.log10(width / about))
    step = next(s * power for s in (1, 2, 2.5, 5, 10, 20) if s * power * about >= width)
    first, last = math.floor(low / step + NEARLY), math.ceil(high / step - NEARLY)
    return [i * step for i in range(min(first, last - 1), last + 1)]


def log_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Of numbers > 0: round ones from `low` to `high`, in as many steps a power of ten as gives at most `most`."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1, 2, 5), (1, 3), (1,)):
        found = [s * 10.0**power for power in range(first, last + 1) for s in steps if low * (1 - NEARLY) <= s * 10.0**power <= high * (1 + NEARLY)]
        if len(found) <= most:
            return found
    return found[::math.ceil(len(found) / most)]


def place(x: float, y: float, text: str, right: float, taken: list[Box]) -> tuple[float, float] | None:
    """Where a label of a mark can begin without covering a mark or another label, which is taken from then on; None where nowhere."""
    wide = 7 * len(text)
    for dx, dy in ((7, 14), (-7 - wide, -5), (7, -5), (-7 - wide, 14), (-wide / 2, -9), (-wide / 2, 19)):
        box = (x + dx, y + dy - 9, x + dx + wide, y + dy)
        if box[2] < right and free(box, taken):
            taken.append(box)
            return round(box[0], 1), round(box[3], 1)
    return None


def free(box: Box, taken: Sequence[Box]) -> bool:
    return all(box[2] <= t[0] or t[2] <= box[0] or box[3] <= t[1] or t[3] <= box[1] for t in taken)
