"""`edgecomp eval`: accuracy by task."""
from __future__ import annotations

from pathlib import Path

import click

from edgecomp.commands.options import BACKEND, BUNDLE, JSON, PLAN, THREADS, columns, print_json, progress, reading


@click.command("eval")
@BUNDLE
@click.option("--data", required=True, type=click.Path(path_type=Path),
              help="A JSONL of {image, question, answer, task}, or the questions of POPE, TextVQA, DocVQA or GQA as published.")
@reading
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many questions.")
@PLAN
@BACKEND
@THREADS
@JSON
def command(bundle: Path, data: Path, layout: str | None, image_folder: Path | None, suffix: str | None, limit: int | None, plan: str | None,
            backend: str, threads: int | None, as_json: bool) -> None:
    """Answer every question of a file greedily, and judge by its benchmark's metric.

    \b
    edgecomp eval BUNDLE --data questions.jsonl
    edgecomp eval BUNDLE --data coco_pope_random.json --image-folder val2014
    edgecomp eval BUNDLE --data TextVQA_0.5.1_val.json --image-folder train_images
    """
    from edgecomp.evaluate import accuracy, by_task, evaluate, further, read_questions
    from edgecomp_runtime import Bundle, Session
    questions = read_questions(data, layout, image_folder, suffix)[:limit]
    session = Session(Bundle.open(bundle), plan=plan, backend=backend, threads=threads)
    with progress(f"{session.plan_name}, {len(questions)} questions", len(questions)) as bar:
        answers = evaluate(session, questions, lambda: bar.update(1))
    tasks, more, metric = by_task(answers), further(answers), questions[0].metric.title
    if as_json:
        wrong = [{"image": str(a.question.image), "question": a.question.question, "answer": a.question.answer, "said": a.said,
                  **({"answers": a.question.answers, "score": a.score} if len(a.question.answers) > 1 else {})} for a in answers if not a.right]
        print_json({"plan": session.plan_name, "metric": metric, "accuracy": accuracy(answers), "by_task": tasks,
                    **({"further": more} if more else {}), "questions": len(answers), "wrong": wrong})
        return
    counts = {task: str(sum(task in a.question.tasks for a in answers)) for task in tasks}
    click.echo(columns([("task", f"{metric} %", "questions"), *((t, f"{v:.1f}", counts[t]) for t, v in tasks.items()),
                      ("all", f"{accuracy(answers):.1f}", str(len(answers)))]))
    if more:
        click.echo("\n" + ", ".join(f"{name} {value:.1f} %" for name, value in more.items()))
