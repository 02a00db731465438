"""What choosing tokens takes: the nodes that a plan has and its twin has not, timed by onnxruntime's profiler.

The twin keeps as many tokens at the same sites, but as constants (`random`), so that everything behind the cuts has the same
shapes in both. The difference of two whole latencies would be the selector plus the noise of two large numbers, and a selector
takes a hundredth of either. So single nodes are compared: for each kind of node (operator, shapes in and out) how many more
the plan has, times their median. What the twin has more of (reading its constants) counts against. The profiler's own few
microseconds a node are in it, so this is an upper bound.

Where the two differ in attention over the whole (a method that merges inside the layers, at every one of them), they are not
comparable and there is no figure.
"""
from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime as ort

from edgecomp_runtime import Bundle, Session
from edgecomp_runtime.backends.onnxruntime import OnnxRuntimeBackend
from edgecomp_runtime.buffers import Memory

ATTENTION = ("Attention", "GroupQueryAttention", "MultiHeadAttention")  # operators that no selector has

Kind = tuple[str, str, str]  # operator, shapes in, shapes out
Nodes = Mapping[Kind, tuple[float, float]]  # how many a run of a picture and prompt, and what one takes in milliseconds


class Profiled(OnnxRuntimeBackend):
    """onnxruntime with its profiler on."""

    def __init__(self, folder: Path, threads: int | None):
        super().__init__(threads)
        self._folder = folder
        self.options.enable_profiling = True
        self.sessions: list[ort.InferenceSession] = []

    def open(self, path: Path, memory: Memory) -> ort.InferenceSession:
        self.options.profile_file_prefix = str(self._folder / f"{len(self.sessions)}")
        self.sessions.append(super().open(path, memory))
        return self.sessions[-1]


def nodes(bundle: Bundle, plan: str, image: str, prompt: str, repeats: int, threads: int | None) -> Nodes:
    """The nodes that a plan runs up to the first token."""
    found: dict[Kind, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        backend = Profiled(Path(folder), threads)
        session = Session(bundle, plan=plan, backend=backend)
        for _ in range(repeats + 1):  # the median leaves the first out
            session.reset()
            session.generate(prompt, [image], max_new_tokens=1).finish()
        for one in backend.sessions:
            for event in json.loads(Path(one.end_profiling()).read_text()):
                if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                    facts = event["args"]
                    kind = (facts["op_name"], json.dumps(facts["input_type_shape"]), json.dumps(facts["output_type_shape"]))
                    found[kind].append(event["dur"] / 1e3)
    return {kind: (len(times) / (repeats + 1), median(times)) for kind, times in found.items()}


def selector_ms(mine: Nodes, twin: Nodes) -> float | None:
    """What a plan's own nodes take; None where the twin's whole is another."""
    more = {kind: mine.get(kind, (0, 0))[0] - twin.get(kind, (0, 0))[0] for kind in mine.keys() | twin.keys()}
    attending: dict[tuple[str, ...], float] = defaultdict(float)
    for kind, count in more.items():
        if kind[0] in ATTENTION:  # a decoder's takes queries, keys and values in one, but where a method reads them, too
            attending[kind[0], "" if kind[0] == "GroupQueryAttention" else kind[1], kind[2]] += count
    if any(attending.values()):
        return None
    return float(np.sum([count * (mine.get(kind) or twin[kind])[1] for kind, count in more.items() if count]))
