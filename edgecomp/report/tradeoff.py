"""The chart of accuracy against time, both measured: where each mark stands in it."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgecomp.report.axes import Axis, Box, place, ticks
from edgecomp.report.marks import Mark, looks, pareto

AXES = {"first_token_ms": "Time to first token", "prefill_ms": "Prefill only"}
SIZES = {"wide": (880, 430), "narrow": (360, 370)}  # the page shows one of them, by its width


def chart(marks: Sequence[Mark], axis: str, width: int, height: int) -> dict[str, Any] | None:
    """Coordinates of the trade-off chart in one size; None where no plan has both a time and an accuracy."""
    shown = [(m, x, y) for m in marks if (x := m.mean("latency", axis, "median")) is not None and (y := m.mean("accuracy", "all")) is not None]
    if not shown:
        return None
    lefts, rights = zip(*[m.ends(axis) or (x, x) for m, x, _ in shown])
    rates = [m.values("accuracy", "all") for m, _, _ in shown]
    across = ticks(0 if min(lefts) < 0.25 * max(rights) else min(lefts), max(rights))
    up = ticks(min(map(min, rates)), max(map(max, rates)))
    left, right, top, bottom = 44, width - 26, 28, height - 44
    at_x, at_y = Axis(across[0], across[-1], left, right).at, Axis(up[0], up[-1], bottom, top).at
    look, front = looks(marks), pareto([(x, y) for _, x, y in shown])
    drawn: list[dict[str, Any]] = [
        {"mark": m, "x": at_x(x), "y": at_y(y), "times": (at_x(low), at_x(high)), "rates": (at_y(max(rate)), at_y(min(rate))), "look": look[m.line]}
        for (m, x, y), low, high, rate in zip(shown, lefts, rights, rates)]
    taken: list[Box] = [(0, 0, width, top - 10)]  # the axis' title
    taken += [(d["x"] - 5, d["y"] - 5, d["x"] + 5, d["y"] + 5) for d in drawn]
    for d in drawn:
        d["label"] = place(d["x"], d["y"], str(d["mark"].keep), right, taken)
    lines = {m.line: [(d["x"], d["y"]) for d in sorted(drawn, key=lambda d: d["mark"].keep) if d["mark"].line == m.line] for m, _, _ in shown}
    stairs = "".join(f"H{drawn[i]['x']}V{drawn[i]['y']}" for i in front)
    return {"width": width, "height": height, "left": left, "right": right, "top": top, "bottom": bottom, "axis": axis,
            "marks": drawn, "lines": lines, "across": [(at_x(t), f"{t:g}") for t in across], "up": [(at_y(t), f"{t:g}") for t in up],
            "front": f"M{drawn[front[0]]['x']},{bottom}{stairs}H{right}", "best": [drawn[i]["mark"].name for i in front]}
