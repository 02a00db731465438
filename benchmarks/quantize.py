"""What fewer bits cost and save, by budget and method: accuracy, the decoder's bytes, prefill, time a token and peak memory, on the CPU.

    python benchmarks/quantize.py           (about 20 minutes on 2 cores)

The demonstration model on all of its questions, and a model of SmolVLM-256M's size with random weights, of which only sizes and times mean
something. int8 and int4 are of the fp32 bundle. Every plan is measured in a process of its own.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

from choosing import checkpoint
from common import CHECKPOINT, QUESTIONS, ROOT, WORK, markdown, write

from edgecomp import methods
from edgecomp.compile import compile_model
from edgecomp.compress import Recipe
from edgecomp.measure import Spec, measure
from edgecomp.pack.orders import weights_of
from edgecomp_runtime import Bundle

METHODS, BUDGETS = ("divprune", "dart", "pool"), ("192", "64")
PRECISIONS = {"fp32": ("fp32", None), "fp16": ("fp16", None), "int8": ("fp32", "int8"), "int4": ("fp32", "int4")}
IMAGE, PROMPT = str(ROOT / "examples/scenes/images/scene-03.jpg"), "describe the image."
RECIPES = [Recipe.of(methods.make(method), keep, "projector") for method in METHODS for keep in BUDGETS]
MODELS: dict[str, tuple[Path | None, list[Recipe], str | None]] = {"demo": (CHECKPOINT, RECIPES, str(QUESTIONS)), "smol": (None, [], None)}


def bundle_of(model: str, precision: str) -> Path:
    """A model's bundle in a precision, compiled if it is not there."""
    out, (source, recipes, _), (floats, weights) = WORK / f"quantize-{model}-{precision}", MODELS[model], PRECISIONS[precision]
    if not out.exists():
        compile_model(str(source or checkpoint("llava")), out, recipes, precision=floats, weights=weights, say=print)
    return out


def decoder_bytes(bundle: Bundle) -> int:
    """Bytes of the decoder's weights as they are stored, each once; the embeddings are a table beside them."""
    return weights_of(bundle, bundle.manifest.plans["full"].variants["neutral"]["prefill"])[1]


def measured(model: str) -> dict[str, dict[str, dict[str, Any]]]:
    """What `edgecomp.measure` says of every precision and plan."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for precision in PRECISIONS:
        bundle = Bundle.open(bundle_of(model, precision))
        found[precision] = {}
        for plan in bundle.manifest.plans:
            result = measure(Spec(str(bundle.path), plan, IMAGE, PROMPT, data=MODELS[model][2]))
            found[precision][plan] = result
            print(model, precision, plan, result["accuracy"] and result["accuracy"]["all"], result["latency"]["prefill_ms"]["median"], flush=True)
    return found


def costs(model: str, found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Sizes and times of the plans 'full' and, where there are some, of the first method's."""
    sizes = {precision: decoder_bytes(Bundle.open(bundle_of(model, precision))) for precision in PRECISIONS}
    plans = [plan for plan in found["fp32"] if plan == "full" or plan.startswith(METHODS[0])]
    head = ["weights", "decoder MiB", "of fp16's", "load ms", *(f"prefill ms, {plan}" for plan in plans), "ms a token, full", "peak MiB, full"]
    rows: list[list[object]] = []
    for precision, by_plan in found.items():
        latency = by_plan["full"]["latency"]
        rows.append([precision, f"{sizes[precision] / 2**20:.1f}", f"{sizes[precision] / sizes['fp16']:.3f}", f"{latency['load_ms']:.0f}",
                     *(f"{by_plan[plan]['latency']['prefill_ms']['median']:.1f}" for plan in plans), f"{latency['per_token_ms']['median']:.2f}",
                     f"{by_plan['full']['peak_bytes'] / 2**20:.0f}"])
    return markdown(head, rows)


def accuracies(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Accuracy of each plan in each precision."""
    return markdown(["plan", *found], [[plan, *(f"{by_plan[plan]['accuracy']['all']:.1f}" for by_plan in found.values())] for plan in found["fp32"]])


if __name__ == "__main__":
    demo, smol = measured("demo"), measured("smol")
    questions = demo["fp32"]["full"]["accuracy"]["questions"]
    write("quantize.md", "Fewer bits with fewer tokens", "python benchmarks/quantize.py",
          f"Percent of {questions} questions right, the demonstration model, greedy; a plan is a method and the visual tokens of 576 that go on.\n",
          accuracies(demo),
          "Weight-only: compressing before quantizing and behind it give the same graphs and weights (`tests/compiler/test_quantize.py`).\n",
          "## The demonstration model\n", costs("demo", demo), "## SmolVLM-256M's size, random weights\n", costs("smol", smol),
          "The decoder's bytes are of its weights, layers and head, as they are stored; in int4 the head is in int8. onnxruntime computes fp16 in "
          "fp32 on this CPU.\n")
