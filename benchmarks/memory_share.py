"""What engines take beside a model's own parts, from published peaks of memory: part of `python -m benchmarks.predict`."""
from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from statistics import NormalDist, median, stdev

from benchmarks import predict_fit as fitting
from edgecomp import devices
from edgecomp.predict import share
from edgecomp.predict.model import Shape
from edgecomp.predict.parts import parts_of
from edgecomp.predict.request import Request

# Meters that leave weights out: NVIDIA's page says so of Thor, and its DGX Spark peaks are below the weights as well.
PARTLY = ("jetson-agx-thor", "dgx-spark-gb10")
ENOUGH = 5  # peaks for a share of their own


@dataclass(frozen=True)
class Peak:
    """One published peak: what was counted of it, and what the engine's own share was."""
    engine: str
    kind: str
    model: str
    experts: bool
    counted: float
    measured: float

    @property
    def rest(self) -> float:
        return self.measured - self.counted


def peaks() -> list[Peak]:
    """Peaks of one sequence whose meter counts everything."""
    models = json.loads((fitting.DATA / "models.json").read_text(encoding="utf-8"))
    shapes = {row: Shape.of_config(model["config"]) for model in models.values() for row in model["rows"]}
    found = []
    for line in csv.DictReader((fitting.DATA / "measurements.csv").open(encoding="utf-8")):
        format_ = fitting.formats(line["weight_quant"], line["engine"], line["engine_version"])
        if (not line["peak_mem_mb"] or line["device"] in PARTLY or line["mode"] != "vanilla" or line["batch"] != "1" or format_ is None
                or "superseded" in line["quality"] or line["model"] not in shapes):
            continue
        shape, engine = shapes[line["model"]], line["engine"].removesuffix(" (eager)")
        visual = int(float(line["image_tokens"] or line["vit_tokens"] or 0)) if shape.tower else 0
        prompt = max(round(float(line["input_tokens"] or 0)), visual, 1)
        request = Request(prompt, max(round(float(line["decode_ctx"] or 0)), prompt), visual)
        counted = sum(parts_of(shape, request, format_, engine).values())
        found.append(Peak(engine, share.kind(devices.load(line["device"])), line["model"],
                          any(layer.experts for layer in shape.layers), counted, float(line["peak_mem_mb"]) * 2**20))
    return found


def ends(rests: list[float]) -> tuple[float, float]:
    """Between which the next rest is with 90 %: the median and Student's t times the spread, for there are too few to count ranks."""
    degrees, z = len(rests) - 1, NormalDist().inv_cdf(0.95)
    student = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)  # Abramowitz and Stegun 26.7.5
    half = student * stdev(rests) * math.sqrt(1 + 1 / len(rests))
    return median(rests) - half, median(rests) + half


def shares(found: list[Peak]) -> dict[str, object]:
    """What the predictor reads: by engine and kind of device, and of all together for the rest, whose least may be nothing.

    Models of experts took up to twice their weights, on the one board that they were measured on: they are left out here.
    """
    own = {}
    for (engine, kind), rests in _groups(found):
        if len(rests) >= ENOUGH:
            low, high = ends([peak.rest for peak in rests])
            own[f"{engine} | {kind}"] = {"value": round(median(peak.rest for peak in rests)), "low": round(max(low, 0)), "high": round(high),
                                         "rows": len(rests)}
    every = [peak.rest for peak in found if not peak.experts]
    return {"shares": own, "pooled": {"value": round(median(every)), "low": 0, "high": round(ends(every)[1]), "rows": len(every),
                                      "of": ", ".join(sorted({peak.engine for peak in found}))}}


def _groups(found: list[Peak]) -> list[tuple[tuple[str, str], list[Peak]]]:
    groups: dict[tuple[str, str], list[Peak]] = defaultdict(list)
    for peak in found:
        if not peak.experts:
            groups[peak.engine, peak.kind].append(peak)
    return sorted(groups.items())


def report(found: list[Peak]) -> str:
    """Each share, and how far whole peaks are off when their own model is left out."""
    lines = ["## Memory: what an engine takes beside weights, cache and activations", "",
             "Peaks of dense models and one sequence whose meter counts everything. Errors are of whole peaks, predicted without their model.", "",
             "| engine | on | peaks | models | share, GiB | interval, GiB | median error | within |", "|---|---|---|---|---|---|---|---|"]
    for (engine, kind), group in _groups(found):
        if len(group) < ENOUGH:
            continue
        errors, inside = [], 0
        for peak in group:
            others = [other.rest for other in group if other.model != peak.model]
            low, high = ends(others)
            errors.append(100 * abs((peak.counted + median(others)) / peak.measured - 1))
            inside += low <= peak.rest <= high
        rests = [peak.rest for peak in group]
        low, high = ends(rests)
        lines.append(f"| {engine} | {share.WORDS[kind]} | {len(group)} | {len({peak.model for peak in group})} | {median(rests) / 2**30:.2f} | "
                     f"{low / 2**30:.2f} to {high / 2**30:.2f} | {median(errors):.1f} % | {inside} of {len(group)} |")
    every = [peak for peak in found if not peak.experts]
    rests = [peak.rest for peak in every]
    lines.append(f"| all others, pooled | any | {len(every)} | {len({peak.model for peak in every})} | {median(rests) / 2**30:.2f} | "
                 f"0 to {ends(rests)[1] / 2**30:.2f} | | |")
    experts = ", ".join(f"{peak.model} {peak.rest / 2**30:.1f}" for peak in found if peak.experts)
    return "\n".join([*lines, "", f"Left out, GiB beside the parts: {experts}. For models of experts the interval goes on by their weights.", ""])
