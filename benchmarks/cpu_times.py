"""Times on a CPU under onnxruntime, and the constants that predict them: bundles, plans and prompt lengths, through `Session` as `profile` does.

    python -m benchmarks.cpu_times               measures, writes data/cpu_times.csv, then the rest   (about 40 minutes on 2 cores)
    python -m benchmarks.cpu_times --only demo-fp16 wide --repeats 3     measures these again, the other rows stay
    python -m benchmarks.cpu_times --fit         from the rows that are there: edgecomp/predict/cpu_efficiencies.json, results/cpu_times.md

Bundles of sites.py, choosing.py and large.py and fp16 ones (`edgecomp compile --precision fp16`), as far as they are there, two models of other
proportions that are made here, and quantized ones, all with random weights but the demonstration model. Run it where nothing else runs.
"""
from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime as dt
import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import predict_fit as fitting
from benchmarks.common import QUESTIONS, RESULTS, WORK, markdown, quantized_bundle, random_llava
from benchmarks.predict import by_unit, percent, width
from benchmarks.predict_fit import Residual, Row
from edgecomp import __version__
from edgecomp.beside import ENGINE
from edgecomp.detect import detect
from edgecomp.devices import Cpu, Device, Memory, Peaks, Sources
from edgecomp.measure import Spec, measure
from edgecomp.predict import efficiency
from edgecomp.predict.calibration import version
from edgecomp.predict.graph import counted
from edgecomp.predict.work import Work
from edgecomp.report.phases import PHASES
from edgecomp_runtime import Bundle

CSV = Path(__file__).parent / "data" / "cpu_times.csv"
PICTURE = QUESTIONS.parent / "images" / "scene-03.jpg"
NEW_TOKENS = 17
MACHINE = ("machine", "chip", "architecture", "cores", "vector", "bandwidth_gb_per_s", "fp32_tflops")
WORDS = ["describe", "the", "image.", "where", "is", "the", "star?", "what", "number", "is", "written?", "what", "color", "is", "the", "ring?"]
# bundle: (decoder, vision tower), by which rows are left out; plans; words of the question
BUNDLES = {
    "sites-demo": ("demo", "demo", ("full", "random-64", "fastv-64-decoder2", "random-64-encoder4"), (8, 200, 900)),
    "demo-fp16": ("demo", "demo", ("full", "dart-64", "fastv-64-decoder2"), (8, 200, 900)),
    "cpu-wide": ("wide", "wide", ("full", "random-16"), (8, 100, 400)),
    "cpu-deep": ("deep", "deep", ("full", "random-16"), (8, 100, 400)),
    "sites-smol": ("SmolLM2-135M", "sites", ("full", "random-64", "fastv-64-decoder2", "random-64-encoder4"), (8, 200, 900)),
    "smolvlm-256m": ("SmolLM2-135M", "SigLIP, 5 tiles", ("full",), (8, 200, 900)),
    "smolvlm-256m-fp16": ("SmolLM2-135M", "SigLIP, 1 tile", ("full",), (8, 200, 900)),
    "selectors-llava_next-bundle": ("SmolLM2-135M", "LLaVA-NeXT", ("full", "random-320", "random-320-decoder2"), (8,)),
    **{f"{name}-{bits}": (decoder, tower, ("full",), (8, 400)) for bits in ("int8", "int4") for name, decoder, tower in (
        ("sites-demo", "demo", "demo"), ("cpu-wide", "wide", "wide"), ("cpu-deep", "deep", "deep"), ("sites-smol", "SmolLM2-135M", "sites"))},
    "qwen2-vl-2b": ("Qwen2-1.5B", "Qwen2-VL", ("full",), (8, 300)),
}
# few wide layers, and many narrow ones: width, MLP, layers, heads of tower and decoder
FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MADE = {"cpu-wide": ((1024, 4096, 4, 16), (2048, 5632, 4, 16)), "cpu-deep": ((384, 1536, 12, 6), (384, 1024, 24, 6))}


def times(name: str, repeats: int) -> Iterator[dict[str, Any]]:
    """One line for each phase of each plan and prompt of a bundle. Vision does not know the prompt: its time is the median over them."""
    decoder, tower, plans, questions = BUNDLES[name]
    bundle = Bundle.open(WORK / name)
    for plan in plans:
        visions = []
        for words in questions:
            prompt = " ".join((WORDS * (words // len(WORDS) + 1))[:words])
            took = measure(Spec(str(bundle.path), plan, str(PICTURE), prompt, repeats, NEW_TOKENS))["latency"]
            rows = took["prompt_rows"]
            asked = {"text_rows": rows - bundle.manifest.plans[plan].visual_tokens, "context": rows + took["new_tokens"] // 2}
            about = {"engine": ENGINE, "engine_version": version(ENGINE), "edgecomp": __version__, "date": dt.date.today().isoformat(),
                     "bundle": name, "plan": plan, "prompt_rows": rows, "repeats": repeats}
            for phase, key in ((name, about.measured) for name, about in PHASES.items()):
                of = {"phase": phase, "format": efficiency.format_of(phase, ENGINE, bundle.manifest),
                      "model": tower if phase == "vision" else decoder, "context": asked["context"] if phase == "decode" else 0,
                      **_flat(counted(bundle, plan, phase, **asked)),
                      **{end: took[key][which] / 1000 for end, which in (("seconds", "median"), ("low", "low"), ("high", "high"))}}
                if not took[key]["median"]:  # an answer of one token has no time a token
                    continue
                if phase == "vision":
                    visions.append({**about, **of})
                else:
                    yield {**about, **of}
        yield {**sorted(visions, key=lambda line: float(line["seconds"]))[len(visions) // 2], "prompt_rows": 0}


def _flat(work: Work) -> dict[str, Any]:
    return {**dataclasses.asdict(work), "flops": " ".join(f"{precision}={count:.0f}" for precision, count in work.flops.items())}


def _work(line: dict[str, str]) -> Work:
    flops = {precision: float(count) for precision, _, count in (part.partition("=") for part in line["flops"].split())}
    counts = (float(line[name]) for name in ("weight_bytes", "cache_read_bytes", "cache_write_bytes", "activation_bytes"))
    return Work(flops, *counts, int(line["layers"]))


def read() -> list[dict[str, str]]:
    """The lines that are there."""
    with CSV.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def rows_of(lines: list[dict[str, str]]) -> list[Row]:
    """Lines as the fit takes them."""
    found = []
    for line in lines:
        cpu = Cpu(line["chip"], line["architecture"], int(line["cores"]), line["vector"])
        device = Device(line["machine"], line["machine"], "CPU", Memory("not known", 1, False, float(line["bandwidth_gb_per_s"])),
                        Peaks(fp32_tflops=float(line["fp32_tflops"])), Sources((), ()), cpu=cpu)
        name = f"{line['bundle']}, {line['plan']}, {line['prompt_rows']} rows"
        ideal = efficiency.terms(_work(line), device, line["phase"], ENGINE)
        found.append(Row(name, line["phase"], device, ENGINE, line["format"], line["model"], ideal, float(line["seconds"])))
    return found


def collect(names: list[str], repeats: int) -> None:
    """Measures bundles, and puts their lines in place of the older ones as soon as they are there."""
    here = detect()
    assert here.cpu is not None
    machine = dict(zip(MACHINE, (here.id, here.cpu.chip, here.cpu.architecture, here.cpu.cores, here.cpu.vector, here.memory.bandwidth_gb_per_s,
                                 here.peaks.fp32_tflops), strict=True))
    for name in names:
        if not (WORK / name).exists():
            print(f"left out: {name} is not there")
            continue
        new = [{**machine, **line} for line in times(name, repeats)]
        every: list[dict[str, Any]] = [*(line for line in (read() if CSV.exists() else []) if line["bundle"] != name), *new]
        with CSV.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(new[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(every)
        for line in new:
            print(f"{name}, {line['plan']}, {line['prompt_rows']} rows: {line['phase']} {1000 * line['seconds']:.2f} ms", flush=True)


def fit() -> None:
    """Writes the constants that the predictor reads, and how far they are off for models that they did not see."""
    lines = read()
    rows = rows_of(lines)
    residuals = fitting.left_out(rows, "model")
    of_phase = {phase: [each for each in residuals if each.row.phase == phase] for phase in PHASES}
    effects = {phase: {effect: {key: {"log": [round(float(value), 4) for value in log], "rows": count} for key, (log, count) in entries.items()}
                       for effect, entries in fitting.fit([row for row in rows if row.phase == phase]).items()} for phase in PHASES}
    last = lines[-1]
    data = {"made_by": "python -m benchmarks.cpu_times --fit", "from": "benchmarks/data/cpu_times.csv", "terms": efficiency.TERMS,
            "machine": {"chip": last["chip"], "architecture": last["architecture"], "cores": int(last["cores"]), "vector": last["vector"]},
            "engines": {ENGINE: sorted({row.weights for row in rows})},
            "spread": {phase: round(width(by_unit(group, "path")), 4) for phase, group in of_phase.items()}, "effects": effects}
    efficiency.CPU_TABLE.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    text = report(lines, residuals)
    (RESULTS / "cpu_times.md").write_text(text, encoding="utf-8")
    print(text)


def report(lines: list[dict[str, str]], residuals: list[Residual]) -> str:
    """The error table."""
    groups: dict[tuple[str, str], list[Residual]] = {}
    for each in residuals:
        groups.setdefault((each.row.phase, each.row.weights), []).append(each)
        groups.setdefault((each.row.phase, "all"), []).append(each)
    table = [[phase, format_, len(group), f"{median(percent(group)):.1f} %", f"{percent(group)[math.ceil(0.9 * len(group)) - 1]:.1f} %"]
             for (phase, format_), group in sorted(groups.items())]
    single = [[each.row.phase, each.row.weights, each.row.model, each.row.id, f"{1000 * each.predicted:.2f}", f"{1000 * each.row.seconds:.2f}",
               f"{100 * math.expm1(each.log):+.0f} %"] for each in residuals]
    last = lines[-1]
    return "\n".join([
        "# Times on a CPU, predicted and measured\n",
        f"`python -m benchmarks.cpu_times` on {last['chip']}, {last['cores']} cores, {last['vector']}, onnxruntime {last['engine_version']}. "
        "`measured` are medians, on one machine; `predicted` is by constants that saw no row of the same decoder (or vision tower).\n",
        markdown(["phase", "weights", "rows", "median error", "90 % are within"], table), "## Row by row\n",
        markdown(["phase", "weights", "left out", "bundle, plan, prompt", "predicted ms", "measured ms", "error"], single)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="measure nothing")
    parser.add_argument("--only", nargs="+", choices=list(BUNDLES), default=list(BUNDLES), help="measure these bundles")
    parser.add_argument("--repeats", type=int, default=7, help="of each time, after one to warm up")
    arguments = parser.parse_args()
    if not arguments.fit:
        for name, sides in MADE.items():
            tower, decoder = (dict(zip(FIELDS, sizes, strict=True)) for sizes in sides)
            random_llava(name, tower, {**decoder, "vocab_size": 32000}, 168, {"random": "16"})
        for name in arguments.only:
            quantized_bundle(name)
        collect(arguments.only, arguments.repeats)
    fit()


if __name__ == "__main__":
    main()
