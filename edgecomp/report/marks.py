"""Plans as a report compares them: seeds together, at one budget and in the same bits, against the baselines there and the full model."""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from edgecomp.report.formats import find

Plan = dict[str, Any]  # one entry of result["plans"]

SLACK = 2.0  # points below the full model that the verdict accepts
SAME = 0.05  # times that differ by a smaller share are not told apart; intervals of predictions are far wider
TIE = 1e-9  # points: less is the rounding of a mean, not a difference
BASELINES = ("random", "pool")  # what every method has to beat at its budget
COLOURS, SHAPES = 6, 5  # without a common factor, so 30 lines look different


@dataclass(frozen=True, eq=False)
class Mark:
    """The plans that differ only in their seed, at one budget: one row of a table, one mark of the chart.

    variant: the method, with its settings where there are others. bits: of the plans' bundle; '' where all plans have the same.
    """
    variant: str
    bits: str
    method: str
    budget: int
    keep: int
    plans: tuple[Plan, ...]

    @property
    def line(self) -> str:
        return in_bits(self.variant, self.bits)

    @property
    def plan(self) -> str:
        """The name whatever the bits."""
        return f"{self.variant}-{self.budget}" if self.plans[1:] else str(self.plans[0]["name"]).removesuffix(in_bits("", self.bits))

    @property
    def name(self) -> str:
        return in_bits(self.plan, self.bits)

    @property
    def about(self) -> str:
        """What the name does not say: how many seeds, and the budget that it stands in for."""
        return ", ".join([f"{len(self.plans)} seeds"] * (len(self.plans) > 1) + [f"nearest to {self.budget}"] * (self.keep != self.budget))

    def values(self, *path: str) -> list[float]:
        return [value for plan in self.plans if (value := find(plan, *path)) is not None]

    def mean(self, *path: str) -> float | None:
        return fmean(values) if (values := self.values(*path)) else None

    def ends(self, phase: str) -> tuple[float, float] | None:
        """The lowest `low` and the highest `high` of a phase over the seeds."""
        lows, highs = self.values("latency", phase, "low"), self.values("latency", phase, "high")
        return (min(lows), max(highs)) if lows and highs else None


@dataclass(frozen=True)
class Verdict:
    """The plan to take. near: those within SLACK of the full model; where there are none, the pick is not. ratio: how many times sooner its
    first token is there. tied: others with as many tokens and as good."""
    full: Mark | None
    pick: Mark | None
    near: list[Mark]
    ratio: float | None
    tied: list[Mark]


def in_bits(name: str, bits: str) -> str:
    """A name as it is where plans of several precisions stand side by side."""
    return f"{name} in {bits}" if bits else name


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


def alike(plans: Iterable[Plan], plan: Plan) -> list[Plan]:
    """The plans in the same bits as this one."""
    return [other for other in plans if other.get("bits") == plan.get("bits")]


def missing(plans: Sequence[Plan], budgets: Iterable[int]) -> dict[int, list[str]]:
    """By budget, the baselines that some plan there cannot be compared with, as they have no accuracy."""
    return {at: [name for name in BASELINES if any(name not in baselines(alike(plans, plan), at) for plan in plans if budget(plan) == at)]
            for at in budgets}


def losers(plans: Sequence[Plan]) -> dict[str, dict[str, float]]:
    """For each plan with accuracy: the baselines at its budget, in its bits, that are more accurate, with their accuracy. Ties are not losing.

    `pool` is itself held against `random`; the full model and the seeds of `random` have nothing to lose to. A plan that says itself what
    it loses to is believed: in a sweep that is known by site.
    """
    measured = [plan for plan in plans if find(plan, "accuracy", "all") is not None]
    return {plan["name"]: plan["loses_to"] if "loses_to" in plan else
                          {name: theirs for name, theirs in baselines(alike(plans, plan), budget(plan)).items()
                           if plan["method"] not in (name, "random", "none") and plan["accuracy"]["all"] < theirs - TIE} for plan in measured}


def unbeaten(places: Sequence[tuple[float, float]], same: float) -> list[bool]:
    """Of (time, accuracy) whose times are told apart from a share `same` on: whether no other is more accurate and no slower, or as accurate
    and faster."""
    return [not any((y > b and x <= a * (1 + same)) or (y == b and x < a) for x, y in places) for a, b in places]


def pareto(places: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (time, accuracy) that no other beats: none is as fast and as accurate and better in one. By time."""
    best = unbeaten(places, 0.0)
    return sorted((i for i, good in enumerate(best) if good), key=lambda i: places[i])


def group(plans: Sequence[Plan]) -> list[Mark]:
    """Plans -> marks, the full model first, then by budget. Variants of one method at other parameters, sites or in other bits are lines of their
    own."""
    def variant(plan: Plan) -> str:
        settings = [f"{key} {value}" for key, value in (plan.get("parameters") or {}).items() if key != "seed"]
        return ", ".join(settings + [plan[key] for key in ("site", "position") if plan.get(key)])
    variants: dict[str, set[str]] = {}
    for plan in plans:
        variants.setdefault(plan["method"], set()).add(variant(plan))
    several = len({plan.get("bits") for plan in plans}) > 1
    marks: dict[tuple[str, str, str, int, int], list[Plan]] = {}
    for plan in plans:
        method = plan["method"]
        of = "full" if method == "none" else method if len(variants[method]) == 1 else f"{method} ({variant(plan)})"
        marks.setdefault((of, plan["bits"] if several else "", method, budget(plan), plan["keep"]), []).append(plan)
    return sorted((Mark(*key, tuple(found)) for key, found in marks.items()), key=lambda mark: (mark.method != "none", mark.budget))


def styles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Name -> CSS class of its colour, id of its shape; the lines `full` and `random` look the same in every report."""
    others = dict.fromkeys(name for name in names if name not in ("full", "random"))
    fixed = {line: (f"k-{line}", f"s-{line}") for line in ("full", "random")}
    return fixed | {name: (f"k{i % COLOURS}", f"s{i % SHAPES}") for i, name in enumerate(others)}


def looks(marks: Sequence[Mark]) -> dict[str, tuple[str, str]]:
    """Line -> CSS class of its colour, id of its shape. Where there are several, bits have the colours and methods the shapes."""
    if not marks or not marks[0].bits:
        return styles(mark.line for mark in marks)
    colours, shapes = styles(mark.bits for mark in marks), styles(mark.variant for mark in marks)
    return {mark.line: (colours[mark.bits][0], shapes[mark.variant][1]) for mark in marks}


def verdict(marks: Sequence[Mark]) -> Verdict:
    """The most accurate mark at the smallest budget within SLACK of the full model; where none is, the most accurate of all.

    In several bits a budget does not say what a plan costs: of those within SLACK of the first bundle's full model it is the most accurate whose
    first token is the soonest but for SAME. Seeds count by their mean only: a lucky one is no plan to recommend.
    """
    def time(mark: Mark) -> float:
        return mark.mean("latency", "first_token_ms", "median") or math.inf
    full = next((m for m in marks if m.method == "none"), None)
    whole = full.mean("accuracy", "all") if full else None
    rated = {m: a for m in marks if m is not full and (a := m.mean("accuracy", "all")) is not None}
    near = [m for m, a in rated.items() if whole is not None and a >= whole - SLACK - TIE]
    least = min((m.keep for m in near), default=None)
    choice = [m for m in near if m.keep == least] or list(rated)
    pick = max(choice, key=lambda m: (round(rated[m], 6), -m.keep, -time(m)), default=None)
    if near and near[0].bits:
        soonest = min(map(time, near))
        pick = max((m for m in near if time(m) <= soonest * (1 + SAME)), key=lambda m: (round(rated[m], 6), -time(m)))
        choice = [pick]
    slow, fast = (m.mean("latency", "first_token_ms", "median") if m else None for m in (full, pick))
    return Verdict(full, pick, near, slow / fast if slow and fast else None,
                   [m for m in choice if pick and m is not pick and m.keep == pick.keep and abs(rated[m] - rated[pick]) < TIE])


def leaders(marks: Sequence[Mark], pick: Mark | None) -> list[Mark]:
    """The full model and one mark a budget, in each of the bits, for pictures that have no room for all: the verdict's, or else the most
    accurate."""
    found: dict[tuple[bool, int, str], Mark] = {}
    for mark in marks:
        at = (mark.method == "none", mark.budget, mark.bits)
        best = found.get(at)
        if best is None or mark is pick or (best is not pick and _standing(mark) > _standing(best)):
            found[at] = mark
    return sorted(found.values(), key=lambda mark: (mark.method != "none", mark.budget))


def _standing(mark: Mark) -> tuple[float, bool]:
    accuracy = mark.mean("accuracy", "all")
    return (-1.0 if accuracy is None else round(accuracy, 6), mark.method not in BASELINES)
