"""What the process that builds an engine is told, and how it writes files."""
from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Order:
    """One engine to build.

    Args:
        graph: a lowered ONNX graph; its weights lie in files beside it.
        out: the engine. It appears when it is whole.
        package: `tensorrt` or `tensorrt_rtx`.
        capability: the compute capability to build for, such as 8.9; None for the GPU at hand. Only tensorrt_rtx builds for another.
        profile: each input's least, usual and largest shape.
        precision: fp32 (without TF32) or fp16. A strongly typed network has its types from the graph; TensorRT 8.6 needs to be told.
        timing_cache: a file of what TensorRT has timed before, read if it is there and written again; tensorrt_rtx times nothing, and leaves it.
        workspace_bytes: scratch memory that a layer may use at most; None for TensorRT's own limit, the whole GPU.
        optimization_level: 0 to 5; None for TensorRT's own, 3.
        log: a file for TensorRT's warnings and errors.
    """
    graph: str
    out: str
    package: str
    capability: str | None
    profile: dict[str, Shapes]
    precision: str = "fp16"
    timing_cache: str | None = None
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    log: str | None = None

    @classmethod
    def read(cls, path: Path) -> Order:
        """An order from its JSON file. Raises TypeError and ValueError, for it was written by a program."""
        return cls(**json.loads(path.read_text()))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def partial(self, pid: int) -> list[Path]:
        """What a process of that id may have half written."""
        return [_partial(Path(path), pid) for path in (self.out, self.timing_cache) if path]


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, that takes its name when it is whole and on the disk. Nothing is left of one that failed."""
    partial = _partial(path, os.getpid())
    try:
        with partial.open("wb", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name, too
        finally:
            os.close(folder)
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path, pid: int) -> Path:
    return path.with_name(f".{path.name}.{pid}.partial")
