"""GQA: real-world visual reasoning (arXiv 1902.09506)."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgecomp.datasets.base import EXACT, SHORT, Layout, Question, text


def question(row: Mapping[str, Any], file: Path) -> Question:
    """`testdev_balanced_questions.json` maps question ids to {imageId, question, answer, types: {structural, ...}, ...}; pictures are
    <imageId>.jpg. The structural types (query, verify, choose, logical, compare) are the tasks.

    A point for an answer equal to the right one, over the balanced questions (gqadataset.org's page on evaluation); the models
    of its time chose from a list of answers, so the case and the full stop of a sentence are taken off, as LLaVA's
    `convert_gqa_for_eval.py` does.
    """
    kinds = row.get("types")
    kind = kinds.get("structural") if isinstance(kinds, Mapping) else None
    return Question(Path(text(row, "imageId") + ".jpg"), text(row, "question"), (text(row, "answer"),), (str(kind or "all"),))


LAYOUT = Layout("gqa", "testdev_balanced_questions.json; exact match", ("imageId", "question", "answer"), question, EXACT, SHORT)
