"""What is predicted for devices: what fits where, and the times of every plan, as tables and sentences."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edgecomp.report.formats import find, metric, ms, ms_span, number, points, size, size_span, span
from edgecomp.report.marks import Mark, styles
from edgecomp.report.tables import Body, Cell, Column, Row, Table

SIGNS = {"fits": "✓", "tight": "!", "does not fit": "✗"}
TIMES = {"vision_ms": "vision", "prefill_ms": "prefill", "ttft_ms": "first token", "tpot_ms": "each further token"}


@dataclass(frozen=True, eq=False)
class Target:
    """One of result["devices"], and how its marks look."""
    facts: dict[str, Any]
    look: tuple[str, str]

    @property
    def name(self) -> str:
        return f"{self.facts['name']}{', this machine' if self.facts['here'] else ''}"

    def plan(self, mark: Mark) -> dict[str, Any]:
        """The prediction of a mark: seeds have the same, so that of the first which has one; {} where nothing was predicted."""
        found = [self.facts["plans"][plan["name"]] for plan in mark.plans if plan["name"] in self.facts["plans"]]
        return next((plan for plan in found if "refused" not in plan), {})

    def refused(self, mark: Mark) -> str:
        """Why nothing was predicted, where a reason is given."""
        return next((why for plan in mark.plans if (why := find(self.facts, "plans", plan["name"], "refused"))), "")

    def value(self, mark: Mark, name: str) -> float | None:
        value: float | None = find(self.plan(mark), name, "value")
        return value

    def ends(self, mark: Mark, name: str) -> tuple[float, float] | None:
        found = self.plan(mark).get(name)
        return (found["low"], found["high"]) if found else None

    def verdict(self, mark: Mark) -> str:
        return str(self.plan(mark).get("verdict") or "")

    def cell(self, mark: Mark, name: str) -> Cell:
        """A predicted number with its interval below."""
        form, of_ends = FORMS[name]
        return Cell(form(self.value(mark, name)), of_ends(self.ends(mark, name)))


FORMS: dict[str, tuple[Callable[[float | None], str], Callable[[Sequence[float] | None], str]]] = {
    **dict.fromkeys(TIMES, (ms, ms_span)), "memory_bytes": (size, size_span), "decode_tokens_per_s": (number, span)}


def targets(result: dict[str, Any]) -> list[Target]:
    found = result.get("devices") or []
    looks = styles(device["id"] for device in found)
    return [Target(device, looks[device["id"]]) for device in found]


def summary(devices: Sequence[Target], mark: Mark) -> str:
    """On how many devices a plan fits, and how soon its first token is there; **bold** as in Markdown."""
    on = {verdict: [device for device in devices if device.verdict(mark) == verdict] for verdict in SIGNS}
    said = [f"fits {len(on['fits'])} of {_devices(len(devices))}"]
    said += [f"is tight on {', '.join(device.name for device in on['tight'])}"] * bool(on["tight"])
    said += [f"does not fit {', '.join(device.name for device in on['does not fit'])}"] * bool(on["does not fit"])
    text = f"**Predicted:** **{mark.name}** {' and '.join([', '.join(said[:-1]), said[-1]] if said[1:] else said)}."
    times = sorted((took, device.name) for device in on["fits"] + on["tight"] if (took := device.value(mark, "ttft_ms")) is not None)
    if times:
        (fast, first), (slow, last) = times[0], times[-1]
        text += f" Where it fits, its first token comes in **{ms(fast)}** on {first}" + (f" to **{ms(slow)}** on {last}." if times[1:] else ".")
    return text


def _devices(count: int) -> str:
    return f"{count} device{'' if count == 1 else 's'}"


def glance_table(devices: Sequence[Target], full: Mark | None, mark: Mark) -> Table:
    """The full model and one plan on every device."""
    marks = [m for m in (mark, full) if m is not None]
    marks = marks[:1] if marks[0] is marks[-1] else marks
    rows = [Row(device.name, [Cell(fit_words(device, mark)), *(device.cell(m, "ttft_ms") for m in marks), device.cell(mark, "tpot_ms")],
                line=device.facts["id"]) for device in devices]
    columns = [Column("memory"), *(Column(f"first token, {m.name}", "predicted") for m in marks),
               Column(f"each further token, {mark.name}", "predicted")]
    return Table("glance", f"{mark.name} on each device, with the 90 % interval.", "device", columns, [Body(rows)])


def fit_words(device: Target, mark: Mark) -> str:
    verdict = device.verdict(mark)
    return f"{SIGNS.get(verdict, '')} {verdict}".strip() or "not predicted"


def fit_table(devices: Sequence[Target], marks: Sequence[Mark]) -> Table:
    """Devices x plans."""
    rows = [Row(device.name, [Cell(size(device.facts["usable_bytes"])), *(
        Cell(fit_words(device, mark), size(device.value(mark, "memory_bytes")) if device.verdict(mark) else "") for mark in marks)],
        line=device.facts["id"]) for device in devices]
    return Table("fits", "Whether each plan fits, and the memory that it takes.", "device",
                 [Column("beside its system", "stated"), *(Column(mark.name, "predicted") for mark in marks)], [Body(rows)])


def fit_reasons(devices: Sequence[Target], marks: Sequence[Mark]) -> list[str]:
    """Of every device where plans are tight, do not fit or were not predicted: which, the largest part, and the way out of the largest plan."""
    found = []
    for device in devices:
        groups: dict[tuple[str, str], list[Mark]] = {}
        for mark in marks:
            if plan := device.plan(mark):
                groups.setdefault((plan["verdict"], largest_part(plan)), []).append(mark)
            else:
                groups.setdefault(("not predicted", device.refused(mark)), []).append(mark)
        for (verdict, why), those in groups.items():
            names = "every plan" if len(those) == len(marks) else ", ".join(mark.name for mark in those)
            said = [f"**{device.name}**: {names}: {verdict}", why] if verdict == "not predicted" else [
                f"**{device.name}**: {names}: {verdict}. {_needs(device, max(those, key=lambda mark: device.value(mark, 'memory_bytes') or 0))}"]
            found += [": ".join(filter(None, said)) + "."] * (verdict != "fits")
    return found


def largest_part(plan: dict[str, Any]) -> str:
    parts = plan.get("memory_parts") or {}
    return max(parts, key=lambda part: float(parts[part]), default="")


def _needs(device: Target, mark: Mark) -> str:
    """What a plan takes and of what, the largest part of it, and the way out, which may name that part already."""
    plan = device.plan(mark)
    largest, way = largest_part(plan), plan.get("way_out") or ""
    said = f"For {mark.name} {size_span(device.ends(mark, 'memory_bytes'))} are predicted, {size(device.facts['usable_bytes'])} are there"
    part = f"; the largest part is {largest}, {size(plan['memory_parts'][largest])}" if largest and largest not in way else ""
    return said + part + (f": {way}" if way else "")


def time_table(devices: Sequence[Target], marks: Sequence[Mark]) -> Table:
    """Every plan on every device: what is behind the charts."""
    names = [*TIMES, "decode_tokens_per_s", "memory_bytes"]
    bodies = [Body([Row(mark.name, [Cell(points(mark.mean("accuracy", "all"))), *(device.cell(mark, name) for name in names)], mark.about)
                    for mark in marks if device.plan(mark)], device.name) for device in devices]
    columns = [Column("accuracy here, %", "measured"), *(Column(title, "predicted") for title in TIMES.values()),
               Column("tokens a second", "predicted"), Column("memory", "predicted")]
    return Table("device-times", "Every plan on every device, with the 90 % interval.", "plan", columns, [body for body in bodies if body.rows],
                 "device")


def profile_table(devices: Sequence[Target]) -> Table:
    rows = []
    for device in devices:
        facts = device.facts
        rows.append(Row(device.name, [Cell(metric(facts["peak_flops_per_s"])), Cell(facts["peak_precision"]),
                                      Cell(f"{metric(facts['bandwidth_bytes_per_s'])}B/s"), Cell(size(facts["usable_bytes"])),
                                      Cell(f"{facts['engine']}, weights in {facts['weights']}")],
                        facts["id"], facts["id"]))
    columns = [Column("operations a second", "stated"), Column("in"), Column("memory bandwidth", "stated"),
               Column("memory beside its system", "stated"), Column("engine")]
    return Table("profiles", "What the devices have, by their profiles.", "device", columns, [Body(rows)])


def rests_on(device: Target) -> list[str]:
    """The constants that a device's predictions rest on, each once."""
    return list(dict.fromkeys(of for plan in device.facts["plans"].values() for name in ("vision_ms", "prefill_ms", "tpot_ms", "memory_bytes")
                              if (of := find(plan, name, "constants"))))
