"""Questions in the layouts in which benchmarks are published: one module each, and the one table of them."""
from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgecomp.datasets import docvqa, gqa, jsonl, pope, textvqa
from edgecomp.datasets.base import Layout, Question
from edgecomp_runtime.errors import InputError, UnknownNameError

LAYOUTS: dict[str, Layout] = {module.LAYOUT.name: module.LAYOUT for module in (jsonl, pope, textvqa, docvqa, gqa)}


def read_questions(path: Path, layout: str | None = None, image_folder: Path | None = None, suffix: str | None = None) -> list[Question]:
    """Reads a file of questions.

    Args:
        path: a JSONL, {data: [record, ...]} or {id: record, ...}.
        layout: a name of LAYOUTS; by default the one whose keys the first record has.
        image_folder: what the records' pictures are relative to; by default the folder of the file.
        suffix: put behind each question, on a line of its own; by default the layout's. Empty is none.

    Raises:
        UnknownNameError: there is no such layout.
        InputError: the file or the folder cannot be read, or a record is none of the layout; it is named.
    """
    if layout is not None and layout not in LAYOUTS:
        raise UnknownNameError("layout", layout, LAYOUTS)
    if image_folder is not None and not image_folder.is_dir():
        raise InputError(f"{image_folder} is not a folder: give the one that the questions' pictures are in")
    records = _records(path)
    if not records:
        raise InputError(f"{path} has no questions")
    kind = LAYOUTS[layout] if layout is not None else _layout(path, *records[0])
    found = []
    for where, record in records:
        try:
            question = kind.question(_row(record), path)
            asked = "\n".join(filter(None, (question.question, kind.suffix if suffix is None else suffix)))
            found.append(dataclasses.replace(question, image=(image_folder or path.parent) / question.image, question=asked))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}, {where}: not an object with {', '.join(kind.keys[:-1])} and {kind.keys[-1]} "
                             f"({type(error).__name__}: {error})") from None
    return found


def _records(path: Path) -> list[tuple[str, Any]]:
    """What a file holds, with where it is: values of a JSON, or the lines of a JSONL as they are."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} cannot be read ({reason}): give a JSONL of questions, or a benchmark's file") from None
    lines = [(f"line {n}", line) for n, line in enumerate(content.split("\n"), 1) if line.strip()]  # splitlines would also split at U+2028
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError):  # several lines are no JSON together; what is wrong with one of them is said when it is read
        return list(lines)
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        return [(f"record {n}", record) for n, record in enumerate(whole["data"], 1)]
    if isinstance(whole, dict) and whole and all(isinstance(record, dict) for record in whole.values()):
        return [(f"question {name}", record) for name, record in whole.items()]
    return [("line 1", whole)]


def _row(record: Any) -> Mapping[str, Any]:
    row = json.loads(record) if isinstance(record, str) else record
    if not isinstance(row, Mapping):
        raise TypeError(f"it is a {type(row).__name__}")
    return row


def _layout(path: Path, where: str, record: Any) -> Layout:
    """The layout whose keys the first record has. What is no object is left to the reader of our own, to say so."""
    try:
        row = _row(record)
    except (ValueError, TypeError, RecursionError):
        return jsonl.LAYOUT
    for layout in LAYOUTS.values():
        if row.keys() >= set(layout.keys):
            return layout
    raise InputError(f"{path}, {where}: its keys ({', '.join(map(str, row)) or 'none'}) are of no layout that is known: choose one with --layout "
                     f"({', '.join(LAYOUTS)})")
