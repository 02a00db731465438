"""The report page: what `edgecomp profile` measured, as one HTML text that opens offline. Computing here, HTML in template.html."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2

from edgecomp.canvas import cells
from edgecomp.evaluate import normal

Plan = dict[str, Any]  # one entry of result["plans"]
Facts = dict[str, Any]  # what one part of the template reads

DASH = "\u2013"
SLACK = 2.0  # points below the full model that the verdict accepts
TIE = 1e-9  # points: less is the rounding of a mean, not a difference
BASELINES = ("random", "pool")  # what every method has to beat at its budget
COLOURS, SHAPES = 6, 5  # without a common factor, so 30 lines look different
PHASES = {"preprocess_ms": "preprocess", "vision_ms": "vision", "prefill_ms": "prefill"}
AXES = {"first_token_ms": "Time to first token", "prefill_ms": "Prefill only"}
SIZES = {"wide": (880, 430), "narrow": (400, 380)}  # the page shows one of them, by its width


@dataclass(frozen=True, eq=False)
class Mark:
    """The plans that differ only in their seed, at one budget: one row of a table, one mark of the chart."""
    line: str
    method: str
    budget: int
    keep: int
    plans: tuple[Plan, ...]

    @property
    def name(self) -> str:
        return str(self.plans[0]["name"]) if len(self.plans) == 1 else f"{self.line}-{self.budget}"

    def values(self, *path: str) -> list[float]:
        return [value for plan in self.plans if (value := find(plan, *path)) is not None]

    def mean(self, *path: str) -> float | None:
        return fmean(values) if (values := self.values(*path)) else None

    def ends(self, phase: str) -> tuple[float, float] | None:
        """The lowest `low` and the highest `high` of a phase over the seeds."""
        lows, highs = self.values("latency", phase, "low"), self.values("latency", phase, "high")
        return (min(lows), max(highs)) if lows and highs else None


def find(plan: Plan, *path: str) -> Any:
    """The value at a path of keys, or None as soon as one is missing or null."""
    value: Any = plan
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
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


def span(ends: Sequence[float] | None, form: Callable[[float], str] = number) -> str:
    return f"{form(min(ends))}{DASH}{form(max(ends))}" if ends else ""


def budget(plan: Plan) -> int:
    """The budget a plan is compared at: its own, or the one that it stands in for."""
    return int(plan.get("nearest_to") or plan["keep"])


def baselines(plans: Iterable[Plan], at: int) -> dict[str, float]:
    """Accuracy at a budget of `random` (mean of its seeds) and `pool`, where they were measured."""
    measured: dict[str, list[float]] = {name: [] for name in BASELINES}
    for plan in plans:
        if plan["method"] in measured and at in (plan["keep"], budget(plan)) and (value := find(plan, "accuracy", "all")) is not None:
            measured[plan["method"]].append(value)
    return {name: fmean(values) if name == "random" else max(values) for name, values in measured.items() if values}


def losers(plans: Sequence[Plan]) -> dict[str, list[str]]:
    """For each plan with accuracy: which of 'random' and 'pool' at its budget are more accurate. Ties are not losing.

    `pool` is itself held against `random`; the full model and the seeds of `random` have nothing to lose to. A plan that says itself what
    it loses to is believed: in a sweep that is known by site.
    """
    measured = [plan for plan in plans if find(plan, "accuracy", "all") is not None]
    return {plan["name"]: plan["loses_to"] if "loses_to" in plan else
                          [name for name, theirs in baselines(plans, budget(plan)).items()
                           if plan["method"] not in (name, "random", "none") and plan["accuracy"]["all"] < theirs - TIE] for plan in measured}


def pareto(places: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (time, accuracy) that no other beats: none is as fast and as accurate and better in one. By time."""
    found: list[int] = []
    for i in sorted(range(len(places)), key=lambda i: (places[i][0], -places[i][1])):
        if not found or places[i][1] > places[found[-1]][1] or places[i] == places[found[-1]]:
            found.append(i)
    return found


def group(plans: Sequence[Plan]) -> list[Mark]:
    """Plans -> marks, the full model first, then by budget. Variants of one method at other parameters or sites are lines of their own."""
    def variant(plan: Plan) -> str:
        settings = [f"{key} {value}" for key, value in (plan.get("parameters") or {}).items() if key != "seed"]
        return ", ".join(settings + [plan[key] for key in ("site", "position") if plan.get(key)])
    variants: dict[str, set[str]] = {}
    for plan in plans:
        variants.setdefault(plan["method"], set()).add(variant(plan))
    marks: dict[tuple[str, str, int, int], list[Plan]] = {}
    for plan in plans:
        method = plan["method"]
        line = "full" if method == "none" else method if len(variants[method]) == 1 else f"{method} ({variant(plan)})"
        marks.setdefault((line, method, budget(plan), plan["keep"]), []).append(plan)
    return sorted((Mark(*key, tuple(found)) for key, found in marks.items()), key=lambda mark: (mark.method != "none", mark.budget))


def styles(marks: Sequence[Mark]) -> dict[str, tuple[str, str]]:
    """Line -> CSS class of its colour, id of its shape; `full` and `random` look the same in every report."""
    others = dict.fromkeys(mark.line for mark in marks if mark.line not in ("full", "random"))
    fixed = {line: (f"k-{line}", f"s-{line}") for line in ("full", "random")}
    return fixed | {line: (f"k{i % COLOURS}", f"s{i % SHAPES}") for i, line in enumerate(others)}


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Of numbers >= 0: round ones from at or below `low` to at or above `high`, in steps of 1, 2, 2.5 or 5 times a power of ten."""
    width = max(high - low, high / 20, 1e-3)
    power = 10.0 ** math.floor(math.log10(width / about))
    step = next(s * power for s in (1, 2, 2.5, 5, 10, 20) if s * power * about >= width)
    first, last = math.floor(low / step + TIE), math.ceil(high / step - TIE)
    return [i * step for i in range(min(first, last - 1), last + 1)]


def chart(marks: Sequence[Mark], axis: str, width: int, height: int) -> Facts | None:
    """Coordinates of the trade-off chart in one size; None where no plan has both a time and an accuracy."""
    shown = [(m, x, y) for m in marks if (x := m.mean("latency", axis, "median")) is not None and (y := m.mean("accuracy", "all")) is not None]
    if not shown:
        return None
    lefts, rights = zip(*[m.ends(axis) or (x, x) for m, x, _ in shown])
    rates = [m.values("accuracy", "all") for m, _, _ in shown]
    across = ticks(0 if min(lefts) < 0.25 * max(rights) else min(lefts), max(rights))
    up = ticks(min(map(min, rates)), max(map(max, rates)))
    left, right, top, bottom = 44, width - 26, 28, height - 44

    def at_x(value: float) -> float:
        return round(left + (value - across[0]) / (across[-1] - across[0]) * (right - left), 1)

    def at_y(value: float) -> float:
        return round(bottom - (value - up[0]) / (up[-1] - up[0]) * (bottom - top), 1)

    look, front = styles(marks), pareto([(x, y) for _, x, y in shown])
    drawn: list[Facts] = [
        {"mark": m, "x": at_x(x), "y": at_y(y), "times": (at_x(low), at_x(high)), "rates": (at_y(max(rate)), at_y(min(rate))), "look": look[m.line],
         "label": None}
        for (m, x, y), low, high, rate in zip(shown, lefts, rights, rates)]
    label(drawn, right)
    lines = {m.line: [(d["x"], d["y"]) for d in sorted(drawn, key=lambda d: d["mark"].keep) if d["mark"].line == m.line] for m, _, _ in shown}
    stairs = "".join(f"H{drawn[i]['x']}V{drawn[i]['y']}" for i in front)
    return {"width": width, "height": height, "left": left, "right": right, "top": top, "bottom": bottom, "axis": axis,
            "marks": drawn, "lines": lines, "across": [(at_x(t), f"{t:g}") for t in across], "up": [(at_y(t), f"{t:g}") for t in up],
            "front": f"M{drawn[front[0]]['x']},{bottom}{stairs}H{right}", "best": [drawn[i]["mark"].name for i in front]}


def label(drawn: Sequence[Facts], right: float) -> None:
    """Finds each mark's budget a place that covers no mark and no other label; where there is none it stays away."""
    taken = [(d["x"] - 5, d["y"] - 5, d["x"] + 5, d["y"] + 5) for d in drawn]
    for d in drawn:
        wide = 7 * len(str(d["mark"].keep))
        for dx, dy in ((7, 14), (-7 - wide, -5), (7, -5), (-7 - wide, 14), (-wide / 2, -9), (-wide / 2, 19)):
            box = (d["x"] + dx, d["y"] + dy - 9, d["x"] + dx + wide, d["y"] + dy)
            if box[2] < right and all(box[2] <= t[0] or t[2] <= box[0] or box[3] <= t[1] or t[3] <= box[1] for t in taken):
                taken.append(box)
                d["label"] = (round(box[0], 1), round(box[3], 1))
                break


def accuracy_rows(plans: Sequence[Plan], marks: Sequence[Mark], columns: Sequence[int]) -> list[Facts]:
    """Lines x budgets, the baselines last; each cell is its mark, what that loses to, and whether it is its column's best."""
    worse = losers(plans)
    best = {at: max((m.mean("accuracy", "all") or 0 for m in marks if m.budget == at), default=0) for at in columns}
    lines = {m.line: m.method for m in marks if m.method != "none"}
    rows = []
    for line, method in sorted(lines.items(), key=lambda item: BASELINES.index(item[1]) + 1 if item[1] in BASELINES else 0):
        found = {m.keep: m for m in marks if m.line == line} | {m.budget: m for m in marks if m.line == line}
        rows.append({"line": line, "baseline": method in BASELINES, "cells": [
            {"mark": m, "worse": [b for b in BASELINES if any(b in worse.get(p["name"], []) for p in m.plans)],
             "best": (m.mean("accuracy", "all") or -1) >= best[at] - TIE} if (m := found.get(at)) else None for at in columns]})
    return rows


def verdict(marks: Sequence[Mark]) -> Facts:
    """The most accurate mark at the smallest budget within SLACK of the full model; where none is, the most accurate of all.

    Seeds count by their mean only: a lucky one is no plan to recommend.
    """
    full = next((m for m in marks if m.method == "none"), None)
    whole = full.mean("accuracy", "all") if full else None
    rated = {m: a for m in marks if m is not full and (a := m.mean("accuracy", "all")) is not None}
    near = [m for m, a in rated.items() if whole is not None and a >= whole - SLACK - TIE]
    least = min((m.keep for m in near), default=None)
    choice = [m for m in near if m.keep == least] or list(rated)
    pick = max(choice, key=lambda m: (round(rated[m], 6), -m.keep, -(m.mean("latency", "first_token_ms", "median") or math.inf)), default=None)
    slow, fast = (m.mean("latency", "first_token_ms", "median") if m else None for m in (full, pick))
    return {"full": full, "pick": pick, "near": bool(near), "ratio": slow / fast if slow and fast else None,
            "tied": [m for m in choice if pick and m is not pick and m.keep == pick.keep and abs(rated[m] - rated[pick]) < TIE]}


PAGES = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
                           trim_blocks=True, lstrip_blocks=True)
PAGES.filters.update(ms=ms, size=size, points=points, number=number, span=span)


def render(result: dict[str, Any]) -> str:
    """The page of what `edgecomp profile` measured: one HTML text that loads nothing.

    The example's picture is laid over the whole token grid, so it has to be what the model saw, after any crop.
    """
    plans, marks = result["plans"], group(result["plans"])
    columns = sorted({mark.budget for mark in marks if mark.method != "none"})
    return PAGES.get_template("template.html").render(
        result=result, plans=plans, marks=marks, looks=styles(marks), columns=columns, rows=accuracy_rows(plans, marks, columns),
        charts={axis: {name: chart(marks, axis, *sides) for name, sides in SIZES.items()} for axis in AXES},
        worse=losers(plans), missing={at: [name for name in BASELINES if name not in baselines(plans, at)] for at in columns},
        tasks=sorted({task for plan in plans for task in find(plan, "accuracy", "by_task") or {}}),
        verdict=verdict(marks), phases=PHASES, axes=AXES, slack=SLACK,
        find=find, normal=normal, cells=cells, baselines=baselines, budget=budget, points=points)
