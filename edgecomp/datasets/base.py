"""What a question, a metric and a layout of questions are."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHORT = "Answer the question using a single word or phrase."  # behind short-answer questions in LLaVA-1.5's protocol (its docs/Evaluation.md)

Pairs = Sequence[tuple[str, tuple[str, ...]]]  # what was said and the right answers, for each question


def nothing(pairs: Pairs) -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class Metric:
    """How an answer is judged.

    title: what the mean score is called. score: of what was said, given the right answers: 0 to 1. further: what else is
    published of a set of answers, by name, from 0 to 1.
    """
    title: str
    score: Callable[[str, tuple[str, ...]], float]
    further: Callable[[Pairs], dict[str, float]] = nothing


def normal(text: str) -> str:
    """What an exact match compares: lower case, single spaces, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(".")


def exact(said: str, answers: tuple[str, ...]) -> float:
    """Whether what was said is one of the answers, as normal text."""
    return float(normal(said) in {normal(answer) for answer in answers})


EXACT = Metric("correct", exact)


@dataclass(frozen=True)
class Question:
    """A question about a picture. `image` is found from where this process runs; `question` is all of what is asked, suffix included.

    answers: the right ones, or what several people said. tasks: those that it counts for.
    """
    image: Path
    question: str
    answers: tuple[str, ...]
    tasks: tuple[str, ...] = ("all",)
    metric: Metric = EXACT

    @property
    def answer(self) -> str:
        """The answer that most gave, the first of them."""
        return max(self.answers, key=self.answers.count)


@dataclass(frozen=True)
class Layout:
    """How a file says its questions.

    keys: what every record has, by which a file is recognised. question: makes one of a record and the name of its file;
    its `image` is relative to the folder of pictures. suffix: what is asked behind each question where nothing else is chosen.
    """
    name: str
    summary: str
    keys: tuple[str, ...]
    question: Callable[[Mapping[str, Any], Path], Question]
    metric: Metric
    suffix: str = ""


def text(row: Mapping[str, Any], key: str) -> str:
    """A text of a record, or a number as one. Raises KeyError, TypeError or ValueError."""
    value = row[key]
    if not isinstance(value, (str, int, float)):
        raise TypeError(f"{key!r} is no text")
    if not str(value).strip():
        raise ValueError(f"the {key} is empty")
    return str(value)


def texts(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """A list of texts of a record. Raises KeyError, TypeError or ValueError."""
    values = row[key]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"{key!r} is no list of texts")
    if not values:
        raise ValueError(f"there are no {key}")
    return tuple(values)
