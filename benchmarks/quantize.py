"""What fewer bits cost and save, by budget and method: accuracy, the decoder's bytes, prefill, time a token and peak memory, on the CPU.

    python benchmarks/quantize.py           (about 40 minutes on 2 cores)

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
from edgecomp.pack.orders import weights_of
from edgecomp.profiling import profile
from edgecomp.report.contents import Contents
from edgecomp.report.page import render
from edgecomp.report.text import table
from edgecomp_runtime import Bundle

METHODS, BUDGETS = ("divprune", "dart"), ("192", "64")  # beside random and pool, which `profile` adds
PRECISIONS = {"fp32": ("fp32", None), "fp16": ("fp16", None), "int8": ("fp32", "int8"), "int4": ("fp32", "int4")}
IMAGE, PROMPT = str(ROOT / "examples/scenes/images/scene-03.jpg"), "describe the image."
RECIPES = [Recipe.of(methods.make(method), keep, "projector") for method in METHODS for keep in BUDGETS]
MODELS: dict[str, tuple[Path | None, list[Recipe], Path | None]] = {"demo": (CHECKPOINT, RECIPES, QUESTIONS), "smol": (None, [], None)}


def bundle_of(model: str, precision: str) -> Path:
    """A model's bundle in a precision, compiled if it is not there."""
    out, (source, recipes, _), (floats, weights) = WORK / f"quantize-{model}-{precision}", MODELS[model], PRECISIONS[precision]
    if not out.exists():
        compile_model(str(source or checkpoint("llava")), out, recipes, precision=floats, weights=weights, say=print)
    return out


def decoder_bytes(bundle: Bundle) -> int:
    """Bytes of the decoder's weights as they are stored, each once; the embeddings are a table beside them."""
    return weights_of(bundle, bundle.manifest.plans["full"].variants["neutral"]["prefill"])[1]


def profiled(model: str, images: int | None = None) -> dict[str, Any]:
    """What `edgecomp profile` finds of a model's bundles side by side, on questions about so many pictures; its page is beside the bundles."""
    bundles, data = [bundle_of(model, precision) for precision in PRECISIONS], MODELS[model][2]
    result = profile(bundles, [], image=IMAGE, prompt=PROMPT, data=data, reading={}, images=images if data else None, repeats=7, threads=None,
                     devices=[], save=None, command=f"edgecomp profile {' '.join(bundle.name for bundle in bundles)}", say=print)
    (WORK / f"quantize-{model}.html").write_text(render(result), encoding="utf-8")
    return result


def sizes(model: str) -> str:
    """The decoder's bytes in each precision."""
    found = {precision: decoder_bytes(Bundle.open(bundle_of(model, precision))) for precision in PRECISIONS}
    return markdown(["weights", "decoder MiB", "of fp16's"], [[precision, f"{size / 2**20:.1f}", f"{size / found['fp16']:.3f}"]
                                                              for precision, size in found.items()])


def main(images: int | None = None) -> None:
    parts = []
    for model, title in {"demo": "The demonstration model", "smol": "SmolVLM-256M's size, random weights"}.items():
        found = Contents.of(profiled(model, images))
        parts += [f"## {title}\n", *([found.verdict_text + "\n"] * bool(MODELS[model][2])), table(found.tables["joint"]) + "\n", sizes(model)]
    write("quantize.md", "Fewer bits with fewer tokens", "python benchmarks/quantize.py",
          "A plan is a method and the visual tokens that go on; `full` is without one. Answers are greedy.\n",
          "Weight-only: compressing before quantizing and behind it give the same graphs and weights (`tests/compiler/test_quantize.py`).\n", *parts,
          "The decoder's bytes are of its weights, layers and head, as they are stored; in int4 the head is in int8. onnxruntime computes fp16 in "
          "fp32 on this CPU.\n")


if __name__ == "__main__":
    main()
