"""Accuracy by task: questions in, answers judged by the metric of their benchmark out."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgecomp.datasets import read_questions
from edgecomp.datasets.base import Question, normal
from edgecomp_runtime import Session
from edgecomp_runtime.errors import InputError

__all__ = ["MOST_TOKENS", "Answer", "Question", "accuracy", "by_task", "evaluate", "further", "normal", "read_questions"]

MOST_TOKENS = 160  # an answer longer than any in the set is wrong whatever follows


@dataclass(frozen=True)
class Answer:
    """A question with what the model said."""
    question: Question
    said: str

    @property
    def score(self) -> float:
        """By the question's metric, from 0 to 1."""
        return self.question.metric.score(self.said, self.question.answers)

    @property
    def right(self) -> bool:
        return self.score == 1


def evaluate(session: Session, questions: Sequence[Question], tick: Callable[[], None] = lambda: None) -> list[Answer]:
    """Answers every question greedily, in order. Those about one picture are asked together: its rows are reused.

    Raises:
        InputError: a picture is missing, before the first question is answered; or it cannot be read.
    """
    if missing := next((q.image for q in questions if not q.image.is_file()), None):
        raise InputError(f"{missing}: no such file; the questions name it relative to their own file, or to --image-folder")
    first = {q.image: n for n, q in reversed(list(enumerate(questions)))}
    answers = {}
    for n in sorted(range(len(questions)), key=lambda n: first[questions[n].image]):
        said = session.generate(questions[n].question, [questions[n].image], max_new_tokens=MOST_TOKENS).finish()
        answers[n] = Answer(questions[n], said.strip())
        tick()
    return [answers[n] for n in range(len(questions))]


def accuracy(answers: Sequence[Answer]) -> float:
    """The mean score in percent."""
    return 100 * sum(a.score for a in answers) / len(answers)


def by_task(answers: Sequence[Answer]) -> dict[str, float]:
    """The mean score in percent for each task, in the order of their names. A question of several tasks counts for each."""
    tasks = sorted({task for a in answers for task in a.question.tasks})
    return {task: accuracy([a for a in answers if task in a.question.tasks]) for task in tasks}


def further(answers: Sequence[Answer]) -> dict[str, float]:
    """What else the questions' metric says, in percent, by name."""
    metric = answers[0].question.metric
    return {name: 100 * value for name, value in metric.further([(a.said, a.question.answers) for a in answers]).items()}
