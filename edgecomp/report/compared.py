"""Predicted against measured on the machine at hand: the error of every prediction, and whether the measurement lies within its interval."""
from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from edgecomp.report.axes import Axis
from edgecomp.report.devices import FORMS
from edgecomp.report.formats import percent
from edgecomp.report.marks import Mark
from edgecomp.report.phases import PEAK, PHASES
from edgecomp.report.tables import Body, Cell, Column, Row, Table

Pair = dict[str, Any]  # one entry of result["compared"]
COMPARED = {phase.measured: phase for phase in (*PHASES.values(), PEAK)}
SIZES = {"wide": 880, "narrow": 360}
ROW, GAP = 15, 24  # pixels of a line, and of a phase's title
RATIOS = (0.1, 0.2, 0.5, 0.8, 1, 1.25, 2, 5, 10)  # ticks


def error(pair: Pair) -> float:
    """As a share of what was measured: above 0 is predicted too much."""
    return float(pair["predicted"]["value"] / pair["measured"] - 1)


def within(pair: Pair) -> bool:
    return bool(pair["predicted"]["low"] <= pair["measured"] <= pair["predicted"]["high"])


def by_phase(result: dict[str, Any]) -> dict[str, list[Pair]]:
    """Phases that were compared -> their pairs."""
    found = {phase: [pair for pair in result.get("compared") or [] if pair["phase"] == phase] for phase in COMPARED}
    return {phase: pairs for phase, pairs in found.items() if pairs}


def error_table(pairs: dict[str, list[Pair]]) -> Table:
    """The errors of each phase over all plans."""
    rows = [Row(COMPARED[phase].title, [Cell(percent(median(abs(error(pair)) for pair in those)).lstrip("+")),
                                Cell(percent(max((error(pair) for pair in those), key=abs))),
                                Cell(f"{sum(map(within, those))} of {len(those)}")]) for phase, those in pairs.items()]
    columns = [Column("median error", "error"), Column("largest error", "error"), Column("within its interval", "error")]
    return Table("errors", "Errors of the predictions, over all plans.", "phase", columns, [Body(rows)])


def compared_table(pairs: dict[str, list[Pair]]) -> Table:
    """Every plan and phase: the one table in which predicted stands beside measured."""
    bodies = []
    for phase, those in pairs.items():
        form, of_ends = FORMS[COMPARED[phase].predicted]
        rows = []
        for pair in those:
            guess = pair["predicted"]
            rows.append(Row(pair["plan"], [Cell(form(guess["value"]), of_ends([guess["low"], guess["high"]])), Cell(form(pair["measured"])),
                                           Cell(percent(error(pair))), Cell("within" if within(pair) else "outside")]))
        bodies.append(Body(rows, COMPARED[phase].title))
    columns = [Column("predicted", "predicted"), Column("measured", "measured"), Column("error", "error"), Column("its interval")]
    return Table("compared", "Predicted beside measured on this machine, with the 90 % interval.", "plan", columns, bodies, "phase")


def ratio_chart(pairs: dict[str, list[Pair]], marks: Sequence[Mark], width: int) -> dict[str, Any] | None:
    """Coordinates of predicted over measured, a strip a phase and in it a line for each of the marks; None where none was compared."""
    names = {plan["name"]: mark for mark in marks for plan in mark.plans[:1]}
    strips = {phase: shown for phase, those in pairs.items() if (shown := [pair for pair in those if pair["plan"] in names])}
    if not strips:
        return None
    ends = [pair["predicted"][end] / pair["measured"] for those in strips.values() for pair in those for end in ("low", "high")]
    left = 150 if width > 500 else 108
    x = Axis(min(0.7, *ends) / 1.05, max(1.4, *ends) * 1.05, left, width - 66, log=True)
    drawn, y = [], -6
    for phase, those in strips.items():
        lines = []
        y += GAP
        top = y - 4
        for pair in those:
            y += ROW
            share = {end: x.at(pair["predicted"][end] / pair["measured"]) for end in ("value", "low", "high")}
            lines.append({"name": names[pair["plan"]].name, "y": y, **share, "within": within(pair), "error": percent(error(pair))})
        drawn.append({"title": COMPARED[phase].title, "y": top, "lines": lines})
    return {"width": width, "height": y + 48, "left": left, "right": width - 66, "bottom": y + 10, "strips": drawn, "same": x.at(1),
            "across": [(x.at(t), f"{t:g}") for t in RATIOS if x.low <= t <= x.high]}
