"""What the benchmarks share: the demonstration model compiled once, tables, and where results go."""
from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "examples" / "scenes-llava"
QUESTIONS = ROOT / "examples" / "scenes" / "questions.jsonl"
WORK = ROOT / "build" / "benchmarks"
RESULTS = Path(__file__).parent / "results"
METHODS = ("random", "stride", "pool", "cls", "dart")
BUDGETS = (192, 128, 64)


def demo_bundle() -> Path:
    """The demonstration model with every method at every budget, and at 576; compiled if it is not there."""
    from edgecomp import methods
    from edgecomp.compile import compile_model
    from edgecomp.compress import Recipe
    out = WORK / "scenes"
    if not out.exists():
        compile_model(str(CHECKPOINT), out, [Recipe.of(methods.make(m), str(k)) for m in METHODS for k in (*BUDGETS, 576)], say=print)
    return out


def random_llava(name: str, tower: dict[str, int], decoder: dict[str, int], side: int, plans: dict[str, str]) -> Path:
    """A LLaVA with random weights, the demonstration model's tokenizer and pictures of `side` pixels, compiled with a plan for each method: budget.

    tower, decoder: fields of CLIPVisionConfig and LlamaConfig.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from edgecomp import methods
    from edgecomp.compile import compile_model
    from edgecomp.compress import Recipe
    out, folder = WORK / name, WORK / f"{name}-checkpoint"
    if out.exists():
        return out
    vision = CLIPVisionConfig(**tower, image_size=side, patch_size=14)
    LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=LlamaConfig(**decoder), image_token_index=3)).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(CHECKPOINT / file, folder)
    settings = json.loads((CHECKPOINT / "processor_config.json").read_text(encoding="utf-8"))
    settings["image_processor"] |= {"size": {"shortest_edge": side}, "crop_size": side}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    compile_model(str(folder), out, [Recipe.of(methods.make(method), keep) for method, keep in plans.items()], say=print)
    shutil.rmtree(folder)
    return out


def quantized_bundle(name: str) -> None:
    """Makes the bundle of a name such as `scenes-int4` of `scenes`, where that one is there and this one is not."""
    from edgecomp.quantize.apply import quantize
    source, _, bits = name.rpartition("-")
    if bits in ("int8", "int4") and (WORK / source).exists() and not (WORK / name).exists():
        quantize(WORK / source, WORK / name, bits, say=print)


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def write(name: str, title: str, command: str, *parts: str) -> None:
    """Writes a result with the command and the machine that gave it, and prints it."""
    from edgecomp.doctor import machine
    here = machine()
    where = f"`{command}` on {here['cpu']}, {here['cores']} cores, Python {platform.python_version()}. All figures are measured.\n"
    text = "\n".join([f"# {title}\n", where, *parts])
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(text, encoding="utf-8")
    print(text)
