"""Builds one engine on the board and shows how far it is: `python3 builder/build_engine.py JOB.json LABEL`. build.sh runs it.

TensorRT works in a process of its own, so that its memory is given back, and this one can say why it ended.
"""
from __future__ import annotations

import dataclasses
import signal
import sys
from pathlib import Path
from types import FrameType

from edgecomp.build.building import build_engine
from edgecomp.build.order import Order
from edgecomp_runtime.errors import EdgecompError

STEP = {"%": 25, "MiB": 1024}  # between two lines where there is no terminal


class Progress:
    """How far a build is: one line that is written over on a terminal, else one for each quarter of a phase."""

    def __init__(self) -> None:
        self._over, self._said = sys.stdout.isatty(), ("", -1)

    def tick(self, phase: str, step: int, steps: int) -> None:
        done, unit = (100 * step // steps, "%") if steps else (step, "MiB")
        least = 1 if self._over else STEP[unit]
        if phase == self._said[0] and done < self._said[1] + least:
            return
        self._said = phase, done
        line = f"  {phase[:60]} {done} {unit}"
        print(f"\r{line}\x1b[K" if self._over else line, end="" if self._over else "\n", flush=True)

    def end(self) -> None:
        if self._over:
            print("\r\x1b[K", end="", flush=True)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda number, frame: _stop(frame))
    order, progress = Order.read(Path(sys.argv[1])), Progress()
    try:
        result = build_engine(dataclasses.asdict(order), progress.tick)
    except EdgecompError as error:
        progress.end()
        print(f"build.sh: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        progress.end()
        return 130
    progress.end()
    for note in result.notes:
        print(f"  {note}")
    print(f"  {result.engine_bytes / 2**20:.0f} MiB in {result.seconds:.0f} s, with {result.peak_anonymous_bytes / 2**20:.0f} MiB of memory at most")
    return 0


def _stop(frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
