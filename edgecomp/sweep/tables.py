"""A sweep's results: one row a method, budget and site (seeds together), as CSV and JSON, and the report page."""
from __future__ import annotations

import csv
import datetime as dt
import io
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from edgecomp.footprint import cache_bytes
from edgecomp.report import facts
from edgecomp.sweep.job import Cell, Job, Outcome, about_here, write
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.manifest import Manifest

Row = dict[str, Any]
TIE = 1e-9  # points: less is the rounding of a mean, not a difference
TIMES = {"vision_ms": "vision_ms", "prefill_ms": "prefill_ms", "decode_ms": "per_token_ms", "first_token_ms": "first_token_ms"}

NOTES = {
    "accuracy": "mean over seeds; low and high: of the seeds",
    "tokens_entering, tokens_after, tokens_mean": "visual tokens of a picture in the decoder's first layer, its last, and the mean over its layers",
    "vision_ms, prefill_ms, decode_ms, first_token_ms": "medians over the repeats of the first picture and question, alone on the machine; low and "
                                                        "high: 10th and 90th percentile; decode_ms is a token; of several seeds the first is timed",
    "selector_ms": "measured by onnxruntime's profiler: nodes that the plan has more of than one that keeps as many tokens at the same sites as "
                   "constants, up to the first token; it is part of vision_ms and prefill_ms",
    "cache_bytes": "computed: keys and values of the whole window",
    "coverage": "share of 8x8 cells of the picture with a kept token, mean over pictures",
    "entropy": "of kept tokens over these cells, as a share of log(cells), mean over pictures",
    "position_correlation": "Spearman: being kept against the place in the raster, mean over pictures; above 0 later tokens are preferred",
    "loses_to": "random or pool at the same budget, site and position policy, or pool at the projector, has a higher accuracy",
}


def rows(job: Job, outcome: Outcome, manifest: Manifest) -> list[Row]:
    """What was measured, by method, parameters, site, position, windows and budget; the full model first."""
    groups: dict[tuple[object, ...], list[Cell]] = {}
    for cell in job.cells:
        if cell.plan in outcome.cells:
            settings = tuple(sorted(cell.parameters.items()))
            groups.setdefault((cell.method, settings, cell.sites, cell.position, cell.windows, cell.keep), []).append(cell)
    found = [_row(cells, [outcome.cells[c.plan] for c in cells], manifest) for cells in groups.values()]
    for row in found:
        row["loses_to"] = list(loses_to(row, found))
    return found


def loses_to(row: Row, others: Sequence[Row]) -> dict[str, float]:
    """Which of 'random', 'pool' and 'pool at projector' are more accurate at one of a row's budgets, and its site and position policy, and
    their accuracy.

    A tie is no loss. The full model and random have nothing to lose to; pool is held against random and, elsewhere, pool at the projector.
    """
    found = {}
    if row["method"] not in ("none", "random"):
        for name, method, site in (("random", "random", row["site"]), ("pool", "pool", row["site"]), ("pool at projector", "pool", "projector")):
            beside = [other["accuracy"] for other in others if other is not row and other["method"] == method and other["site"] == site
                      and other["position"] == row["position"] and not other["windows"] and len(other["sites"]) == 1
                      and {*other["budgets"], other["keep"]} & {*row["budgets"]}]
            if (name != "pool at projector" or row["site"] != "projector") and beside and row["accuracy"] < max(beside) - TIE:
                found[name] = float(max(beside))
    return found


def _row(cells: Sequence[Cell], found: Sequence[dict[str, Any]], manifest: Manifest) -> Row:
    first, plan = cells[0], manifest.plans[cells[0].plan]
    answers = [f["answers"] for f in found]
    rates, spatial = [a["all"] for a in answers], [a["spatial"] for a in answers]
    took: dict[str, Any] = next((f["latency"] for f in found if "latency" in f), {})
    leans = [s["position_correlation"] for s in spatial if s["position_correlation"] is not None]
    counts = facts.counts(manifest, plan)
    return {
        "method": first.method, "parameters": first.parameters, "site": first.site, "sites": list(first.sites), "position": first.position,
        "windows": first.windows, "keep": first.keep, "budgets": list(first.budgets), "seeds": [c.seed for c in cells if c.seed is not None],
        "accuracy": fmean(rates), "accuracy_low": min(rates), "accuracy_high": max(rates),
        "by_task": {task: fmean(a["by_task"][task] for a in answers) for task in answers[0]["by_task"]},
        "further": {name: fmean(a["further"][name] for a in answers) for name in answers[0]["further"]},
        "metric": answers[0]["metric"], "questions": answers[0]["questions"], "pictures": answers[0]["pictures"],
        "tokens_entering": counts["enter"], "tokens_after": counts["after_cut"], "tokens_mean": counts["mean_over_layers"],
        **{name: took.get(phase) for name, phase in TIMES.items()}, "selector_ms": took.get("selector_ms"), "peak_bytes": took.get("peak_bytes"),
        "cache_bytes": cache_bytes(manifest, plan), "coverage": fmean(s["coverage"] for s in spatial),
        "entropy": fmean(s["entropy"] for s in spatial), "position_correlation": fmean(leans) if leans else None,
        "plans": [c.plan for c in cells], "loses_to": []}


def as_csv(found: Sequence[Row]) -> str:
    """The rows as CSV: lists with ' and ' between them, a column for each task, nothing where nothing was measured."""
    tasks = sorted({task for row in found for task in row["by_task"]})
    lines = []
    for row in found:
        flat: Row = {}
        for key, value in row.items():
            if key == "by_task":
                flat |= {f"accuracy {task}": value.get(task) for task in tasks}
            elif key == "parameters":
                flat[key] = ",".join(f"{name}={given}" for name, given in value.items())
            elif key in TIMES:
                flat |= {f"{key}{end and '_' + end}": (value or {}).get(end or "median") for end in ("", "low", "high")}
            elif key == "budgets":
                flat["nearest_to"] = " and ".join(str(b) for b in value if b != row["keep"])
            elif key != "further":
                flat[key] = " and ".join(map(str, value)) if isinstance(value, list) else value
        lines.append({key: round(value, 4) if isinstance(value, float) else value for key, value in flat.items()})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def write_tables(folder: Path, job: Job, outcome: Outcome, threads: int | None) -> list[Row]:
    """Writes sweep.csv, sweep.json and report.html; returns the rows."""
    from edgecomp.report.page import render
    bundle, here = Bundle.open(folder / "bundle"), {**about_here(), "threads": threads}
    found = rows(job, outcome, bundle.manifest)
    (folder / "sweep.csv").write_text(as_csv(found), encoding="utf-8")
    about = {"edgecomp": job.edgecomp, "created": dt.date.today().isoformat(), "command": job.command, "machine": here,
             "bundle": facts.about(Path(job.source).name, bundle.manifest)}
    write(folder / "sweep.json", {**about, "notes": NOTES, "rows": found, "failed": outcome.failed,
                                  "skipped": [{"combination": s.combination, "reason": s.reason} for s in job.skipped]})
    lost = {plan: loses_to(row, found) for row in found for plan in row["plans"]}
    plans = [_plan(cell, outcome.cells[cell.plan], bundle.manifest, lost[cell.plan]) for cell in job.cells if cell.plan in outcome.cells]
    example = _example(job, bundle.manifest, outcome)
    (folder / "report.html").write_text(render({**about, "bundles": [about["bundle"]], "plans": plans, "example": example}), encoding="utf-8")
    return found


def _plan(cell: Cell, found: dict[str, Any], manifest: Manifest, lost: dict[str, float]) -> dict[str, Any]:
    """A plan as the report page takes it."""
    plan, took, answers = manifest.plans[cell.plan], found.get("latency"), found["answers"]
    near = [budget for budget in cell.budgets if budget != cell.keep]
    windows = {"windows": cell.windows} if cell.windows else {}
    return {"name": cell.plan, "method": cell.method, "keep": cell.keep, "nearest_to": near[0] if near and cell.keep not in cell.budgets else None,
            "parameters": {**cell.parameters, **windows, **({} if cell.seed is None else {"seed": cell.seed})},
            "site": "+".join(cell.sites), "position": cell.position, "summary": cell.summary, "paper": cell.paper, "kind": cell.kind,
            "needs_prompt": plan.needs_prompt, "parametric": cell.parametric,
            "counts": facts.counts(manifest, plan),
            "memory": facts.memory(manifest, plan, (took or {}).get("prompt_rows")), "peak": facts.peak(took),
            "latency": {**took, "kind": "measured"} if took else None,
            "accuracy": {"kind": "measured", **{k: answers[k] for k in ("all", "metric", "by_task", "questions")}, "scenes": answers["pictures"]},
            "loses_to": lost}


def _example(job: Job, manifest: Manifest, outcome: Outcome) -> dict[str, Any]:
    first = job.questions()[0]
    seen = {name: (manifest.plans[name], *(found["answers"]["example"][part] for part in ("kept", "said"))) for name, found in outcome.cells.items()}
    return facts.example(str(first.image), first.question, first.answer, seen, manifest)
