"""Measuring plans of a sweep one after another: `python -m edgecomp.sweep.worker`, a line of JSON in, lines of JSON out.

Needs what a device has and nothing else. A process goes on to a plan with the same vision graph where there is one: the tower
then runs once a picture for all of them.
"""
from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecomp.evaluate import Question, accuracy, by_task, evaluate, further
from edgecomp.measure import Spec, measure_here
from edgecomp.spatial import cells_of, coverage, entropy, position_correlation
from edgecomp.sweep.job import Job
from edgecomp.sweep.selector import Nodes, nodes, selector_ms
from edgecomp_runtime import Bundle, Session, backends
from edgecomp_runtime.buffers import Memory, Region
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import GraphInfo

PICTURES = 64  # whose kept tokens are looked at: with a cut in the decoder each costs a prefill


class SharedVision:
    """onnxruntime, but a picture that one vision graph has seen is not run through it again, whatever plan asks.

    most_bytes: of outputs held; when they are used up, further pictures are run each time. Another vision graph starts anew.
    """

    name = "onnxruntime"

    def __init__(self, threads: int | None, most_bytes: int):
        self._backend, self._most = backends.backend("onnxruntime", threads), most_bytes
        self.prefill_rows, self.logit_rows = self._backend.prefill_rows, self._backend.logit_rows
        self._of: tuple[Path, backends.Executable] | None = None
        self._seen: dict[str, dict[str, NDArray[Any]]] = {}
        self._held = self.runs = 0

    def files(self, bundle: Bundle, plan: str) -> dict[str, tuple[Path, GraphInfo]]:
        return self._backend.files(bundle, plan)

    def memory(self) -> Memory:
        return self._backend.memory()

    def load(self, path: Path, graph: GraphInfo, most: Mapping[str, int], state: Mapping[str, Region], memory: Memory) -> backends.Executable:
        if state:
            return self._backend.load(path, graph, most, state, memory)
        if self._of is None or self._of[0] != path:
            self._of = None  # the old one goes before the new one comes
            self._seen, self._held = {}, 0
            self._of = path, self._backend.load(path, graph, most, state, memory)
        return self

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The vision graph on one picture."""
        assert self._of is not None
        name = hashlib.sha256(feeds["pixels"].tobytes()).hexdigest()
        found = self._seen.get(name)
        if found is None:
            found = {key: array.copy() for key, array in self._of[1].run(feeds).items()}
            self.runs += 1
            size = sum(array.nbytes for array in found.values())
            if self._held + size <= self._most:
                self._seen[name], self._held = found, self._held + size
        return found


class Worker:
    """The state of a process: the bundle, the questions, and what plans share.

    Args:
        folder: the sweep's.
        threads: for one operator.
        most_bytes: of vision outputs to hold.
    """

    def __init__(self, folder: Path, threads: int | None, most_bytes: int):
        self.bundle, self.threads = Bundle.open(folder / "bundle"), threads
        self.job = Job.load(folder)
        self.questions = self.job.questions()
        self._vision = SharedVision(threads, most_bytes)
        self._twins: dict[str, Nodes] = {}

    def answers(self, plan: str, tick: Callable[[], None]) -> dict[str, Any]:
        """Accuracy, and where on the pictures the kept tokens lie."""
        began, runs = time.perf_counter(), self._vision.runs
        session = Session(self.bundle, plan=plan, backend=self._vision)
        said = evaluate(session, self.questions, tick)
        took = time.perf_counter() - began
        first = {q.image: q for q in reversed(self.questions)}
        kept = [keeps(session, first[image], tick) for image in list(dict.fromkeys(q.image for q in self.questions))[:PICTURES]]
        return {"all": accuracy(said), "by_task": by_task(said), "further": further(said), "metric": said[0].question.metric.title,
                "questions": len(said), "pictures": len(first), "took_s": round(took, 2), "pictures_seen": self._vision.runs - runs,
                "spatial": spatial(kept, self.bundle), "example": {"kept": kept[0].tolist(), "said": said[0].said}}

    def selector(self, plan: str, twin: str) -> dict[str, float | None]:
        """What choosing takes, in milliseconds a picture and prompt."""
        first, repeats = self.questions[0], max(1, self.job.repeats)
        if twin not in self._twins:
            self._twins[twin] = nodes(self.bundle, twin, str(first.image), first.question, repeats, self.threads)
        mine = nodes(self.bundle, plan, str(first.image), first.question, repeats, self.threads)
        return {"selector_ms": selector_ms(mine, self._twins[twin])}


def keeps(session: Session, question: Question, tick: Callable[[], None] = lambda: None) -> NDArray[np.int64]:
    """The numbers [K], of a picture's visual tokens, of those behind a plan's last cut."""
    tick()
    return list(session.kept(str(question.image), question.question).values())[-1]


def spatial(kept: Sequence[NDArray[np.int64]], bundle: Bundle) -> dict[str, Any]:
    """Means over pictures of what `edgecomp.spatial` says of the tokens kept of each."""
    cells = cells_of(bundle.manifest)
    found = [c for k in kept if (c := position_correlation(k, len(cells))) is not None]
    return {"coverage": fmean(coverage(k, cells) for k in kept), "entropy": fmean(entropy(k, cells) for k in kept),
            "position_correlation": fmean(found) if found else None, "pictures": len(kept)}


def main() -> None:
    """Reads {"folder", "threads", "most_bytes"}, then tasks {"do", ...}; answers each with {"done"} or {"error"}, after {} for each question."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer

    def tell(**line: Any) -> None:
        try:
            out.write(json.dumps(line) + "\n")
        except BrokenPipeError:  # nobody waits any more
            os._exit(1)

    try:
        start = json.loads(sys.stdin.readline())
        worker = Worker(Path(start["folder"]), start["threads"], start["most_bytes"])
        for line in sys.stdin:
            task = json.loads(line)
            if task["do"] == "answers":
                tell(done=worker.answers(task["plan"], tell))
            elif task["do"] == "time":
                tell(done=measure_here(Spec(**task["spec"])))
            else:
                tell(done=worker.selector(task["plan"], task["twin"]))
    except EdgecompError as error:
        tell(error=str(error))


if __name__ == "__main__":
    main()
