"""Devices by budgets: accuracy, measured here, against the first token that is predicted for each device; memory is a mark's area."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from edgecomp.report.axes import Axis, Box, log_ticks, place, ticks
from edgecomp.report.devices import Target
from edgecomp.report.marks import SAME, Mark, unbeaten

SIZES = {"wide": (880, 460), "narrow": (360, 400)}  # the page shows one of them, by its width
LARGEST, LEAST = 1.25, 0.55  # times the shapes of the page: of the most memory, and so small that it is still seen


def device_chart(devices: Sequence[Target], marks: Sequence[Mark], few: Sequence[Mark], width: int, height: int) -> dict[str, Any] | None:
    """Coordinates in one size: of each device the plans that no other beats there, and those of `few`. None without accuracies or times."""
    drawn = [entry for device in devices for entry in _of_device(device, marks, few)]
    if not drawn:
        return None
    lows, highs = [entry["ends"][0] for entry in drawn], [entry["ends"][1] for entry in drawn]
    up = ticks(min(entry["accuracy"] for entry in drawn), max(entry["accuracy"] for entry in drawn))
    left, right, top, bottom = 44, width - 26, 28, height - 44
    x, y = Axis(min(lows) / 1.1, max(highs) * 1.1, left, right, log=True), Axis(up[0], up[-1], bottom, top)
    most = max((entry["memory"] or 0 for entry in drawn), default=0) or 1
    taken: list[Box] = [(0, 0, width, top - 10)]  # the axis' title
    for entry in drawn:
        entry |= {"x": x.at(entry["time"]), "y": y.at(entry["accuracy"]), "times": tuple(map(x.at, entry["ends"])),
                  "scale": round(max(LARGEST * math.sqrt((entry["memory"] or most) / most), LEAST), 3)}
        taken.append((entry["x"] - 6, entry["y"] - 6, entry["x"] + 6, entry["y"] + 6))
    for entry in drawn:
        entry["label"] = place(entry["x"], entry["y"], str(entry["mark"].keep), right, taken)
    drawn.sort(key=lambda entry: entry["time"])
    lines = [(device.facts["id"], [(entry["x"], entry["y"]) for entry in drawn if entry["device"] is device and entry["best"]]) for device in devices]
    return {"width": width, "height": height, "left": left, "right": right, "top": top, "bottom": bottom, "marks": drawn, "lines": lines,
            "across": [(x.at(t), f"{t:g}") for t in log_ticks(x.low, x.high, 11 if width > 500 else 6)], "up": [(y.at(t), f"{t:g}") for t in up]}


def _of_device(device: Target, marks: Sequence[Mark], few: Sequence[Mark]) -> list[dict[str, Any]]:
    rated = [(mark, time, accuracy) for mark in marks if (time := device.value(mark, "ttft_ms")) is not None
             and (accuracy := mark.mean("accuracy", "all")) is not None]
    best = unbeaten([(time, accuracy) for _, time, accuracy in rated], SAME)
    return [{"device": device, "mark": mark, "time": time, "accuracy": accuracy, "ends": device.ends(mark, "ttft_ms"), "best": good,
             "memory": device.value(mark, "memory_bytes"), "fits": device.verdict(mark) != "does not fit"}
            for (mark, time, accuracy), good in zip(rated, best) if good or mark in few]
