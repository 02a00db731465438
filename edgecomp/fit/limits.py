"""Limits as people write them, 4GiB, 500ms or 95%, and whether a predicted or measured number meets them."""
from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgecomp_runtime.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from edgecomp.fit.plans import Plan

SIZES = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
TIMES = {"us": 1e-3, "ms": 1.0, "s": 1e3}  # in milliseconds
SURELY, LIKELY, NO = "surely", "likely", "no"
TIE = 1e-9  # of a limit: less is rounding


@dataclass(frozen=True)
class Limit:
    """One limit. quantity: 'ttft_ms', 'tpot_ms' or 'memory_bytes', of which `value` is the most; 'accuracy' (points) or 'share' (percent of the
    full model's accuracy), of which it is the least. name and text: the option and its value as they were given, for messages."""
    quantity: str
    name: str
    text: str
    value: float

    @property
    def least(self) -> bool:
        """Whether more is better."""
        return self.quantity in ("accuracy", "share")

    @property
    def short(self) -> str:
        """For a cell of a table."""
        return self.name.removeprefix("--max-").removeprefix("--min-") if self.name.startswith("--") else "the device's memory"

    def of(self, plan: Plan) -> float | None:
        """A plan's number, the predicted value or the measured accuracy; None where there is none."""
        if self.least:
            return getattr(plan.measured, self.quantity) if plan.measured else None
        return float(getattr(plan.prediction, self.quantity).value)

    def met(self, plan: Plan) -> str:
        """'surely' where all of the 90 % interval is within the limit, or the measured accuracy is; 'likely' where the value is; or 'no'."""
        value = self.of(plan)
        if value is None:
            return NO
        if self.least:
            return SURELY if value >= self.value * (1 - TIE) else NO
        edge = self.value * (1 + TIE)
        return SURELY if getattr(plan.prediction, self.quantity).high <= edge else LIKELY if value <= edge else NO

    def excess(self, plan: Plan) -> float:
        """The log of how many times a plan's number is off the limit; 0 where it meets it, infinite where it has none."""
        value = self.of(plan)
        if value is None or (self.least and value <= 0):
            return math.inf
        return max(0.0, math.log(self.value / value if self.least else value / self.value)) if self.met(plan) == NO else 0.0

    def words(self, value: float) -> str:
        """A number of this kind as the option takes it, rounded to the side on which the limit is still met."""
        if self.least:
            rounded = _rounded(value, up=False)
            return f"{rounded}%" if self.quantity == "share" else rounded
        if self.quantity == "memory_bytes":
            unit = "GiB" if value >= SIZES["GiB"] else "MiB"
            return f"{_rounded(value / SIZES[unit], up=True)}{unit}"
        return f"{_rounded(value, up=True)}ms"


def limits(max_memory: str | None, max_ttft: str | None, max_tpot: str | None, min_accuracy: str | None) -> list[Limit]:
    """What the options say. Raises InputError where one is no positive amount with a unit, or there is none at all."""
    found = [Limit(quantity, name, text, amount(name, text, units, example))
             for quantity, name, text, units, example in (("memory_bytes", "--max-memory", max_memory, SIZES, "4GiB"),
                                                          ("ttft_ms", "--max-ttft", max_ttft, TIMES, "500ms"),
                                                          ("tpot_ms", "--max-tpot", max_tpot, TIMES, "50ms")) if text is not None]
    if min_accuracy is not None:
        found.append(_accuracy("--min-accuracy", min_accuracy))
    if not found:
        raise InputError("nothing is asked for: give at least one of --max-memory, --max-ttft, --max-tpot and --min-accuracy")
    return found


def amount(name: str, text: str, units: dict[str, float] | dict[str, int], example: str) -> float:
    """'4GiB' or '0.5 s' as a number of the units' base. Raises InputError, UnknownNameError for a unit that is not there."""
    number, unit = _split(name, text, example)
    if not unit:
        raise InputError(f"{name} {text} has no unit: write it as {example} (units: {', '.join(units)})")
    if unit not in units:
        raise UnknownNameError(f"unit in {name} {text}:", unit, units)
    return _positive(name, text, number * units[unit], example)


def _accuracy(name: str, text: str) -> Limit:
    """'95%' is a share of the full model's accuracy, '95' are points."""
    number, unit = _split(name, text, "95% or 95")
    if unit not in ("", "%"):
        raise InputError(f"{name} {text}: {unit!r} is no unit of it; 95% is a share of the full model's accuracy, 95 are points")
    value = _positive(name, text, number, "95% or 95")
    if value > 100:
        raise InputError(f"{name} {text} is more than 100, which nothing reaches" + (" of the full model's" if unit else "") + ": ask for less")
    if value < 1:
        raise InputError(f"{name} {text} is less than one in a hundred: write 95% for a share of the full model's accuracy, 95 for points")
    return Limit("share" if unit else "accuracy", name, text, value)


def _split(name: str, text: str, example: str) -> tuple[float, str]:
    found = re.fullmatch(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))\s*([^\s0-9.].*)?", text.strip())
    if not found:
        raise InputError(f"{name} {text!r} is not an amount such as {example}")
    return float(found[1]), (found[2] or "").strip()


def _positive(name: str, text: str, value: float, example: str) -> float:
    if not 0 < value < math.inf:
        raise InputError(f"{name} {text} must be more than 0 and finite, as in {example}")
    return value


def _rounded(value: float, *, up: bool) -> str:
    """Three significant digits, or all before the point."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{(math.ceil if up else math.floor)(value * 10**digits) / 10**digits:.{digits}f}"
