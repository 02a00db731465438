"""What `edgecomp profile` would find: four methods at four budgets on a machine, and devices that it predicts for."""
from __future__ import annotations

import base64
import copy
import io
import random
from typing import Any

from PIL import Image, ImageDraw

TOKENS, GRID, QUESTIONS = 576, [24, 24], 113
TASKS = {"color": 22, "count": 17, "exist": 26, "read": 19, "where": 29}
SUMMARIES = {"dart": ("tokens least similar to a few pivots (DART)", "arXiv 2502.11494", "pruning"),
             "cls": ("tokens the CLS token attends to most", "arXiv 2412.01818", "pruning"),
             "pool": ("averages over a coarser grid", "arXiv 2505.19147", "merging"),
             "random": ("tokens by chance", "", "pruning"), "none": ("", "", "")}
# budget -> method -> right answers of 113; random by seed
RIGHT: dict[int, dict[str, Any]] = {
    36: {"dart": 57, "cls": 61, "pool": 58, "random": (55, 60, 53)},
    64: {"dart": 63, "cls": 76, "pool": 70, "random": (66, 61, 68)},
    127: {"dart": 78, "cls": 81, "pool": 80, "random": (74, 77, 75)},
    256: {"dart": 83, "cls": 82, "pool": 82, "random": (82, 81, 83)}}


def picture() -> str:
    """A drawn scene as a data URL."""
    image = Image.new("RGB", (336, 336), "#c9d6df")
    draw = ImageDraw.Draw(image)
    draw.rectangle((30, 200, 150, 310), fill="#b03a2e")
    draw.ellipse((180, 40, 300, 160), fill="#1f618d")
    draw.text((60, 60), "bread", fill="black", font_size=40)
    held = io.BytesIO()
    image.save(held, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(held.getvalue()).decode()


def timing(chance: random.Random, median: float) -> dict[str, float]:
    median *= chance.uniform(0.97, 1.03)
    return {"median": median, "low": median * chance.uniform(0.94, 0.99), "high": median * chance.uniform(1.01, 1.09)}


def make_plan(name: str, method: str, keep: int, right: int | None, parameters: dict[str, Any], nearest_to: int | None = None) -> dict[str, Any]:
    """One plan as `edgecomp profile` writes it, with times that follow from its budget."""
    chance = random.Random(name)
    summary, paper, kind = SUMMARIES[method]
    prefill = 14 + 0.82 * keep
    rows = keep + 26
    split = None if right is None else {task: round(100 * right / QUESTIONS + chance.uniform(-9, 9), 1) for task in TASKS}
    return {
        "name": name, "method": method, "keep": keep, "nearest_to": nearest_to, "parameters": parameters,
        "site": "projector" if method != "none" else "", "position": "keep",
        "summary": summary, "paper": paper, "kind": kind, "needs_prompt": False, "parametric": False,
        "counts": {"enter": keep, "after_cut": keep, "mean_over_layers": float(keep)},
        "memory": {"kind": "counted", "weights_bytes": 65_200_000, "cache_bytes": 20_971_520, "cache_used_bytes": rows * 10_240},
        "peak": {"kind": "measured", "peak_bytes": 246_000_000 + 60_000 * keep + chance.randrange(3_000_000), "meter": "VmHWM"},
        "latency": {"kind": "measured", "load_ms": 431.0 + chance.uniform(-20, 20), "preprocess_ms": timing(chance, 6.3),
                    "vision_ms": timing(chance, 148), "prefill_ms": timing(chance, prefill), "first_token_ms": timing(chance, 156 + prefill),
                    "per_token_ms": timing(chance, 5.1 + keep / 400), "repeats": 7, "prompt_rows": rows},
        "accuracy": None if right is None else {"kind": "measured", "all": 100 * right / QUESTIONS, "by_task": split, "questions": QUESTIONS,
                                                "scenes": 16},
    }


def sample() -> dict[str, Any]:
    """A result with four methods, three seeds of random, and a pool that stands in for a budget it cannot make."""
    plans = [make_plan("full", "none", TOKENS, 83, {})]
    for budget, rates in RIGHT.items():
        plans.append(make_plan(f"dart-{budget}", "dart", budget, rates["dart"], {"pivots": 8}))
        plans.append(make_plan(f"cls-{budget}", "cls", budget, rates["cls"], {}))
        plans += [make_plan(f"random-{budget}" + (f"-seed{seed}" if seed else ""), "random", budget, right, {"seed": seed})
                  for seed, right in enumerate(rates["random"])]
        made = 126 if budget == 127 else budget
        plans.append(make_plan(f"pool-{made}", "pool", made, rates["pool"], {}, 127 if made == 126 else None))
    return {
        "edgecomp": "0.1.0", "created": "2026-11-22", "command": "edgecomp profile scenes --data examples/scenes/questions.jsonl -o report.html",
        "machine": {"cpu": "AMD EPYC 7B13", "cores": 2, "memory_bytes": 8_330_000_000, "system": "Linux-6.1.0-amd64-x86_64", "python": "3.11.7",
                    "backend": "onnxruntime 1.31.1, CPUExecutionProvider", "threads": 2},
        "bundles": [{"name": "scenes", "source": "examples/scenes-llava", "family": "llava", "precision": "fp32", "weights": "fp32", "bits": "fp32",
                     "context": 2048, "tokens": TOKENS, "grid": GRID, "vision_layers": 9, "decoder_layers": 8, "hidden": 320,
                     "weights_bytes": 65_200_000}],
        "plans": plans,
        "example": {"image": picture(), "question": "what word is written?", "answer": "bread",
                    "plans": {plan["name"]: shown(plan) for plan in plans if plan["keep"] in (64, 126, TOKENS)}},
    }


# bits -> (answers fewer than in fp32, prefill and a token take these times as long, bytes of the weights, MiB less at the peak)
BITS = {"fp32": (0, 1.0, 1.0, 65_200_000, 0), "int8": (0, 0.93, 0.61, 27_500_000, 31), "int4": (1, 0.4, 0.44, 19_900_000, 25)}


def with_bits() -> dict[str, Any]:
    """The sample, measured in three precisions: of the plans of each, answers, times and memory follow from those in fp32."""
    result = sample()
    rows = []
    for bits, (fewer, prefill, token, weights, less) in BITS.items():
        for plan in copy.deepcopy(result["plans"]):
            plan |= {"name": f"{plan['name']} in {bits}", "bits": bits}
            plan["accuracy"]["all"] -= 100 * fewer / QUESTIONS
            saved = plan["latency"]["prefill_ms"]["median"] * (1 - prefill)
            for phase, at, by in (("prefill_ms", 0, prefill), ("per_token_ms", 0, token), ("first_token_ms", saved, 1)):
                plan["latency"][phase] = {end: (value - at) * by for end, value in plan["latency"][phase].items()}
            plan["memory"]["weights_bytes"] = weights
            plan["peak"]["peak_bytes"] -= less * 2**20
            rows.append(plan)
    bundles = [{**result["bundles"][0], "name": f"scenes-{bits}", "weights": bits, "bits": bits, "weights_bytes": of[3]} for bits, of in BITS.items()]
    example = {**result["example"], "plans": {f"{name} in fp32": plan for name, plan in result["example"]["plans"].items()}}
    return {**result, "bundles": bundles, "plans": rows, "example": example}


def shown(plan: dict[str, Any]) -> dict[str, Any]:
    """What a plan keeps of the example: the centres of its cells, or tokens by chance."""
    if plan["method"] == "pool":
        high, wide = {64: (8, 8), 126: (9, 14)}[plan["keep"]]
        kept = [(2 * y + 1) * 24 // (2 * high) * 24 + (2 * x + 1) * 24 // (2 * wide) for y in range(high) for x in range(wide)]
    else:
        kept = sorted(random.Random(plan["name"]).sample(range(TOKENS), plan["keep"]))
    return {"kept": kept, "said": "Bread." if plan["method"] in ("cls", "none") else "bank", "pooled": plan["method"] == "pool"}


# id -> (name, slower than the first by, peak operations a second, bytes a second, bytes beside its system)
DEVICES = {"here": ("AMD EPYC, 2 cores", 1.0, 170e9, 21e9, 7.1e9), "jetson-orin-nano-8gb": ("Jetson Orin Nano 8GB", 1 / 9, 10.24e12, 68.2e9, 6.9e9),
           "rtx-4090": ("GeForce RTX 4090", 1 / 150, 165e12, 1008e9, 25e9), "jetson-nano": ("Jetson Nano", 0.6, 0.47e12, 25.6e9, 172e6)}


def estimate(value: float, wide: float = 1.6) -> dict[str, Any]:
    return {"value": value, "low": value / wide, "high": value * wide, "constants": "pooled: of others", "kind": "predicted"}


def prediction(plan: dict[str, Any], device: str) -> dict[str, Any]:
    """One plan on one device, as `edgecomp profile --device` writes it."""
    _, slower, _, _, usable = DEVICES[device]
    keep = plan["keep"]
    vision, prefill, each = 131.7 * slower, (17.3 + 0.77 * keep) * slower, (5.3 + keep / 417) * slower
    memory = 163e6 + 61_000 * keep
    verdict = "fits" if 1.02 * memory <= usable else "tight" if memory / 1.02 <= usable else "does not fit"
    way = f"runtime {(memory - 71e6) / 2**30:.3f} of {memory / 2**30:.3f} GiB: a device with more memory"
    return {"kind": "predicted", "vision_ms": estimate(vision), "prefill_ms": estimate(prefill), "ttft_ms": estimate(vision + prefill),
            "tpot_ms": estimate(each), "decode_tokens_per_s": estimate(1000 / each), "memory_bytes": estimate(memory, 1.02),
            "memory_parts": {"weights": 62e6, "cache": 9e6, "runtime": memory - 71e6}, "verdict": verdict,
            "way_out": "" if verdict == "fits" else way,
            "work": {"vision": {"flops": 10.4e9, "bytes": 107.6e6}, "prefill": {"flops": 20.1e6 * (keep + 26), "bytes": 41e6 + 143e3 * keep},
                     "decode": {"flops": 23.7e6, "bytes": 36.9e6 + 1_300 * keep}}}


def with_devices(result: dict[str, Any] | None = None) -> dict[str, Any]:
    """A result, or the sample, predicted on four devices, one of which refuses a plan, and compared on the machine at hand."""
    result = result or sample()
    devices = []
    for id, (name, _, peak, bandwidth, usable) in DEVICES.items():
        devices.append({"id": id, "name": name, "here": id == "here", "engine": "onnxruntime" if id == "here" else "TensorRT", "weights": "fp32",
                        "sources": [f"https://example.org/{id}", "peak: cores x clock"], "uncertain": ["memory.usable_gib"], "usable_bytes": usable,
                        "peak_flops_per_s": peak, "peak_precision": "fp32", "bandwidth_bytes_per_s": bandwidth, "calibrated": None,
                        "plans": {plan["name"]: prediction(plan, id) for plan in result["plans"]}})
    pool = next(plan["name"] for plan in result["plans"] if plan["name"].startswith("pool-64"))
    devices[2]["plans"][pool] = {"refused": "no constants for pooling in fp32"}
    compared = []
    for plan in result["plans"]:
        guess = devices[0]["plans"][plan["name"]]
        for phase, name, measured in (("vision_ms", "vision_ms", plan["latency"]["vision_ms"]["median"]),
                                      ("prefill_ms", "prefill_ms", plan["latency"]["prefill_ms"]["median"]),
                                      ("per_token_ms", "tpot_ms", plan["latency"]["per_token_ms"]["median"]),
                                      ("peak_bytes", "memory_bytes", plan["peak"]["peak_bytes"])):
            compared.append({"plan": plan["name"], "phase": phase, "predicted": {end: guess[name][end] for end in ("value", "low", "high")},
                             "measured": measured})
    result["machine"]["gauges"] = [{"name": "coretemp, package", "unit": "°C", "before": 41.3, "after": 67.9, "kind": "measured"},
                                   {"name": "intel-rapl, mean power between", "unit": "W", "before": None, "after": 28.4, "kind": "measured"}]
    return {**result, "devices": devices, "compared": compared}
