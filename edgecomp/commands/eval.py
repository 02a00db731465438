"""`edgecomp eval`: exact-match accuracy by task."""
from __future__ import annotations

from pathlib import Path

import click

from edgecomp.commands.options import BACKEND, BUNDLE, JSON, PLAN, THREADS, columns, print_json, progress


@click.command("eval")
@BUNDLE
@click.option("--data", required=True, type=click.Path(path_type=Path), help="A JSONL of {image, question, answer, task}.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many questions.")
@PLAN
@BACKEND
@THREADS
@JSON
def command(bundle: Path, data: Path, limit: int | None, plan: str | None, backend: str, threads: int | None, as_json: bool) -> None:
    """Answer every question of a JSONL greedily and compare with its answer, as text."""
    from edgecomp.evaluate import accuracy, by_task, evaluate, read_questions
    from edgecomp_runtime import Bundle, Session
    questions = read_questions(data)[:limit]
    session = Session(Bundle.open(bundle), plan=plan, backend=backend, threads=threads)
    with progress(f"{session.plan_name}, {len(questions)} questions", len(questions)) as bar:
        answers = evaluate(session, questions, lambda: bar.update(1))
    tasks = by_task(answers)
    if as_json:
        wrong = [{"image": str(a.question.image), "question": a.question.question, "answer": a.question.answer, "said": a.said}
                 for a in answers if not a.right]
        print_json({"plan": session.plan_name, "accuracy": accuracy(answers), "by_task": tasks, "questions": len(answers), "wrong": wrong})
        return
    counts = {task: str(sum(a.question.task == task for a in answers)) for task in tasks}
    click.echo(columns([("task", "correct %", "questions"), *((t, f"{v:.1f}", counts[t]) for t, v in tasks.items()),
                      ("all", f"{accuracy(answers):.1f}", str(len(answers)))]))
