"""Running a sweep's job: answers by several processes, then times one plan after another; what is finished is not done again."""
from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgecomp.doctor import machine
from edgecomp.evaluate import Question
from edgecomp.measure import Spec
from edgecomp.sweep.job import (
    ANSWERS,
    LATENCY,
    NEW_TOKENS,
    Cell,
    Job,
    Outcome,
    about_here,
    data_hash,
    fresh,
    read_cell,
    with_answers,
    with_latency,
    write_part,
)
from edgecomp.sweep.processes import Process, together
from edgecomp.sweep.tables import Row, write_tables
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.errors import EdgecompError

MOST_BYTES = 2 * 2**30  # of vision outputs that one process holds
Say = Callable[[str], None]


def go_on(folder: Path, *, jobs: int = 1, threads: int | None = None, say: Say = lambda line: None) -> tuple[list[Row], dict[str, str]]:
    """Measures what is missing of a sweep and writes its tables. Returns the rows, and by plan why some could not be measured. See `run`."""
    try:
        outcome = run(folder, jobs=jobs, threads=threads, say=say)
    except KeyboardInterrupt:
        say(f"ended; what is finished is in {folder / 'cells'}, and the same command goes on from there")
        raise
    return write_tables(folder, Job.load(folder), outcome, threads), outcome.failed


def run(folder: Path, *, jobs: int = 1, threads: int | None = None, say: Say = lambda line: None) -> Outcome:
    """Measures what is missing of a sweep.

    Args:
        folder: of a job whose bundle has all its plans.
        jobs: processes that answer questions; with more than one each has one thread.
        threads: of the process that is timed, and of a single one that answers.
        say: is told how far it is.

    Raises:
        InputError, BundleError: no job, no bundle, or a picture that cannot be read.
    """
    job, bundle = Job.load(folder), Bundle.open(folder / "bundle")
    questions, here = job.questions(), about_here()
    data, outcome = data_hash(questions), Outcome()
    asked = {cell.plan: with_answers(bundle, cell.plan, data) for cell in job.cells}
    timed = {cell.plan: with_latency(bundle, cell.plan, questions[0], job.repeats, threads, here)
             for cell in job.cells if job.repeats and timed_cell(cell, job)}
    left = {part: _missing(folder, part, wanted, say) for part, wanted in ((ANSWERS, asked), (LATENCY, timed))}
    if finished := len(job.cells) - len(left[ANSWERS]):
        say(f"{finished} of {len(job.cells)} cells have their answers already")
    _answer(folder, bundle, left[ANSWERS], asked, questions, jobs, threads, outcome, say)
    _time(folder, {c.plan: c for c in job.cells}, [p for p in left[LATENCY] if p not in outcome.failed], timed, questions[0], threads, outcome, say)
    for plan, wanted in asked.items():
        if fresh(cell := read_cell(folder, plan), ANSWERS, wanted):
            outcome.cells[plan] = cell if plan in timed and fresh(cell, LATENCY, timed[plan]) else {k: v for k, v in cell.items() if k != LATENCY}
    return outcome


def timed_cell(cell: Cell, job: Job) -> bool:
    """Whether a cell is timed: of plans that differ in their seed only, one is, for their graphs differ in constants only."""
    same = [c for c in job.cells if c.seed is not None and (c.method, c.parameters, c.sites, c.position, c.windows, c.keep)
            == (cell.method, cell.parameters, cell.sites, cell.position, cell.windows, cell.keep)]
    return cell.seed is None or same[0] is cell


def _missing(folder: Path, part: str, wanted: dict[str, dict[str, Any]], say: Say) -> list[str]:
    """The plans whose part is not there, or was measured with something else, which is said."""
    cells = {plan: read_cell(folder, plan) for plan in wanted}
    left = [plan for plan, measured_with in wanted.items() if not fresh(cells[plan], part, measured_with)]
    other: Counter[str] = Counter()
    for plan in left:
        if found := cells[plan].get(part):
            before = found.get("measured_with", {})
            other[", ".join(key for key in wanted[plan] if before.get(key) != wanted[plan][key])] += 1
    for what, count in other.items():
        say(f"{part} of {count} cell{'s were' if count > 1 else ' was'} measured with other values ({what}): again")
    return left


def _answer(folder: Path, bundle: Bundle, plans: Sequence[str], wanted: dict[str, dict[str, Any]], questions: Sequence[Question],
            jobs: int, threads: int | None, outcome: Outcome, say: Say) -> None:
    """Answers the questions with each plan; every process takes one whose vision graph it has, else of those left most share."""
    vision = {plan: bundle.manifest.plans[plan].variants["onnxruntime"]["vision"] for plan in plans}
    left, lock, clock = list(plans), threading.Lock(), _Clock(len(plans))
    jobs = max(1, min(jobs, len(plans)))
    workers = [Process(folder, 1 if jobs > 1 else threads, room(jobs)) for _ in range(jobs)] if plans else []

    def take(has: str | None) -> str | None:
        with lock:
            shared = Counter(vision[plan] for plan in left)
            best = max(left, key=lambda plan: (vision[plan] == has, shared[vision[plan]]), default=None)
            if best is not None:
                left.remove(best)
            return best

    def work(worker: Process) -> None:
        plan = take(None)
        while plan is not None:
            try:
                found = worker.ask(do="answers", plan=plan)
            except EdgecompError as error:
                outcome.failed[plan] = str(error)
                say(f"{plan} cannot be measured: {error}")
            else:
                write_part(folder, plan, ANSWERS, found, wanted[plan])
                say(f"answers {clock.tick()}: {plan}, {found['all']:.1f} % of {found['questions']} questions, {found['took_s']:.0f} s{clock.left()}")
            plan = take(vision[plan])

    if plans:
        say(f"{len(plans)} cells have {len(questions)} questions about {len({q.image for q in questions})} pictures to answer each, in "
            + ("1 process" if jobs == 1 else f"{jobs} processes"))
    together([functools.partial(work, worker) for worker in workers], workers)


def _time(folder: Path, cells: dict[str, Cell], plans: Sequence[str], wanted: dict[str, dict[str, Any]], question: Question, threads: int | None,
          outcome: Outcome, say: Say) -> None:
    """Times the plans, alone on the machine, each in a process of its own, and the selector in another, whose profiler is on."""
    clock, image = _Clock(len(plans)), str(question.image)
    timer, profiler = Process(folder, threads, 0), Process(folder, threads, 0)

    def work() -> None:
        for plan in plans:
            try:
                timer.restart()  # for its peak of memory
                took = timer.ask(do="time", spec=asdict(Spec(str(folder / "bundle"), plan, image, question.question, wanted[plan]["repeats"],
                                                             NEW_TOKENS, threads)))
                found: dict[str, Any] = {**took["latency"], "peak_bytes": took["peak_bytes"], "meter": took["meter"], "selector_ms": None}
                if (twin := cells[plan].timing) and twin != plan:
                    found |= profiler.ask(do="selector", plan=plan, twin=twin)
            except EdgecompError as error:
                outcome.failed[plan] = str(error)
                say(f"{plan} cannot be timed: {error}")
                continue
            write_part(folder, plan, LATENCY, found, wanted[plan])
            say(f"times {clock.tick()}: {plan}, first token after {found['first_token_ms']['median']:.0f} ms{clock.left()}")

    together([work] if plans else [], [timer, profiler])


def room(jobs: int) -> int:
    """Bytes that each of so many processes may hold: a quarter of the machine's memory, shared. (What is free just now says little: files
    that were read take the rest.)"""
    memory: int = machine()["memory_bytes"]
    return min(MOST_BYTES, memory // 4 // jobs)


class _Clock:
    """How far it is, and how long it takes yet."""

    def __init__(self, total: int):
        self._total, self._done, self._began, self._lock = total, 0, time.monotonic(), threading.Lock()

    def tick(self) -> str:
        with self._lock:
            self._done += 1
            return f"{self._done} of {self._total}"

    def left(self) -> str:
        seconds = (time.monotonic() - self._began) / self._done * (self._total - self._done)
        return "" if not seconds else f"; about {seconds / 60:.0f} min left" if seconds > 90 else f"; about {seconds:.0f} s left"
