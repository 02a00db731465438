"""What the benchmarks share: the demonstration model compiled once, tables, and where results go."""
from __future__ import annotations

import os
import platform
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
