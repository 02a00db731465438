"""Measuring one plan, in a process of its own so that its peak memory is its own: `python -m edgecomp.measure < SPEC`.

The child imports what a device has and nothing else; the specification and the result are JSON on its standard streams.
"""
from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgecomp_runtime.errors import EdgecompError

PHASES = ("preprocess_ms", "vision_ms", "prefill_ms", "first_token_ms", "per_token_ms")


@dataclass(frozen=True)
class Spec:
    """What to measure: a plan of a bundle on one picture and prompt, `repeats` times, then the questions of a file.

    images: only questions about the first so many pictures of the file; None is all. layout, image_folder, suffix: how the
    file is read, see `edgecomp.datasets.read_questions`.
    """
    bundle: str
    plan: str
    image: str
    prompt: str
    repeats: int = 7
    new_tokens: int = 32
    threads: int | None = None
    data: str | None = None
    images: int | None = None
    layout: str | None = None
    image_folder: str | None = None
    suffix: str | None = None


def measure(spec: Spec) -> dict[str, Any]:
    """Runs `measure_here` in a child process. Raises EdgecompError with the child's last line where it fails."""
    child = subprocess.run([sys.executable, "-m", "edgecomp.measure"], input=json.dumps(asdict(spec)), capture_output=True, text=True)
    if child.returncode:
        reason = child.stderr.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
        raise EdgecompError(f"measuring plan {spec.plan!r} failed: {reason[0]}")
    found: dict[str, Any] = json.loads(child.stdout)
    return found


def measure_here(spec: Spec) -> dict[str, Any]:
    """Latency (median, 10th and 90th percentile over the repeats, each from a cold cache), peak memory, accuracy, and
    what the plan kept and said of the picture."""
    from edgecomp_runtime import Bundle, Session, memory
    began = time.perf_counter()
    session = Session(Bundle.open(spec.bundle), plan=spec.plan, threads=spec.threads)
    load_ms = (time.perf_counter() - began) * 1e3
    runs = []
    for _ in range(spec.repeats + 1):
        session.reset()
        generation = session.generate(spec.prompt, [spec.image], max_new_tokens=spec.new_tokens)
        generation.finish()
        runs.append(asdict(generation.statistics))
    latency: dict[str, Any] = {phase: spread([run[phase] for run in runs[1:]]) for phase in PHASES}  # the first one warms up
    latency |= {"kind": "measured", "load_ms": load_ms, "repeats": spec.repeats, "prompt_rows": runs[0]["prompt_rows"],
                "new_tokens": runs[0]["new_tokens"]}
    peak, meter = memory.peak()
    result = {"latency": latency, "peak_bytes": peak, "meter": meter, "said": generation.text.strip(),
              "kept": list(session.kept(spec.image, spec.prompt).values())[-1].tolist(), "accuracy": None}
    if spec.data:
        result["accuracy"] = _accuracy(session, spec)
    return result


def spread(values: list[float]) -> dict[str, float]:
    """Median, and the 10th and 90th percentile."""
    ranked = sorted(values)
    tenth = (len(ranked) - 1) / 10
    return {"median": statistics.median(ranked), "low": ranked[round(tenth)], "high": ranked[round(len(ranked) - 1 - tenth)]}


def _accuracy(session: Any, spec: Spec) -> dict[str, Any]:
    from edgecomp.evaluate import accuracy, by_task, evaluate, read_questions
    questions = read_questions(Path(spec.data or ""), spec.layout, Path(spec.image_folder) if spec.image_folder else None, spec.suffix)
    pictures = set(list(dict.fromkeys(q.image for q in questions))[:spec.images])
    answers = evaluate(session, [q for q in questions if q.image in pictures])
    return {"kind": "measured", "all": accuracy(answers), "metric": questions[0].metric.title, "by_task": by_task(answers), "questions": len(answers),
            "scenes": len(pictures)}


if __name__ == "__main__":
    try:
        json.dump(measure_here(Spec(**json.load(sys.stdin))), sys.stdout)
    except EdgecompError as error:
        sys.exit(str(error))
