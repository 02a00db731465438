"""POPE: is an object in the picture or made up? (arXiv 2305.10355)"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgecomp.datasets.base import SHORT, Layout, Metric, Pairs, Question, text


def question(row: Mapping[str, Any], file: Path) -> Question:
    """`coco_pope_{random,popular,adversarial}.json` are JSONL of {question_id, image, text, label}, image a file of COCO's val2014
    (the authors' README). The split is the task: a record's `category`, where files were put together, or the end of the file's name.
    """
    label = text(row, "label")
    if label not in ("yes", "no"):
        raise ValueError(f"the label {label!r} is neither yes nor no")
    split = row.get("category") or (file.stem.partition("_pope_")[2] or "all")
    return Question(Path(text(row, "image")), text(row, "text"), (label,), (str(split),), METRIC)


def reduced(said: str) -> str:
    """'yes' or 'no', as the authors' `evaluate.py` reads an answer: 'no' where its first sentence has the word 'No', 'no' or 'not'
    between spaces once commas are dropped, else 'yes', whatever was said."""
    words = said.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"}.intersection(words) else "yes"


def score(said: str, answers: tuple[str, ...]) -> float:
    return float(reduced(said) in answers)


def further(pairs: Pairs) -> dict[str, float]:
    """Precision, recall and F1 of 'yes', and how often it was said. Nothing found is 0 of it, where the authors' script stops."""
    yes = [reduced(said) == "yes" for said, _ in pairs]
    there = ["yes" in answers for _, answers in pairs]
    hits = sum(a and b for a, b in zip(yes, there))
    return {"precision": hits / max(sum(yes), 1), "recall": hits / max(sum(there), 1),
            "F1": 2 * hits / max(sum(yes) + sum(there), 1), "said yes": sum(yes) / max(len(yes), 1)}


METRIC = Metric("correct", score, further)
LAYOUT = Layout("pope", "coco_pope_SPLIT.json; yes or no", ("image", "text", "label"), question, METRIC, SHORT)
