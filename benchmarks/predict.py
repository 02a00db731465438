"""How far predictions are from published measurements: each row predicted without its model, its device or its engine.

    python -m benchmarks.predict          the tables, into benchmarks/results/predict.md (a minute and a half)
    python -m benchmarks.predict --fit    writes edgecomp/predict/efficiencies.json first
"""
from __future__ import annotations

import argparse
import csv
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks import predict_fit as fitting
from benchmarks.predict_fit import Residual, Row
from edgecomp.predict import efficiency
from edgecomp.predict.model import Shape
from edgecomp.predict.predict import Request, parts_of

RESULTS = Path(__file__).parent / "results" / "predict.md"
AIMS = {("model", "decode"): 10, ("model", "prefill"): 20, ("device", "decode"): 25, ("device", "prefill"): 40}
WORDS = {"path": "this device, engine and format", "device": "the device, not this engine or format on it",
         "engine": "the engine, not on this device", "neither": "neither, only its family and precision"}
MEMORY_DEVICES = ("jetson-orin-nano-8gb", "jetson-orin-nano-8gb-super", "jetson-orin-nx-16gb")


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


def quantile(residuals: list[Residual]) -> float:
    """What 90 % of |log error| are within, as conformal prediction counts it (arXiv 2107.07511): the ceil(0.9 (n + 1))-th smallest."""
    ordered = sorted(abs(each.log) for each in residuals)
    return ordered[min(len(ordered), math.ceil(0.9 * (len(ordered) + 1))) - 1]


def pools(by: dict[str, list[Residual]]) -> dict[tuple[str, str], list[Residual]]:
    """(phase, what was known): the residuals that a prediction of that kind may expect."""
    sources = {"path": ("model",), "engine": ("device",), "device": ("engine",), "neither": ("device", "engine")}
    return {(phase, known): [each for name in names for each in by[name] if each.row.phase == phase and each.known == known]
            for phase in efficiency.TERMS for known, names in sources.items()}


def spreads(pool: dict[tuple[str, str], list[Residual]]) -> dict[str, dict[str, float]]:
    """Half the widths of the intervals. Knowing less never narrows one; too few rows take the next kind's."""
    found: dict[str, dict[str, float]] = {}
    for phase in efficiency.TERMS:
        width = 0.0
        found[phase] = {}
        for known in ("path", "device", "engine", "neither"):
            group = pool[phase, known]
            width = max(width, quantile(group) if len(group) >= 10 else width)
            found[phase][known] = round(width, 4)
    return found


def coverage(pool: dict[tuple[str, str], list[Residual]]) -> dict[tuple[str, str], tuple[int, int]]:
    """Rows within an interval whose width was taken from the other models' (or devices') rows alone: (within, all)."""
    held: dict[tuple[str, str], tuple[int, int]] = {}
    for (phase, known), group in pool.items():
        def unit(each: Residual, known: str = known) -> str:
            return each.row.model if known == "path" else each.row.device.id

        units = {unit(each) for each in group}
        if len(group) < 10 or len(units) < 2:
            continue
        inside = 0
        for name in units:
            width = quantile([each for each in group if unit(each) != name])
            inside += sum(abs(each.log) <= width for each in group if unit(each) == name)
        held[phase, known] = inside, len(group)
    return held


def overhead() -> dict[str, object]:
    """What a process holds beside weights and cache, from the peaks whose meter counts everything (Orin Nano and NX, one sequence)."""
    models = json.loads((fitting.DATA / "models.json").read_text(encoding="utf-8"))
    shapes = {row: Shape.of_config(model["config"]) for model in models.values() for row in model["rows"]}
    rest = []
    for line in csv.DictReader((fitting.DATA / "measurements.csv").open(encoding="utf-8")):
        if (line["device"] in MEMORY_DEVICES and line["engine"] == "TensorRT Edge-LLM" and line["mode"] == "vanilla" and line["batch"] == "1"
                and "superseded" not in line["quality"] and line["peak_mem_mb"] and line["model"] in shapes and line["decode_ctx"]):
            visual = int(float(line["image_tokens"] or line["vit_tokens"] or 0))
            context = max(round(float(line["decode_ctx"])), visual)
            parts = parts_of(shapes[line["model"]], Request(max(visual, 1), context, visual), "int4")
            rest.append(float(line["peak_mem_mb"]) * 2**20 - sum(parts.values()))
    low, middle, high = np.quantile(rest, [0.05, 0.5, 0.95])
    return {"value": round(max(middle, 0)), "low": round(max(low, 0)), "high": round(high), "rows": len(rest),
            "of": f"weights and cache counted; the rest as {len(rest)} peaks of TensorRT Edge-LLM on Orin Nano and NX left it"}


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
            "terms": efficiency.TERMS, "engines": dict(sorted(stored.items())), "spread": spread, "memory": overhead(), "effects": effects}
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
              "Widths are from the rows below; coverage is that of widths taken without the row's own model (or device).", "",
              "| phase | what was known of the path | rows | interval | rows within |", "|---|---|---|---|---|"]
    for (phase, what), group in pool.items():
        inside = f"{100 * held[phase, what][0] / held[phase, what][1]:.0f} %" if (phase, what) in held else "too few"
        width = spread[phase][what]
        lines.append(f"| {phase} | {WORDS[what]} | {len(group)} | {math.exp(-width):.2f} to {math.exp(width):.2f} times | {inside} |")
    total = [sum(each) for each in zip(*held.values(), strict=True)]
    lines += [f"| all | | {total[1]} | | {100 * total[0] / total[1]:.0f} % |", ""]

    def engine(each: Residual) -> tuple[str, str]:
        return each.row.phase, each.row.engine

    unknown = [each for each in by["model"] if each.known != "path"]
    lines += [table("Model left out, by phase and engine (path known)", known, engine, ("phase", "engine")),
              table("Model left out, where the path is known by that model alone", unknown, engine, ("phase", "engine")),
              table("Device left out, by phase and engine", by["device"], engine, ("phase", "engine")),
              table("Device left out, by device with 5 rows or more", often, lambda each: (each.row.phase, each.row.device.id), ("phase", "device")),
              table("Model left out, by model (path known)", known, lambda each: (each.row.phase, each.row.model), ("phase", "model"))]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="write the constants that edgecomp reads")
    arguments = parser.parse_args()
    rows, left = fitting.read()
    by = {name: fitting.left_out(rows, name) for name in ("model", "device", "engine")}
    if arguments.fit:
        save(rows, spreads(pools(by)))
    text = report(rows, left, by)
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
