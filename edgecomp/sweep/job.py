"""A sweep's folder: the job, and a file for each cell, which is a plan with what was measured of it and with what."""
from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgecomp.doctor import machine
from edgecomp.evaluate import MOST_TOKENS, Question, read_questions
from edgecomp_runtime.bundle import Bundle, sha256_of
from edgecomp_runtime.errors import EdgecompError, InputError
from edgecomp_runtime.typed import build

FILE = "sweep.job.json"
ANSWERS, LATENCY = "answers", "latency"  # the parts of a cell, measured apart
NEW_TOKENS = 32  # of the answer that decoding is timed on


@dataclass(frozen=True)
class Skipped:
    """A combination that cannot be made, and why."""
    combination: str
    reason: str


@dataclass(frozen=True)
class Cell:
    """A plan of the bundle, with what the compiler knows of it.

    site: of its last stage (the first cut of it); sites: of all its cuts. keep: tokens behind the last cut. stands_for: budgets that
    its method cannot make and for which this one, the nearest that it can, stands in. seed: None where the method has none.
    timing: the plan that keeps the same numbers of tokens at the same sites as constants.
    """
    plan: str
    method: str
    parameters: dict[str, int | float | str]
    seed: int | None
    site: str
    sites: tuple[str, ...]
    position: str
    windows: str
    keep: int
    stands_for: tuple[int, ...]
    summary: str
    paper: str
    kind: str
    parametric: bool
    timing: str | None

    @property
    def budgets(self) -> tuple[int, ...]:
        """The budgets at which it is compared."""
        return self.stands_for or (self.keep,)


@dataclass(frozen=True)
class Job:
    """What to measure: cells of FOLDER/bundle on questions. repeats: of each timing; 0 times nothing."""
    edgecomp: str
    command: str
    source: str
    data: str
    layout: str | None
    image_folder: str | None
    suffix: str | None
    images: int | None
    limit: int | None
    repeats: int
    cells: tuple[Cell, ...]
    skipped: tuple[Skipped, ...] = field(default=())

    def save(self, folder: Path) -> None:
        write(folder / FILE, dataclasses.asdict(self))

    @staticmethod
    def load(folder: Path) -> Job:
        """Raises InputError where the folder has no job that can be read."""
        try:
            found: Job = build(Job, json.loads((folder / FILE).read_text(encoding="utf-8")), FILE)
        except (OSError, ValueError, EdgecompError) as error:
            raise InputError(f"{folder} is no sweep ({error}): start one with `edgecomp sweep MODEL -o {folder}`") from None
        return found

    def questions(self) -> list[Question]:
        """Those that are asked: of the first so many, those about the first so many pictures."""
        found = read_questions(Path(self.data), self.layout, Path(self.image_folder) if self.image_folder else None, self.suffix)[:self.limit]
        pictures = set(list(dict.fromkeys(q.image for q in found))[:self.images])
        return [q for q in found if q.image in pictures]


@dataclass
class Outcome:
    """What came of a run: cells by plan that are whole now, and for those that could not be measured why not."""
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def about_here() -> dict[str, Any]:
    """The machine and the backend, as reports name them."""
    import onnxruntime
    return {**machine(), "backend": f"onnxruntime {onnxruntime.__version__}, CPUExecutionProvider"}


def write(path: Path, data: object) -> None:
    """JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(data, indent=1), encoding="utf-8")
    partial.replace(path)


def cell_file(folder: Path, plan: str) -> Path:
    return folder / "cells" / f"{plan}.json"


def read_cell(folder: Path, plan: str) -> dict[str, Any]:
    """What was measured of a plan, by part; nothing where there is no file, or one that was damaged."""
    try:
        found = json.loads(cell_file(folder, plan).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_part(folder: Path, plan: str, part: str, found: dict[str, Any], measured_with: dict[str, Any]) -> None:
    """Adds a part to a cell's file."""
    write(cell_file(folder, plan), {**read_cell(folder, plan), "plan": plan, part: {**found, "measured_with": measured_with}})


def fresh(cell: dict[str, Any], part: str, measured_with: dict[str, Any]) -> bool:
    """Whether a part was measured, and with all of this."""
    found = cell.get(part)
    return isinstance(found, dict) and found.get("measured_with") == measured_with


def with_answers(bundle: Bundle, plan: str, data: str) -> dict[str, Any]:
    """What decides about a plan's answers: the model and the questions, by hash."""
    return {"model": model_hash(bundle, plan), "data": data, "most_tokens": MOST_TOKENS}


def with_latency(bundle: Bundle, plan: str, question: Question, repeats: int, threads: int | None, machine: dict[str, Any]) -> dict[str, Any]:
    """What decides about a plan's times."""
    return {"model": model_hash(bundle, plan), "picture": sha256_of(question.image), "prompt": question.question, "new_tokens": NEW_TOKENS,
            "repeats": repeats, "threads": threads, **{key: machine[key] for key in ("cpu", "cores", "backend")}}


def model_hash(bundle: Bundle, plan: str) -> str:
    """One hash over what a plan computes with: its graphs, all weights, the text files, and how pictures are made to fit."""
    manifest = bundle.manifest
    graphs = {f for name, files in manifest.plans[plan].variants.items() if name != "neutral" for f in files.values()}
    other = {f for f in manifest.files if f.endswith(".bin")} | {manifest.text.tokenizer, manifest.text.chat_template, manifest.embeddings.file}
    parts = [manifest.files[f].sha256 for f in sorted(graphs) + sorted(f for f in other if f)]
    return hashlib.sha256(json.dumps([parts, dataclasses.asdict(manifest.image), manifest.vision.texts]).encode()).hexdigest()[:16]


def data_hash(questions: Sequence[Question]) -> str:
    """One hash over questions, right answers, and the pictures' bytes. Raises InputError where a picture cannot be read."""
    pictures: dict[Path, str] = {}
    for question in questions:
        if question.image not in pictures:
            try:
                pictures[question.image] = sha256_of(question.image)
            except OSError as error:
                raise InputError(f"{question.image} cannot be read ({error.strerror}); the questions name it relative to their own file, "
                                 "or to --image-folder") from None
    rows = [[pictures[q.image], q.question, q.answers, q.tasks, q.metric.title] for q in questions]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
