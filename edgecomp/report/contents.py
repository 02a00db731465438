"""What a report says, before it is laid out: its marks, its sentences and its tables, for the page and the Markdown alike."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgecomp.report import compared, devices, joint, roofline, tables, words
from edgecomp.report.marks import Mark, Plan, Verdict, group, leaders, losers, missing, verdict
from edgecomp.report.tables import Table


@dataclass(frozen=True)
class Contents:
    """few: marks for pictures that have no room for all. focus: of these the full model and the verdict's. roofed: of these the ones in the bits that
    the devices' peaks are of. missing: by budget, which baselines were not measured there. pairs: by phase, what was predicted and measured.
    tables: by their ids."""
    title: str
    plans: Sequence[Plan]
    marks: Sequence[Mark]
    budgets: Sequence[int]
    verdict: Verdict
    few: Sequence[Mark]
    focus: Sequence[Mark]
    roofed: Sequence[Mark]
    devices: Sequence[devices.Target]
    pairs: dict[str, list[compared.Pair]]
    missing: dict[int, list[str]]
    warnings: dict[str, str]
    verdict_text: str
    device_text: str
    reasons: Sequence[str]
    tables: dict[str, Table]

    @staticmethod
    def of(result: dict[str, Any]) -> Contents:
        """Of what `edgecomp profile` found, or a sweep."""
        plans, bundles = result["plans"], result["bundles"]
        tokens = bundles[0]["tokens"]
        marks = group(plans)
        budgets = sorted({mark.budget for mark in marks if mark.method != "none"})
        found = verdict(marks)
        few = leaders(marks, found.pick)
        focus = list(dict.fromkeys(mark for mark in (found.full, found.pick or next((m for m in few if m is not found.full), None)) if mark))
        roofed = [mark for mark in focus if mark.bits == focus[0].bits]
        those, pairs = devices.targets(result) if focus else [], compared.by_phase(result)
        worse = losers(plans)
        made = [tables.accuracy_table(marks, budgets, tokens, worse), tables.task_table(plans), tables.latency_table(marks),
                tables.memory_table(marks), tables.count_table(marks)]
        if bundles[1:]:
            made += [joint.joint_table(marks, found.pick), joint.bundle_table(bundles)]
        if gauges := result["machine"].get("gauges"):
            made.append(tables.gauge_table(gauges))
        if those:
            made += [devices.glance_table(those, found.full, focus[-1]), devices.time_table(those, marks), devices.fit_table(those, few),
                     roofline.roofline_table(those, roofed), devices.profile_table(those)]
        made += [compared.error_table(pairs), compared.compared_table(pairs)] * bool(pairs)
        return Contents(words.title(bundles, budgets), plans, marks, budgets, found, few, focus, roofed, those, pairs, missing(plans, budgets),
                        words.warnings(plans, worse), words.verdict_text(found, tokens), devices.summary(those, focus[-1]) if those else "",
                        devices.fit_reasons(those, marks), {table.id: table for table in made})
