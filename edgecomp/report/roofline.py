"""The roofline of a device, after Williams, Waterman and Patterson (2009): operations a byte against operations a second, both logarithmic.

No phase can lie above the roof, which is the lower of the peak and of the bandwidth times the operations a byte. How far it lies below is what
the constants of the prediction say.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgecomp.report.axes import Axis, log_ticks
from edgecomp.report.devices import Target
from edgecomp.report.formats import find, metric, number, span
from edgecomp.report.marks import Mark
from edgecomp.report.phases import PHASES
from edgecomp.report.tables import Body, Cell, Column, Row, Table

WIDTH, HEIGHT = 390, 270


@dataclass(frozen=True)
class Spot:
    """A phase of a plan on a device. rate: its operations over the predicted seconds; low and high are the ends of that."""
    phase: str
    mark: Mark
    flops: float
    bytes: float
    rate: float
    low: float
    high: float

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes


def spots(device: Target, marks: Sequence[Mark]) -> list[Spot]:
    found = []
    for mark in marks:
        for phase, named in PHASES.items():
            asked, took = find(device.plan(mark), "work", phase), device.plan(mark).get(named.predicted)
            if asked and took and asked["flops"] and asked["bytes"]:
                rates = [1000 * asked["flops"] / took[end] for end in ("value", "high", "low")]
                found.append(Spot(phase, mark, asked["flops"], asked["bytes"], *rates))
    return found


def roof(device: Target, intensity: float) -> float:
    """Operations a second that so many a byte can reach."""
    peak, bandwidth = device.facts["peak_flops_per_s"], device.facts["bandwidth_bytes_per_s"]
    return float(min(peak, bandwidth * intensity))


def ridge(device: Target) -> float:
    """Operations a byte from which on the peak is the roof."""
    return float(device.facts["peak_flops_per_s"] / device.facts["bandwidth_bytes_per_s"])


def rooflines(devices: Sequence[Target], marks: Sequence[Mark]) -> list[dict[str, Any]]:
    """Coordinates of the roofline of each device that something was predicted for, all on the same axes."""
    found = {device: those for device in devices if (those := spots(device, marks))}
    if not found:
        return []
    every = [s for those in found.values() for s in those]
    across, up = [*map(ridge, found), *(s.intensity for s in every)], [*(d.facts["peak_flops_per_s"] for d in found), *(s.high for s in every)]
    left, right, top, bottom = 50, WIDTH - 14, 30, HEIGHT - 40
    x = Axis(min(across) / 2.5, max(across) * 2.5, left, right, log=True)
    y = Axis(min(s.low for s in every) / 2, max(up) * 2, bottom, top, log=True)
    charts = []
    for device, those in found.items():
        start = max(x.low, y.low / device.facts["bandwidth_bytes_per_s"])
        charts.append({
            "device": device, "width": WIDTH, "height": HEIGHT, "left": left, "right": right, "top": top, "bottom": bottom,
            "roof": f"M{x.at(start)},{y.at(roof(device, start))}L{x.at(ridge(device))},{y.at(device.facts['peak_flops_per_s'])}H{right}",
            "marks": [{"spot": s, "x": x.at(s.intensity), "y": y.at(s.rate), "ends": (y.at(s.low), y.at(s.high))} for s in those],
            "across": [(x.at(t), f"{t:g}") for t in log_ticks(x.low, x.high, 6)],
            "up": [(y.at(t), metric(t, 1)) for t in log_ticks(y.low, y.high, 7)]})
    return charts


def roofline_table(devices: Sequence[Target], marks: Sequence[Mark]) -> Table:
    """What is behind the rooflines."""
    bodies = [Body([Row(f"{PHASES[s.phase].title}, {s.mark.name}",
                        [Cell(metric(s.flops)), Cell(f"{metric(s.bytes)}B"), Cell(number(s.intensity)),
                         Cell(metric(s.rate), span([s.low, s.high], metric)), Cell(f"{number(100 * s.rate / roof(device, s.intensity), 2)} %")])
                    for s in spots(device, marks)], device.name) for device in devices]
    columns = [Column("operations", "counted"), Column("bytes", "counted"), Column("operations a byte", "counted"),
               Column("operations a second", "predicted"), Column("of its roof", "predicted")]
    return Table("rooflines", "The phases on each roofline, with the 90 % interval.", "phase", columns, [body for body in bodies if body.rows],
                 "device")
