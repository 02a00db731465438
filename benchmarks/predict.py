"""How far predictions are from published measurements: each row predicted without its model, its device or its engine.

    python -m benchmarks.predict          the tables, into benchmarks/results/predict.md (a minute and a half)
    python -m benchmarks.predict --fit    writes edgecomp/predict/efficiencies.json first
"""
from __future__ import annotations

import argparse
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks import memory_share
from benchmarks import predict_fit as fitting
from benchmarks.predict_fit import Residual, Row
from edgecomp.predict import efficiency

RESULTS = Path(__file__).parent / "results" / "predict.md"
AIMS = {("model", "decode"): 10, ("model", "prefill"): 20, ("device", "decode"): 25, ("device", "prefill"): 40}
# how much was known of a path: what its rows were left out by to know no more
SOURCES = {"path": "model", "device": "engine", "engine": "device", "neither": "device and engine"}
MANY, FEW = 10, 5  # units: so many that rows are counted, and so few that nothing is said of the next one
WORDS = {"path": "this device, engine and format", "device": "the device, not this engine or format on it",
         "engine": "the engine, not on this device", "neither": "neither, only its family and precision"}


def percent(residuals: list[Residual]) -> list[float]:
    return sorted(100 * abs(math.expm1(each.log)) for each in residuals)


def table(title: str, residuals: list[Residual], key: Callable[[Residual], tuple[str, ...]], heads: tuple[str, ...]) -> str:
    groups: dict[tuple[str, ...], list[Residual]] = defaultdict(list)
    for each in residuals:
        groups[key(each)].append(each)
    lines = [f"## {title}", "", f"| {' | '.join(heads)} | rows | median error | 90 % are within |", f"|{'---|' * (len(heads) + 3)}"]
    for name, group in sorted(groups.items()):
        errors = percent(group)
        lines.append(f"| {' | '.join(name)} | {len(group)} | {median(errors):.1f} % | {errors[math.ceil(0.9 * len(errors)) - 1]:.1f} % |")
    return "\n".join([*lines, ""])


def by_unit(pool: list[Residual], known: str) -> dict[str, list[Residual]]:
    """Rows by what they share their error with: the model where its path is known, else the device."""
    units: dict[str, list[Residual]] = defaultdict(list)
    for each in pool:
        units[each.row.model if known == "path" else each.row.device.id].append(each)
    return units


def quantile(residuals: list[Residual]) -> float:
    """What 90 % of |log error| are within, as conformal prediction counts it (arXiv 2107.07511): the ceil(0.9 (n + 1))-th smallest."""
    ordered = sorted(abs(each.log) for each in residuals)
    return ordered[min(len(ordered), math.ceil(0.9 * (len(ordered) + 1))) - 1]


def width(units: dict[str, list[Residual]]) -> float:
    """What 90 % of |log error| are within, of rows of many units. Of few, whose rows are off together, a row says little of the next unit: then
    all units weigh the same, and the next one's rows are counted as beyond every row that was seen (hierarchical conformal prediction,
    arXiv 2306.06342)."""
    if len(units) >= MANY:
        return quantile([each for rows in units.values() for each in rows])
    weighed = sorted((abs(each.log), 1 / len(rows) / (len(units) + 1)) for rows in units.values() for each in rows)
    total = 0.0
    for error, weight in weighed:
        total += weight
        if total >= 0.9:
            return error
    return weighed[-1][0]


def pools(by: dict[str, list[Residual]]) -> dict[tuple[str, str], dict[str, list[Residual]]]:
    """(phase, what was known): the errors that a prediction of that kind may expect, by unit."""
    return {(phase, known): by_unit([each for each in by[name] if each.row.phase == phase and each.known == known], known)
            for phase in efficiency.TERMS for known, name in SOURCES.items()}


def spreads(pool: dict[tuple[str, str], dict[str, list[Residual]]]) -> dict[str, dict[str, float]]:
    """Half the widths of the intervals. Knowing less never narrows one; a kind that was seen on too few units has that of knowing nothing."""
    found: dict[str, dict[str, float]] = {}
    for phase in efficiency.TERMS:
        own = {known: width(units) for known in SOURCES if len(units := pool[phase, known]) >= FEW}
        most, least = max(own.values()), own.get("path", 0.0)
        found[phase] = {known: round(most if known == "neither" else max(own.get(known, most), least), 4) for known in SOURCES}
    return found


def coverage(pool: dict[tuple[str, str], dict[str, list[Residual]]]) -> dict[tuple[str, str], tuple[int, int]]:
    """Rows within an interval whose width was taken from the other models' (or devices') rows alone: (within, all)."""
    held: dict[tuple[str, str], tuple[int, int]] = {}
    for kind, units in pool.items():
        if len(units) >= FEW:
            inside = 0
            for name, rows in units.items():
                most = width({other: theirs for other, theirs in units.items() if other != name})
                inside += sum(abs(each.log) <= most for each in rows)
            held[kind] = inside, sum(map(len, units.values()))
    return held


def save(rows: list[Row], spread: dict[str, dict[str, float]]) -> None:
    """Writes the constants that the predictor reads."""
    stored: dict[str, list[str]] = defaultdict(list)
    for (engine, weights), _ in Counter((row.engine, row.weights) for row in rows if row.phase != "vision").most_common():
        stored[engine].append(weights)
    for row in rows:
        stored.setdefault(row.engine, [])
    effects = {}
    for phase in efficiency.TERMS:
        fitted = fitting.fit([row for row in rows if row.phase == phase])
        effects[phase] = {effect: {key: {"log": [round(float(value), 4) for value in log], "rows": count}
                                   for key, (log, count) in sorted(entries.items())} for effect, entries in fitted.items()}
    data = {"made_by": "python -m benchmarks.predict --fit", "from": "benchmarks/data/measurements.csv, benchmarks/data/models.json",
            "terms": efficiency.TERMS, "engines": dict(sorted(stored.items())), "spread": spread,
            "memory": memory_share.shares(memory_share.peaks()), "effects": effects}
    text = json.dumps(data, indent=1)
    efficiency.TABLE.write_text(text + "\n", encoding="utf-8")


def report(rows: list[Row], left: Counter[str], by: dict[str, list[Residual]]) -> str:
    pool = pools(by)
    spread, held = spreads(pool), coverage(pool)
    known = [each for each in by["model"] if each.known == "path"]
    devices = Counter((each.row.phase, each.row.device.id) for each in by["device"])
    often = [each for each in by["device"] if devices[each.row.phase, each.row.device.id] >= 5]
    counts = ", ".join(f"{count} {phase}" for phase, count in Counter(row.phase for row in rows).items())
    lines = ["# Predictions against published measurements", "",
             "`python -m benchmarks.predict`. Errors are |predicted / measured - 1| of times; no row was seen by the constants that predict it.", "",
             f"{len(rows)} times ({counts}) of {len({row.model for row in rows})} decoders and towers on "
             f"{len({row.device.id for row in rows})} devices. Lines left out: "
             f"{'; '.join(f'{count} {why}' for why, count in left.most_common())}. "
             "Prefill of batches of unequal prompts (MTBench) is left out too: what they are padded to is not stated. "
             "Models that share a decoder count as one.", "",
             "| what | median error | aim | |", "|---|---|---|---|"]
    for (name, phase), aim in AIMS.items():
        group = [each for each in (known if name == "model" else often) if each.row.phase == phase]
        value = median(percent(group))
        what = "its model left out, its path known" if name == "model" else "its device left out, devices with 5 rows or more"
        lines.append(f"| {phase}, {what} ({len(group)} rows) | {value:.1f} % | {aim} % | {'reached' if value <= aim else 'missed'} |")
    lines += ["", "## Intervals of 90 %", "",
              "Widths are from the rows below, each predicted without its model, its engine, its device, or both of these; coverage is that of "
              "widths taken without the row's own model (or device). Fewer than ten of them are weighed alike; fewer than five say nothing.", "",
              "| phase | what was known of the path | rows | models or devices | interval | rows within |", "|---|---|---|---|---|---|"]
    for (phase, what), units in pool.items():
        inside = f"{100 * held[phase, what][0] / held[phase, what][1]:.0f} %" if (phase, what) in held else "too few"
        half, count = spread[phase][what], sum(map(len, units.values()))
        lines.append(f"| {phase} | {WORDS[what]} | {count} | {len(units)} | {math.exp(-half):.2f} to {math.exp(half):.2f} times | {inside} |")
    total = [sum(each) for each in zip(*held.values(), strict=True)]
    lines += [f"| all | | {total[1]} | | | {100 * total[0] / total[1]:.0f} % |", ""]

    def engine(each: Residual) -> tuple[str, str]:
        return each.row.phase, each.row.engine

    unknown = [each for each in by["model"] if each.known != "path"]
    lines += [table("Model left out, by phase and engine (path known)", known, engine, ("phase", "engine")),
              table("Model left out, where the path is known by that model alone", unknown, engine, ("phase", "engine")),
              table("Device left out, by phase and engine", by["device"], engine, ("phase", "engine")),
              table("Device left out, by device with 5 rows or more", often, lambda each: (each.row.phase, each.row.device.id), ("phase", "device")),
              memory_share.report(memory_share.peaks()),
              table("Model left out, by model (path known)", known, lambda each: (each.row.phase, each.row.model), ("phase", "model"))]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="write the constants that edgecomp reads")
    arguments = parser.parse_args()
    rows, left = fitting.read()
    by = {name: fitting.left_out(rows, name) for name in SOURCES.values()}
    if arguments.fit:
        save(rows, spreads(pools(by)))
    text = report(rows, left, by)
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
