"""Bits and tokens together: what every plan costs in each precision, where bundles of several were measured."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgecomp.report.formats import DASH, ms, number, points, size, span
from edgecomp.report.marks import Mark
from edgecomp.report.tables import Body, Cell, Column, Row, Table

MEASURES: dict[str, tuple[tuple[str, ...], Callable[[float | None], str]]] = {
    "percent right": (("accuracy", "all"), points), "first token": (("latency", "first_token_ms", "median"), ms),
    "prefill": (("latency", "prefill_ms", "median"), ms), "each further token": (("latency", "per_token_ms", "median"), ms),
    "peak memory": (("peak", "peak_bytes"), size)}


def joint_table(marks: Sequence[Mark], pick: Mark | None) -> Table:
    """Plans x bits, once for each measure; the verdict's pick in bold."""
    bits = list(dict.fromkeys(mark.bits for mark in marks))
    plans: dict[str, dict[str, Mark]] = {}
    for mark in marks:
        plans.setdefault(mark.plan, {})[mark.bits] = mark
    bodies = [Body([Row(plan, [_cell(of.get(each), path, form, pick) for each in bits], next(iter(of.values())).about)
                    for plan, of in plans.items()], title)
              for title, (path, form) in MEASURES.items() if any(mark.values(*path) for mark in marks)]
    caption = "Every plan in each of the bits; of seeds the mean, and the range of percentages." + " Bold: the verdict's." * bool(pick)
    return Table("joint", caption, "plan", [Column(each, "measured") for each in bits], bodies, "measure")


def _cell(mark: Mark | None, path: tuple[str, ...], form: Callable[[float | None], str], pick: Mark | None) -> Cell:
    if mark is None:
        return Cell(DASH)
    rates = mark.values(*path) if form is points else []
    return Cell(form(mark.mean(*path)), span(rates, points) if rates[1:] else "", best=mark is pick)


def bundle_table(bundles: Sequence[Mapping[str, Any]]) -> Table:
    """The bytes of each bundle's weights: decoder, tower and embeddings."""
    first = bundles[0]
    rows = [Row(bundle["bits"], [Cell(size(bundle["weights_bytes"])),
                                 Cell(DASH if bundle is first else number(bundle["weights_bytes"] / first["weights_bytes"])), Cell(bundle["name"])])
            for bundle in bundles]
    columns = [Column("weights", "counted"), Column(f"times those in {first['bits']}", "counted"), Column("bundle")]
    return Table("bundles", "What the weights take: those of the decoder, the tower and the embeddings.", "bits", columns, [Body(rows)])
