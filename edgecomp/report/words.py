"""Sentences of a report, for the page and the Markdown alike; **bold** as in Markdown."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgecomp.report.formats import MULTIPLIED, ms, ms_span, number, points, size, size_span, span
from edgecomp.report.marks import BASELINES, SAME, SLACK, Mark, Plan, Verdict, in_bits
from edgecomp.report.tables import TIMES


def title(bundles: Sequence[Mapping[str, Any]], budgets: Sequence[int]) -> str:
    return f"{names(bundles)}: profile at {len(budgets)} token budget{'' if len(budgets) == 1 else 's'}"


def names(bundles: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(bundle["name"] for bundle in bundles)


def verdict_text(verdict: Verdict, tokens: int) -> str:
    """Which plan to take, and what it costs against the full model of so many visual tokens."""
    full, pick = verdict.full, verdict.pick
    if pick is None:
        return "No accuracy was measured: this report compares time and memory only, and they say nothing about which plan still answers well."
    mine = pick.mean("accuracy", "all") or 0.0
    whole = full.mean("accuracy", "all") if full else None
    if full is None or whole is None:
        return (f"The full model's accuracy was not measured, so nothing here says what is lost. The most accurate plan is **{pick.name}** "
                f"with {points(mine)} %.")
    gap, other = abs(mine - whole), in_bits("the full model", full.bits)
    fast, slow = (ms(mark.mean("latency", "first_token_ms", "median")) for mark in (pick, full))
    if not verdict.near:
        first = f"; its first token takes {fast} instead of {slow}" if verdict.ratio else ""
        return (f"No plan stays within {SLACK:g} points of {other} ({points(whole)} %). The nearest is **{pick.name}** with "
                f"**{points(mine)} %**, {points(gap)} points below{first}.")
    bits = f" and **{pick.bits}**" if pick.bits else ""
    said = [f"With **{pick.keep} of {tokens}** visual tokens{bits}, **{pick.name}** answers **{points(mine)} %** right,",
            f"as many as {other}" if gap < 0.05 else f"{points(gap)} points {'above' if mine > whole else 'below'} {other}"]
    if verdict.ratio:
        ratio = verdict.ratio
        times = f"{number(ratio, 2)}{MULTIPLIED} as fast" if ratio >= 1 else f"slower, {number(1 / ratio, 2)}{MULTIPLIED} the time"
        said[-1] += ","
        said.append(f"and gives its first token in {fast} instead of {slow} (**{times}**)")
    said[-1] += "."
    if pick.bits:
        return " ".join([*said, *_of_several_bits(verdict, pick, full), *["It is a baseline."] * (pick.method in BASELINES)])
    level = f", level with {', '.join(mark.name for mark in verdict.tied)}" if verdict.tied else ""
    said.append(f"It is the most accurate plan at the smallest budget within {SLACK:g} points of full{level}.")
    if pick.method in BASELINES:
        said.append("It is a baseline: no method measured here beats it at that budget.")
    return " ".join(said)


def _of_several_bits(verdict: Verdict, pick: Mark, full: Mark) -> list[str]:
    """Why this one of all bits and tokens, and which of those that are as near takes the least memory."""
    said = []
    if verdict.ratio:
        near = f"within {SLACK:g} points of {full.name}"
        said.append(f"Of all bits and tokens {near} none give their first token more than {100 * SAME:g} % sooner." if verdict.ratio >= 1 else
                    f"No other bits and tokens {near} give theirs sooner than that.")
    peaks = {mark: peak for mark in verdict.near if (peak := mark.mean("peak", "peak_bytes")) is not None}
    if peaks:
        least = min(peaks, key=lambda mark: peaks[mark])
        said.append(f"{'It' if least is pick else f'**{least.name}**'} takes the least memory of them: a peak of **{size(peaks[least])}** instead of "
                    f"{size(full.mean('peak', 'peak_bytes'))}.")
    return said


def warnings(plans: Sequence[Plan], worse: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """By plan that loses to a baseline: to which, and by how much. worse: see `marks.losers`."""
    found = {}
    for plan in plans:
        if worse.get(plan["name"]):
            rate, asked = plan["accuracy"]["all"], plan["accuracy"]["questions"]
            against = [f"{name} ({'mean ' if name == 'random' else ''}{points(theirs)} %) by {number(theirs - rate, 2)} points, "
                       f"{round((theirs - rate) * asked / 100, 1):g} of {asked} questions" for name, theirs in worse[plan["name"]].items()]
            found[plan["name"]] = f"**{plan['name']}** ({points(rate)} %) loses to {', and to '.join(against)}."
    return found


def of_mark(mark: Mark, tokens: int) -> str:
    """All facts of a mark of the measured chart, a line each, for its tooltip and for a screen reader."""
    plan, rates = mark.plans[0], mark.values("accuracy", "all")
    lines = [mark.name, f"{mark.keep} of {tokens} visual tokens" + (f", cut at {plan['site']}" if plan.get("site") and mark.method != "none" else "")
             + (f", the nearest it can make to {mark.budget}" if mark.keep != mark.budget else "") + " (counted)"]
    lines += [str(plan["summary"])] * bool(plan.get("summary"))
    lines += [f"{key}: {value}" for key, value in (plan.get("parameters") or {}).items() if key != "seed"]
    seeds = f", mean of {len(rates)} seeds, {span(rates, points)}" if len(rates) > 1 else ""
    lines.append(f"accuracy: {points(mark.mean('accuracy', 'all'))} %{seeds} (measured)")
    for phase, title in TIMES.items():
        ends = f", {ms_span(mark.ends(phase))}" if mark.ends(phase) else ""
        lines.append(f"{title}: {ms(mark.mean('latency', phase, 'median'))}{ends} (measured)")
    used, cache = (size(mark.mean("memory", part)) for part in ("cache_used_bytes", "cache_bytes"))
    return "\n".join([*lines, f"cache: {used} used of {cache} (counted)", f"peak memory: {size(mark.mean('peak', 'peak_bytes'))} (measured)"])


def of_device_mark(entry: dict[str, Any]) -> str:
    """All facts of a mark of the chart of devices."""
    device, mark = entry["device"], entry["mark"]
    ends = device.ends(mark, "memory_bytes")
    return "\n".join([f"{mark.name} on {device.name}", f"accuracy: {points(entry['accuracy'])} % (measured here)",
                      f"first token: {ms(entry['time'])}, {ms_span(entry['ends'])} (predicted)",
                      f"memory: {size(entry['memory'])}{f', {size_span(ends)}' if ends else ''} (predicted): {device.verdict(mark)}",
                      "beaten by another plan on this device" if not entry["best"] else "no plan beats it on this device"])
