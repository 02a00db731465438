"""Fits the constants of `edgecomp/predict/efficiency.py` to published measurements: rows, what they say, and the fit itself."""
from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgecomp import devices
from edgecomp.devices import Device
from edgecomp.predict import efficiency
from edgecomp.predict.model import Shape
from edgecomp.predict.work import work

DATA = Path(__file__).parent / "data"
# What each constant is before any row was seen: e = 0.7 of the bandwidth and half of a peak, 30 us a layer, a recurrence at 0.3 % of the fp16 peak
START = {"decode": (1 / 0.7, 30e-6, 2.0), "prefill": (2.0, 300.0, 300.0, 1.0, 60e-6), "vision": (2.0, 60e-6)}
# how far each effect goes from nothing, in log
STEP = {"phase": 1.5, "precision": 0.4, "engine": 0.4, "family": 0.3, "device": 0.25, "path": 0.25}
NOISY = 4.0  # times that, for rows whose source is called noisy
NOISE = 0.06  # in log: what rows of one path differ by when nothing is wrong


@dataclass(frozen=True)
class Row:
    """One measured time of one phase, in seconds."""
    id: str
    phase: str
    device: Device
    engine: str
    weights: str
    model: str
    ideal: dict[str, float]
    seconds: float
    noise: float = 1.0


def formats(quantised: str, engine: str, version: str) -> str | None:
    """The weight format of the decoder, as `edgecomp.predict.work` names it."""
    first = quantised.split("/")[0].strip()
    if re.match(r"0\.[4-7]", version) and first in ("NVFP4", "INT4 AWQ"):
        return "nvfp4-head" if first == "NVFP4" else "int4"
    return {"NVFP4": "nvfp4", "NVFP4A16": "nvfp4a16", "INT4 AWQ": "int4", "INT4 AWQ g128": "int4", "INT4 GPTQ": "int4", "W4A16": "int4",
            "GPTQ INT4 Marlin": "int4", "4-bit weight-only": "int4", "INT4 (MLC q4f16)": "q4f16", "FP16": "fp16", "BF16": "fp16", "FP8": "fp8",
            "GGUF F16": "fp16", "GGUF Q4_0": "q4_0", "GGUF Q4_K_M": "q4_k_m", "GGUF Q8_0": "q8_0", "MXFP4": "mxfp4"}.get(first)


def engine_of(name: str, version: str) -> str:
    if name == "TensorRT Edge-LLM" and re.match(r"0\.[4-7]", version):
        return "TensorRT Edge-LLM 0.4-0.7"
    return "llamafile" if name.startswith("llamafile") else name


def read() -> tuple[list[Row], Counter[str]]:
    """The rows that can be fitted, and why the others cannot."""
    models = json.loads((DATA / "models.json").read_text(encoding="utf-8"))
    decoders: dict[object, str] = {}  # Qwen3-VL-8B has Qwen3-8B's decoder: to leave one out is to leave out both
    shapes = {}
    for name, model in models.items():
        shape = Shape.of_config(model["config"])
        same = decoders.setdefault(shape.layers or name, name)
        shapes.update(dict.fromkeys(model["rows"], (same, shape)))
    known = {name: devices.load(name) for name in devices.names()}
    rows: list[Row] = []
    left: Counter[str] = Counter()
    for line in csv.DictReader((DATA / "measurements.csv").open(encoding="utf-8")):
        if line["mode"] != "vanilla":
            left["speculative decoding"] += 1
        elif "superseded" in line["quality"]:
            left["superseded by a later release of the engine"] += 1
        elif line["device"] not in known:
            left["device without a profile"] += 1
        elif line["model"] not in shapes:
            left["model whose numbers are not at hand"] += 1
        else:
            found, why = _of_line(line, known[line["device"]], *shapes[line["model"]])
            rows += found
            if not found:
                left[why] += 1
    return rows, left


def _of_line(line: dict[str, str], device: Device, model: str, shape: Shape) -> tuple[list[Row], str]:
    def number(name: str) -> float:
        return float(line[name] or 0)

    engine, weights = engine_of(line["engine"], line["engine_version"]), formats(line["weight_quant"], line["engine"], line["engine_version"])
    batch = int(line["batch"])
    # llm_inference rows count a batch's prompts together, llm_bench rows one
    total = line["notes"].startswith(("llm_inference", "runtime"))
    prompt = round(number("input_tokens") / (batch if total else 1))
    found = []

    def add(phase: str, ideal: dict[str, float], measured: float, format_: str) -> None:
        noisy = NOISY if "noisy" in line["quality"] else 1.0
        found.append(Row(line["id"], phase, device, engine, format_, model, ideal, measured, noisy))

    if not shape.layers:
        if images := number("images_per_s"):
            side = shape.tower.tile or 0 if shape.tower else 0
            add("vision", efficiency.terms(work(shape, "vision", visual_tokens=side), device, "vision", engine), 1 / images, "fp16")
        return found, "nothing that is timed"
    if weights is None:
        return [], "weight format not stated"
    speed = number("decode_tok_s") or (1000 / number("tpot_ms") if number("tpot_ms") else 0)
    if speed and line["decode_ctx"]:
        step = work(shape, "decode", context=number("decode_ctx"), batch=batch, weights=weights)
        add("decode", efficiency.terms(step, device, "decode", engine, batch), batch / speed, weights)
    vision_in = "incl. ViT" in line["notes"] or line["modality"] == "VLM"
    took = number("prefill_ms") / 1000 or (batch * prompt / number("prefill_tok_s") if number("prefill_tok_s") else 0)
    if not took and number("ttft_ms") and not vision_in:
        took = number("ttft_ms") / 1000
    uneven = total and batch > 1 and line["modality"] == "LLM"  # MTBench: prompts of different lengths, padded to the longest
    if took and prompt and not uneven:
        asked = work(shape, "prefill", prompt_tokens=prompt, batch=batch, weights=weights)
        add("prefill", efficiency.terms(asked, device, "prefill", engine), took, weights)
    tokens = number("vit_tokens")
    if number("vit_ms") and tokens and shape.tower:
        each = round(tokens / batch)
        format_ = "fp8" if line["weight_quant"].endswith("/FP8") else "fp16"
        asked = work(shape, "vision", visual_tokens=each, batch=batch)
        add("vision", efficiency.terms(asked, device, "vision", engine), number("vit_ms") / 1000, format_)
    return found, "no time with its prompt or context"


Fitted = dict[str, dict[str, tuple[np.ndarray, int]]]  # effect, key: log constants and rows


def fit(rows: list[Row], start: Fitted | None = None) -> Fitted:
    """The effects that make the rows' log times, rows of one phase; single rows far off count little (Huber)."""
    ideal = np.array([list(row.ideal.values()) for row in rows])
    target = np.log([row.seconds for row in rows])
    scale = NOISE * np.array([row.noise for row in rows])
    keys = [efficiency.effects(row.device, row.engine, row.weights) for row in rows]
    columns = {key: at for at, key in enumerate(dict.fromkeys((effect, each[effect]) for effect in STEP for each in keys))}
    belongs = np.zeros((len(rows), len(columns)))
    for at, each in enumerate(keys):
        belongs[at, [columns[item] for item in each.items()]] = 1
    count = ideal.shape[1]
    steps = np.repeat([STEP[effect] for effect, _ in columns], count)
    prior = np.log(START[rows[0].phase])
    log = np.zeros((len(columns), count))
    for (effect, key), at in columns.items():
        if start and key in start.get(effect, {}):
            log[at] = start[effect][key][0]
            if effect == "phase":
                log[at] -= prior
    for _ in range(6 if start else 40):
        parts = np.exp(prior + belongs @ log) * ideal
        total = parts.sum(axis=1)
        jacobian = (belongs[:, :, None] * (parts / total[:, None])[:, None, :]).reshape(len(rows), -1)
        off = target - np.log(total)
        noise = scale * np.sqrt(np.maximum(1.0, np.abs(off) / (1.5 * scale)))
        # the effects outnumber the rows: solve for as many unknowns as there are rows
        spread = jacobian * steps**2
        wanted = off + jacobian @ log.ravel()
        new = spread.T @ np.linalg.solve(spread @ jacobian.T + np.diag(noise**2), wanted)
        change = np.clip(new - log.ravel(), -1, 1)
        log += change.reshape(log.shape)
        if np.abs(change).max() < (0.02 if start else 1e-3):
            break
    totals = belongs.sum(axis=0)
    fitted: Fitted = {effect: {} for effect in STEP}
    for (effect, key), at in columns.items():
        fitted[effect][key] = (log[at] + (prior if effect == "phase" else 0), int(totals[at]))
    return fitted


def predicted(fitted: Fitted, row: Row) -> tuple[str, float]:
    """How much of the row's path was known, and its time."""
    keys = efficiency.effects(row.device, row.engine, row.weights)
    found = [fitted[effect][key][0] for effect, key in keys.items() if key in fitted[effect]]
    return (efficiency.known({effect: key in fitted[effect] for effect, key in keys.items()}),
            float(np.exp(sum(found)) @ np.array(list(row.ideal.values()))))


@dataclass(frozen=True)
class Residual:
    """What a row's time was predicted as without its model (or device), and what was known of its path."""
    row: Row
    known: str
    predicted: float

    @property
    def log(self) -> float:
        return math.log(self.predicted / self.row.seconds)


def left_out(rows: list[Row], by: str) -> list[Residual]:
    """Each row predicted by constants that never saw its 'model', 'device' or 'engine', or any row with its 'device and engine'."""
    def names(row: Row) -> tuple[str, ...]:
        return {"model": (row.model,), "device": (row.device.id,), "engine": (row.engine,), "device and engine": (row.device.id, row.engine)}[by]

    found = []
    for phase in START:
        ours = [row for row in rows if row.phase == phase]
        everything = fit(ours)
        for gone in sorted({names(row) for row in ours}):
            fitted = fit([row for row in ours if not any(a == b for a, b in zip(names(row), gone, strict=True))], everything)
            found += [Residual(row, *predicted(fitted, row)) for row in ours if names(row) == gone]
    return found
