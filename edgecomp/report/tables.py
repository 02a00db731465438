"""The tables of what was measured, as data: the page and the Markdown write the same ones.

A column has one kind of number, so nothing measured can stand below something predicted.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgecomp.report.formats import DASH, find, ms, ms_span, number, points, size, span
from edgecomp.report.marks import BASELINES, TIE, Mark, Plan, in_bits

LOSES = "\u25bc"
PHASES = {"preprocess_ms": "preprocess", "vision_ms": "vision", "prefill_ms": "prefill"}
TIMES = {**PHASES, "first_token_ms": "first token", "per_token_ms": "per token"}


@dataclass(frozen=True)
class Column:
    """kind: of its numbers, one of `formats.KINDS`; '' is a column of words. about: smaller, under the title."""
    title: str
    kind: str = ""
    about: str = ""


@dataclass(frozen=True)
class Cell:
    """below: a smaller number of the same kind under the text. at: the budget that it is of, where not its column's. flags: what it loses to."""
    text: str = ""
    below: str = ""
    at: str = ""
    flags: tuple[str, ...] = ()
    best: bool = False


@dataclass(frozen=True)
class Row:
    """line: whose swatch stands before the name. about: smaller, behind the name."""
    name: str
    cells: Sequence[Cell]
    about: str = ""
    line: str = ""


@dataclass(frozen=True)
class Body:
    """Rows that belong together, under a title where they have one."""
    rows: Sequence[Row]
    title: str = ""


@dataclass(frozen=True)
class Table:
    """first: the title of the column of names. group: of the bodies' titles."""
    id: str
    caption: str
    first: str
    columns: Sequence[Column]
    bodies: Sequence[Body]
    group: str = ""

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(column.kind for column in self.columns if column.kind)


def accuracy_table(marks: Sequence[Mark], budgets: Sequence[int], tokens: int, worse: Mapping[str, Mapping[str, float]]) -> Table:
    """Lines x budgets, the baselines last, then the full model; each cell is its mark, what that loses to, and whether it is its column's best.

    worse: see `marks.losers`.
    """
    best = {at: max((m.mean("accuracy", "all") or 0 for m in marks if m.budget == at), default=0) for at in budgets}
    those = [m for m in marks if m.method != "none"]
    variants = list(dict.fromkeys(m.variant for m in those))
    lines = {m.line: m.method for m in sorted(those, key=lambda m: variants.index(m.variant))}
    rows: list[Row] = []
    for line in lines:
        found = {m.keep: m for m in marks if m.line == line} | {m.budget: m for m in marks if m.line == line}
        cells = [_accuracy(found[at], at, worse, best[at]) if at in found else Cell(DASH) for at in budgets]
        rows.append(Row(line, [*cells, Cell()], "baseline" if lines[line] in BASELINES else "", line))
    rows.sort(key=lambda row: BASELINES.index(lines[row.name]) + 1 if row.about else 0)
    bodies = [Body([row for row in rows if bool(row.about) == baseline]) for baseline in (False, True)]
    bodies.append(Body([Row(in_bits("full model", m.bits), [*[Cell()] * len(budgets), Cell(points(m.mean("accuracy", "all")))], "", m.line)
                        for m in marks if m.method == "none"]))
    columns = [*(Column(str(at), "measured", f"{number(100 * at / tokens, 2)} %") for at in budgets), Column(f"all {tokens}", "measured")]
    caption = f"Percent right, by visual tokens that go on. Bold: the best of its column. {LOSES} names the baselines that a method loses to."
    return Table("accuracy", caption, "method", columns, [body for body in bodies if body.rows])


def _accuracy(mark: Mark, at: int, worse: Mapping[str, Mapping[str, float]], best: float) -> Cell:
    rate, rates = mark.mean("accuracy", "all"), mark.values("accuracy", "all")
    flags = tuple(dict.fromkeys(name.partition(" ")[0] for plan in mark.plans for name in worse.get(plan["name"], {})))  # wherever it stands
    below, budget = span(rates, points) if len(rates) > 1 else "", f"at {mark.keep}" if mark.keep != at else ""
    return Cell(points(rate), below, budget, flags, rate is not None and rate >= best - TIE)


def task_table(plans: Sequence[Plan]) -> Table:
    tasks = sorted({task for plan in plans for task in find(plan, "accuracy", "by_task") or {}})
    rows = [Row(plan["name"], [Cell(str(plan["keep"])), Cell(points(find(plan, "accuracy", "all"))),
                               *(Cell(points(find(plan, "accuracy", "by_task", task))) for task in tasks)]) for plan in plans]
    columns = [Column("tokens", "counted"), Column("all tasks", "measured"), *(Column(task, "measured") for task in tasks)]
    return Table("tasks", "Percent right by task.", "plan", columns, [Body(rows)])


def latency_table(marks: Sequence[Mark]) -> Table:
    repeats = {n for mark in marks for n in mark.values("latency", "repeats")}
    rows = [Row(mark.name, [*(_time(mark, phase) for phase in TIMES), Cell(ms(mark.mean("latency", "load_ms"))),
                            Cell(str(find(mark.plans[0], "latency", "prompt_rows") or DASH))], mark.about) for mark in marks]
    columns = [*(Column(title, "measured") for title in TIMES.values()), Column("load, once", "measured"), Column("prompt rows", "counted")]
    caption = f"Medians of {' or '.join(f'{n:g}' for n in sorted(repeats)) or DASH} repeats, with the 10th to 90th percentile."
    return Table("latency", caption, "plan", columns, [Body(rows)])


def _time(mark: Mark, phase: str) -> Cell:
    median, ends = mark.mean("latency", phase, "median"), mark.ends(phase)
    return Cell(ms(median), ms_span(ends) if median is not None else "")


MEMORY = {("memory", "weights_bytes"): Column("weights", "counted"), ("memory", "cache_bytes"): Column("cache, allocated", "counted"),
          ("memory", "cache_used_bytes"): Column("cache, used by the prompt", "counted"), ("peak", "peak_bytes"): Column("peak", "measured")}


def gauge_table(gauges: Sequence[dict[str, Any]]) -> Table:
    """Clocks, power and temperatures that the system told."""
    def told(value: float | None, unit: str) -> Cell:
        return Cell(DASH if value is None else f"{number(value)} {unit}")
    rows = [Row(gauge["name"], [told(gauge["before"], gauge["unit"]), told(gauge["after"], gauge["unit"])]) for gauge in gauges]
    return Table("gauges", "What the system told.", "gauge", [Column("before", "measured"), Column("after", "measured")], [Body(rows)])


def memory_table(marks: Sequence[Mark]) -> Table:
    rows = [Row(mark.name, [Cell(size(mark.mean(*path))) for path in MEMORY], mark.about) for mark in marks]
    return Table("memory", "Memory by part.", "plan", list(MEMORY.values()), [Body(rows)])


def count_table(marks: Sequence[Mark]) -> Table:
    """Where a plan cuts is words; a layer's number in them is a name."""
    def whole(value: Any) -> str:
        return DASH if value is None else f"{value:.0f}"
    rows = [Row(mark.name, [Cell(whole(find(plan, "counts", "enter"))), Cell(whole(find(plan, "counts", "after_cut"))),
                            Cell(points(find(plan, "counts", "mean_over_layers"))), Cell(plan.get("site") or DASH),
                            Cell((mark.method != "none" and plan.get("position")) or DASH)], mark.about)
            for mark in marks for plan in mark.plans[:1]]
    columns = [Column("enter the LLM", "counted"), Column("after the cut", "counted"), Column("mean over layers", "counted"), Column("cut at"),
               Column("positions")]
    return Table("counts", "Visual tokens of a picture.", "plan", columns, [Body(rows)])
