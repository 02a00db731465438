"""DocVQA: questions on scanned documents (arXiv 2007.00398)."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgecomp.datasets.base import SHORT, Layout, Metric, Question, text, texts

THRESHOLD = 0.5


def question(row: Mapping[str, Any], file: Path) -> Question:
    """`val_v1.0.json` and, with the questions' types, `val_v1.0_withQT.json` are {data: [{questionId, question, image, answers, ...}]},
    image such as documents/xnbl0037_1.png. A question of several types counts for each. The test split has no answers."""
    kinds = texts(row, "question_types") if row.get("question_types") else ("all",)
    return Question(Path(text(row, "image")), text(row, "question"), texts(row, "answers"), kinds, METRIC)


def similarity(said: str, answers: tuple[str, ...]) -> float:
    """ANLS of one question (arXiv 1907.00490): 1 - edits / length to the nearest answer, 0 where that is below a half.

    Case and runs of spaces do not count. The paper has 0 at exactly a half; the competition's script (rrc.cvc.uab.es, ch=17)
    keeps that half, and divides by the longer text's length before its spaces are joined. The script is followed.
    """
    best = 1 - min(_part(said, answer) for answer in answers)
    return best if best >= THRESHOLD else 0.0


def _part(said: str, answer: str) -> float:
    length = max(len(said), len(answer))
    return edits(" ".join(said.lower().split()), " ".join(answer.lower().split())) / length if length else 0.0


def edits(a: str, b: str) -> int:
    """Levenshtein's distance: characters put in, taken out or changed."""
    row = list(range(len(b) + 1))  # distances of the part of a so far to each beginning of b
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


METRIC = Metric("ANLS", similarity)
LAYOUT = Layout("docvqa", "val_v1.0.json or val_v1.0_withQT.json; ANLS", ("image", "question", "answers"), question, METRIC, SHORT)
