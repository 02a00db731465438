"""All methods at all their sites on the demonstration model: accuracy of 422 questions about 64 pictures at 288 to 32 of 576 tokens.

    python benchmarks/sweep.py --jobs 2     (two hours on 2 cores, 8 minutes on 16; a run that was ended goes on)

Writes results/sweep.md and sweep.svg. Seeds of `random`: --seeds 0,1,2.
"""
from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import CHECKPOINT, QUESTIONS, RESULTS, WORK, markdown, write

from edgecomp import __version__, methods
from edgecomp.compress import Recipe
from edgecomp.sweep.job import Job
from edgecomp.sweep.planning import Plans, combinations, make, neutral
from edgecomp.sweep.running import go_on

BUDGETS = (288, 192, 128, 64, 32)
SITES = {"encoder": "encoder:4", "projector": "projector", "decoder": "decoder:2"}
OWN = {"visionzip": "encoder:8", "tome": "encoder:0"}  # behind the tower, and in all of its layers
WINDOWS = (("cls", "projector"), ("dart", "projector"), ("fastv", "decoder:2"))
SHOWN = ("random", "pool", "cls", "dart", "dart in 4x4 windows", "divprune", "cdpruner", "fastv at decoder:2")
COLOURS = ("#8a8f98", "#4d5561", "#c0392b", "#d68910", "#7d6608", "#1e8449", "#2471a3", "#7d3c98")
LEFT, TOP, WIDE, HIGH, LOW = 60, 24, 520, 300, 50


def recipes(seeds: tuple[int, ...]) -> list[Recipe]:
    keeps = [str(keep) for keep in BUDGETS]
    found: list[Recipe] = []
    for name in methods.METHODS:
        kinds = methods.method_type(name).taxonomy.sites
        sites = [OWN[name]] if name in OWN else [SITES[kind] for kind in kinds]
        found += combinations([methods.make(name)], keeps, sites, seeds=seeds)
    for name, site in WINDOWS:
        found += combinations([methods.make(name)], keeps, (site,), windows=((4, 4),), seeds=seeds)
    return found


def label(row: dict[str, Any]) -> str:
    """A line of the table."""
    site = "" if row["sites"] in (["projector"], []) else " at " + ", ".join(row["sites"])
    return ("full" if row["method"] == "none" else row["method"]) + site + (f" in {row['windows']} windows" if row["windows"] else "")


def chart(lines: dict[str, dict[int, float]], full: float) -> str:
    """Accuracy against tokens, a line a method, as SVG; tokens are spaced by doublings."""
    from math import log2

    def x(keep: int) -> float:
        return LEFT + WIDE * (log2(keep) - log2(32)) / (log2(576) - log2(32))

    def y(value: float) -> float:
        return TOP + HIGH * (100 - value) / (100 - LOW)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDE + 190} {TOP + HIGH + 46}" font-family="sans-serif" font-size="12">',
             f'<rect width="{LEFT + WIDE + 190}" height="{TOP + HIGH + 46}" fill="#fff"/>']
    for value in range(LOW, 101, 10):
        parts.append(f'<path d="M{LEFT} {y(value):.1f}h{WIDE}" stroke="#ddd"/>'
                     f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value}</text>')
    for keep in (*BUDGETS, 576):
        parts.append(f'<text x="{x(keep):.1f}" y="{TOP + HIGH + 18}" text-anchor="middle">{keep}</text>')
    parts.append(f'<text x="{LEFT + WIDE / 2}" y="{TOP + HIGH + 38}" text-anchor="middle">visual tokens that go on, of 576</text>')
    parts.append(f'<text x="{LEFT}" y="14">% of 422 questions right</text>')
    ends = sorted(((lines[name][min(lines[name])], name) for name in SHOWN if name in lines), reverse=True)
    slots = {name: TOP + 10 + n * 20 for n, (_, name) in enumerate(ends)}
    for name, colour in zip(SHOWN, COLOURS):
        if name in lines:
            points = " ".join(f"{x(keep):.1f},{y(value):.1f}" for keep, value in sorted({**lines[name], 576: full}.items()))
            dash = ' stroke-dasharray="5 4"' if name in ("random", "pool") else ""
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
            parts.append(f'<path d="M{LEFT + WIDE + 14} {slots[name]}h18" stroke="{colour}" stroke-width="3"{dash}/>'
                         f'<text x="{LEFT + WIDE + 38}" y="{slots[name] + 4}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def table(rows: Iterable[dict[str, Any]]) -> tuple[str, dict[str, dict[int, float]], float]:
    """Markdown, the lines by label and budget, and the full model's accuracy."""
    lines: dict[str, dict[int, float]] = {}
    cells: dict[str, dict[int, str]] = {}
    full = 0.0
    for row in rows:
        if row["method"] == "none":
            full = row["accuracy"]
            continue
        mark = "" if not row["loses_to"] else "".join(sorted({lost[0] for lost in row["loses_to"]}))
        lines.setdefault(label(row), {})[row["keep"]] = row["accuracy"]
        cells.setdefault(label(row), {})[row["keep"]] = f"{row['accuracy']:.1f}" + (f" {mark}" if mark else "")
    ranked = sorted(cells, key=lambda name: -lines[name].get(64, 0))
    text = markdown(["method", *map(str, BUDGETS)], [[name, *(cells[name].get(keep, "") for keep in BUDGETS)] for name in ranked])
    return text, lines, full


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--folder", type=Path, default=WORK / "sweep")
    parser.add_argument("--prepare", action="store_true", help="only write the bundle and the job")
    options = parser.parse_args()
    seeds = tuple(int(seed) for seed in options.seeds.split(","))
    WORK.mkdir(parents=True, exist_ok=True)
    bundle = neutral(str(CHECKPOINT), options.folder, print)
    plans = Plans(bundle.manifest, seeds)
    plans.add(recipes(seeds))
    make(bundle, plans, print, timed=False)
    Job(__version__, "python benchmarks/sweep.py", str(CHECKPOINT), str(QUESTIONS.resolve()), None, None, None, None, None, 0,
        tuple(plans.cells.values()), tuple(plans.skipped)).save(options.folder)
    if not options.prepare:
        rows, failed = go_on(options.folder, jobs=options.jobs, say=print)
        text, lines, full = table(rows)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "sweep.svg").write_text(chart(lines, full), encoding="utf-8")
        write("sweep.md", "All methods at all their sites", "python benchmarks/sweep.py",
              f"Percent of 422 questions about 64 pictures; {full:.1f} with all 576 tokens. At the projector unless said; `random` is the mean of "
              f"{len(seeds)} seeds. r: `random` at the same budget and site is better; p: `pool` is, there or at the projector. "
              f"{len(failed)} plans failed.\n", text)
