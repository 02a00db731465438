"""Exact-match accuracy by task: a JSONL of questions in, answers compared as text out."""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgecomp_runtime import Session
from edgecomp_runtime.errors import InputError

MOST_TOKENS = 160  # an answer longer than any in the set is wrong whatever follows


@dataclass(frozen=True)
class Question:
    """One line of the file. `image` is found from where this process runs."""
    image: Path
    question: str
    answer: str
    task: str


@dataclass(frozen=True)
class Answer:
    """A question with what the model said."""
    question: Question
    said: str

    @property
    def right(self) -> bool:
        return normal(self.said) == normal(self.question.answer)


def normal(text: str) -> str:
    """What is compared: lower case, single spaces, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(".")


def read_questions(path: Path) -> list[Question]:
    """Reads a JSONL of {image, question, answer, task}; images are relative to the file, `task` may be left out.

    Raises:
        InputError: the file cannot be read, or a line is not such an object; the line is named.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would also split at U+2028, which JSON has in texts
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} cannot be read ({reason}): give a JSONL of questions") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                found.append(Question(path.parent / row["image"], str(row["question"]), str(row["answer"]), str(row.get("task", "all"))))
                if not found[-1].question.strip():
                    raise ValueError("the question is empty")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: not an object with image, question and answer ({type(error).__name__}: {error})") from None
    if not found:
        raise InputError(f"{path} has no questions")
    return found


def evaluate(session: Session, questions: Sequence[Question], tick: Callable[[], None] = lambda: None) -> list[Answer]:
    """Answers every question greedily. Questions about one picture should follow each other: its rows are reused.

    Raises:
        InputError: a picture is missing, before the first question is answered; or it cannot be read.
    """
    if missing := next((q.image for q in questions if not q.image.is_file()), None):
        raise InputError(f"{missing}: no such file; the questions name it relative to their own file")
    answers = []
    for question in questions:
        said = session.generate(question.question, [question.image], max_new_tokens=MOST_TOKENS).finish()
        answers.append(Answer(question, said.strip()))
        tick()
    return answers


def accuracy(answers: Sequence[Answer]) -> float:
    """Percent right."""
    return 100 * sum(a.right for a in answers) / len(answers)


def by_task(answers: Sequence[Answer]) -> dict[str, float]:
    """Percent right for each task, in the order in which the tasks first appear by name."""
    tasks = sorted({a.question.task for a in answers})
    return {task: accuracy([a for a in answers if a.question.task == task]) for task in tasks}
