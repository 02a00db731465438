"""The vision tower in int8: how far its visual tokens move by how ranges are taken and from which pictures, what answers cost, and the time.

Besides, both orders of cutting inside the tower and calibrating it. Calibrated on scenes of the demonstration model's generator that neither its
training nor its evaluation has. Needs matplotlib, for its fonts.
"""
from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
from common import CHECKPOINT, QUESTIONS, WORK, markdown, write
from numpy.typing import NDArray

from edgecomp import methods
from edgecomp.compile import compile_model
from edgecomp.compress import Recipe, compress
from edgecomp.dialects.onnxruntime import lower
from edgecomp.evaluate import accuracy, evaluate, read_questions
from edgecomp.ir.graphs import load, read
from edgecomp.quantize import apply
from edgecomp.quantize.activations import quantize_products
from edgecomp.quantize.apply import quantize
from edgecomp.quantize.blocks import quantized
from edgecomp.quantize.calibrate import best_range, calibrated, largest, session_of, size, sizes
from edgecomp.quantize.rule import weights_of
from edgecomp.quantize.subset import CHOICES, Calibration, cover
from edgecomp_runtime import Bundle, Session, images

FIRST_SEED, SCENES = 5000, 256  # evaluation has seeds 0 to 63, training those from 10,000,000 on
SEEDS = (0, 1, 2, 3, 4)
COUNTS = (1, 4)
PICTURES = sorted((QUESTIONS.parent / "images").iterdir())[::2]
ASKED = 128  # questions a bundle and plan
RUNS, IMAGES = 15, 16
INSIDE = [Recipe.of(methods.make(method), keep, "encoder:4") for method in ("divprune", "tome") for keep in ("192", "64")]
Tokens = list[NDArray[Any]]


def scenes() -> Path:
    """A folder of scenes to calibrate on."""
    sys.path.insert(0, str(QUESTIONS.parent))
    from scenes import draw_scene
    folder = WORK / "calibration-scenes"
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(FIRST_SEED, FIRST_SEED + SCENES):
        path = folder / f"scene-{seed}.jpg"
        if not path.exists():
            draw_scene(seed)[0].save(path, quality=95)
    return folder


def compiled() -> Path:
    """The demonstration model with plans cut behind the tower, and one cut inside it."""
    out = WORK / "calibration"
    if not out.exists():
        recipes = [Recipe.of(methods.make("cls"), "64"), Recipe.of(methods.make("dart"), "64"), Recipe.of(methods.make("dart"), "64", "encoder:4")]
        compile_model(str(CHECKPOINT), out, recipes, say=print)
    return out


def tokens(graph: Path, pixels: Sequence[NDArray[Any]], ranges: Mapping[str, float] | None = None) -> Tokens:
    """The visual tokens of each picture, of a neutral graph as it is or with its products in int8."""
    model = load(graph)
    if ranges:
        quantize_products(model, [weight.name for weight in weights_of(model, "vision")], ranges, in_rows)
    lower(model)
    session = session_of(model, graph.parent)
    return [session.run(["visual_tokens"], {"pixels": picture})[0] for picture in pixels]


def in_rows(name: str, tensor: ir.TensorProtocol) -> tuple[ir.Tensor[Any], ir.Tensor[Any]]:
    """A weight's numbers and scales, as `edgecomp quantize` stores them."""
    weight = read(tensor)
    numbers, scales = quantized(weight, 8, weight.shape[1], name)
    return ir.Tensor(numbers, name=name), ir.Tensor(scales[:, 0].astype(weight.dtype), name=f"{name}.scale")


def moved(exact: Tokens, found: Tokens) -> float:
    """How far visual tokens are from the exact ones, in percent of their length: the mean over the pictures."""
    return 100 * mean(float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in zip(exact, found))


def percentile(counts: NDArray[np.int64], percent: float) -> float:
    """The size that so many percent of the numbers do not exceed."""
    seen = np.flatnonzero(counts)
    at = np.searchsorted(np.cumsum(counts[seen]), percent / 100 * counts.sum())
    return float(size(seen)[min(int(at), len(seen) - 1)])


RULES: dict[str, Callable[[NDArray[np.int64]], float]] = {
    "the largest": lambda counts: percentile(counts, 100),
    **{f"percentile {p}": lambda counts, p=p: percentile(counts, p) for p in (99.999, 99.99, 99.9, 99.0)},  # type: ignore[misc]
    "least squared error": best_range,
}


def by_rule(graph: Path, bundle: Bundle, folder: Path, pixels: Sequence[NDArray[Any]], exact: Tokens) -> str:
    found = sizes(graph, Calibration(folder, IMAGES).candidates(), bundle.manifest.image)
    rows = []
    for name, rule in RULES.items():
        rows.append((name, f"{moved(exact, tokens(graph, pixels, {at: rule(counts) for at, counts in found.items()})):.2f}"))
        print(*rows[-1], flush=True)
    return markdown(["range", "visual tokens move by %"], rows)


def by_choice(graph: Path, bundle: Bundle, folder: Path, pixels: Sequence[NDArray[Any]], exact: Tokens) -> str:
    rows, info = [], bundle.manifest.image
    everything = Calibration(folder, SCENES).candidates()
    seen = largest(graph, everything, info)
    for count in COUNTS:
        for choice in CHOICES:
            errors, shares = [], []
            for seed in SEEDS:
                chosen = [everything.index(path) for path in Calibration(folder, count, choice, seed).candidates()]
                whole = len(chosen) == SCENES
                if choice == "cover":
                    chosen = [chosen[n] for n in cover({name: of[chosen] for name, of in seen.items()}, count)]
                shares.append(mean(float(of[chosen].max() / of.max()) for of in seen.values()))
                found = sizes(graph, [everything[n] for n in chosen], info)
                errors.append(moved(exact, tokens(graph, pixels, {name: best_range(counts) for name, counts in found.items()})))
                if whole:
                    break  # the seed draws nothing
            rows.append((count, choice, len(errors), f"{mean(errors):.2f}", f"{min(errors):.2f} to {max(errors):.2f}", f"{100 * mean(shares):.1f}"))
            print(*rows[-1], flush=True)
    return markdown(["pictures", "choice", "seeds", "visual tokens move by %", "from, to", "largest numbers reached, % of the folder's"], rows)


def orders(source: Path, folder: Path, made: Path) -> dict[str, Path]:
    """Bundles with plans cut inside the tower: in fp32, cut and then calibrated, each plan's own graph, and calibrated on the whole tower, then cut.

    The last is what `compress` refuses; a cut graph with the whole tower's ranges is what it would give, for a cut leaves the products their names.
    """
    bundles = {name: made / name.replace(" ", "-") for name in ("fp32", "cut, then calibrated", "calibrated, then cut")}
    uncut, own, whole = bundles.values()
    compress(source, uncut, INSIDE, say=print)
    calibration, bundle = Calibration(folder, IMAGES), Bundle.open(uncut)
    quantize(uncut, own, None, calibration=calibration, say=print)
    ranges, pictures = calibrated(bundle, calibration, print)
    of_all = ranges[bundle.manifest.plans["full"].variants["neutral"]["vision"]]
    with mock.patch.object(apply, "calibrated", lambda *given: (dict.fromkeys(ranges, of_all), pictures)):
        quantize(uncut, whole, None, calibration=calibration, say=print)
    return bundles


def answers(bundles: Mapping[str, Path], plans: Sequence[str]) -> str:
    questions = read_questions(QUESTIONS)[:ASKED]
    rows = []
    for plan in plans:
        found = [f"{accuracy(evaluate(Session(Bundle.open(path), plan=plan), questions)):.1f}" for path in bundles.values()]
        rows.append((plan, *found))
        print(*rows[-1], flush=True)
    return markdown(["plan, % right", *bundles], rows)


def times(bundles: Mapping[str, Path]) -> str:
    """Vision graphs in turn, so that what else the machine does meets all alike."""
    rows = []
    for plan in Bundle.open(bundles["fp32"]).manifest.plans:
        opened = [Bundle.open(path) for path in bundles.values()]
        graphs = [bundle.file(bundle.manifest.plans[plan].variants["onnxruntime"]["vision"]) for bundle in opened]
        sessions = [session_of(load(graph), graph.parent) for graph in graphs]
        pixels = images.preprocess(images.load(PICTURES[0]), opened[0].manifest.image)[None]
        taken: list[list[float]] = [[] for _ in sessions]
        for _ in range(RUNS):
            for session, of in zip(sessions, taken):
                began = time.perf_counter()
                session.run(["visual_tokens"], {"pixels": pixels})
                of.append((time.perf_counter() - began) * 1e3)
        ratio = median(a / b for a, b in zip(*taken))
        rows.append((plan, *(f"{median(of):.0f} ({min(of):.0f})" for of in taken), f"{ratio:.2f}"))
        print(*rows[-1], flush=True)
    return markdown(["plan, vision ms: median (least)", *bundles, "times faster"], rows)


if __name__ == "__main__":
    source, folder = compiled(), scenes()
    with tempfile.TemporaryDirectory(dir=WORK) as made:
        bundles = {"fp32": source, "int8": Path(made) / "int8"}
        quantize(source, bundles["int8"], None, calibration=Calibration(folder, IMAGES), say=print)
        plans = list(Bundle.open(source).manifest.plans)
        staged = orders(source, folder, Path(made))
        inside = [plan for plan in Bundle.open(staged["fp32"]).manifest.plans if plan not in plans]
        parts = [f"Time of the vision graph, {RUNS} runs in turn:\n", times(bundles),
                 f"{ASKED} questions, each plan's own graph calibrated on {IMAGES} pictures drawn at random:\n", answers(bundles, plans),
                 "The same questions and pictures, plans that cut inside the tower, in both orders:\n", answers(staged, inside)]
    bundle = Bundle.open(source)
    graph = bundle.file(bundle.manifest.plans["full"].variants["neutral"]["vision"])
    pixels = [images.preprocess(images.load(path), bundle.manifest.image)[None] for path in PICTURES]
    exact = tokens(graph, pixels)
    parts += [f"Visual tokens of the plan `full` on {len(PICTURES)} pictures of the evaluation set against fp32's, {IMAGES} drawn to calibrate on:\n",
              by_rule(graph, bundle, folder, pixels, exact),
              f"With ranges of the least squared error, from pictures chosen of {SCENES}:\n", by_choice(graph, bundle, folder, pixels, exact)]
    write("calibration.md", "The vision tower in int8", "python benchmarks/calibration.py", *parts)
