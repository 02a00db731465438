"""edgecomp's own layout: a JSONL of {image, question, answer, task}, judged by exact match."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgecomp.datasets.base import EXACT, Layout, Question, text


def question(row: Mapping[str, Any], file: Path) -> Question:
    """`task` may be left out."""
    return Question(Path(row["image"]), text(row, "question"), (str(row["answer"]),), (str(row.get("task", "all")),))


LAYOUT = Layout("jsonl", "a JSONL of {image, question, answer, task}; exact match", ("image", "question", "answer"), question, EXACT)
