"""Builds one engine in a process of its own: `python -m edgecomp.build.engine JOB.json [PARENT]`.

It needs TensorRT and nothing else. It says in lines of JSON on standard output how far it is: `phase`, `step` and `steps`, 0 where
nobody knows how many, and the peaks of memory so far. The last line is the result or an `error`. With PARENT, a process id, it ends
when that process has gone.
"""
from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from edgecomp.build.order import Order
from edgecomp.build.watch import Watch
from edgecomp_runtime.errors import EdgecompError

PACKAGES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}  # by what pip calls them


class Lines:
    """Standard output for lines of JSON alone. What libraries print there and to standard error goes to the log."""

    def __init__(self, log: TextIO):
        self._file = os.fdopen(os.dup(1), "w", buffering=1)
        self._lock, self._ended = threading.Lock(), False
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)

    def say(self, last: bool = False, **line: Any) -> None:
        """One line. Behind the last there is none, for another thread may still have something to say."""
        with self._lock:
            if not self._ended:
                self._file.write(json.dumps(line) + "\n")
            self._ended |= last

    def tick(self, phase: str, step: int, steps: int) -> None:
        self.say(phase=phase, step=step, steps=steps)


def load(package: str) -> None:
    """Imports the package under the name `tensorrt`, which this process's other modules import: both packages have one interface.

    Raises:
        EdgecompError: the package is missing or cannot be loaded.
    """
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise EdgecompError(f"{package} is installed but lacks the module {error.name!r}") from None
        raise EdgecompError(f"{package} is not installed: {_way(package)}") from None
    except (ImportError, OSError) as error:
        raise EdgecompError(f"{package} cannot be loaded: {_line(error)}") from None
    if not hasattr(module, "Builder"):  # an empty folder of that name, as type stubs make one
        raise EdgecompError(f"{package} is not installed, only a folder of that name: {_way(package)}")
    sys.modules["tensorrt"] = module


def build(order: Order, lines: Lines, watch: Watch, log: TextIO) -> dict[str, Any]:
    """Builds the engine. Returns what there is to say of it (`building.Result`). Raises EdgecompError."""
    began = time.perf_counter()
    load(order.package)
    from edgecomp.build import network
    try:
        built = network.build(order, lines.tick, log)
    except OSError as error:
        raise EdgecompError(f"{error.filename or order.out} cannot be written: {error.strerror}; nothing was left behind: "
                            "make room, or choose another place") from None
    watch.look()
    return {"seconds": time.perf_counter() - began, "engine_bytes": built.engine_bytes, "peak_anonymous_bytes": watch.anonymous,
            "peak_resident_bytes": watch.resident, "layers": built.layers, "version": built.version, "notes": built.notes}


def main() -> int:
    order = Order.read(Path(sys.argv[1]))
    parent = int(sys.argv[2]) if len(sys.argv) > 2 else None
    try:
        log = open(order.log or os.devnull, "w", buffering=1)  # noqa: PTH123, SIM115 - devnull is no path, and it stays open to the end
    except OSError as error:
        print(json.dumps({"error": f"{order.log} cannot be written: {error.strerror}"}))
        return 1
    lines = Lines(log)
    watch = Watch(lines.say, order.partial(os.getpid()), parent)
    try:
        result = build(order, lines, watch, log)
    except EdgecompError as error:
        lines.say(last=True, error=str(error))
        return 1
    except Exception as error:
        traceback.print_exc(file=log)
        lines.say(last=True, error=f"building {order.graph} failed: {type(error).__name__}: {_line(error)} (see {order.log or 'a log: give one'})")
        return 1
    lines.say(last=True, **result)
    return 0


def _way(package: str) -> str:
    if package not in PACKAGES:
        return f"known packages are {' and '.join(PACKAGES)}"
    return f"pip install {PACKAGES[package]}" + (" (on a Jetson: apt install python3-libnvinfer)" if package == "tensorrt" else "")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
