"""How far a builder is, of what TensorRT says of its phases."""
from __future__ import annotations

import threading
from collections.abc import Callable

Tick = Callable[[str, int, int], None]
PARTS = 1000  # lines of a phase at most


class Phases:
    """How far TensorRT is: its phases are within one another, each with a number of steps. The outermost is told, in thousandths."""

    def __init__(self, tick: Tick):
        self._tick, self._lock = tick, threading.Lock()  # phases may run on several threads
        self._phases: dict[str, tuple[str | None, int, int]] = {}  # by name: the phase around it, steps, steps done
        self._told: dict[str, int] = {}

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._phases[name] = parent or None, steps, 0

    def step(self, name: str, step: int) -> None:
        with self._lock:
            parent, steps, _ = self._phases.get(name, (None, 1, 0))
            self._phases[name] = parent, steps, step + 1
            self._tell()

    def finish(self, name: str) -> None:
        with self._lock:
            parent, _, _ = self._phases.pop(name, (None, 1, 0))
            if parent is None:
                self._say(name, PARTS)
                self._told.pop(name, None)

    def _tell(self) -> None:
        for name, (parent, _, _) in self._phases.items():
            if parent is None:
                self._say(name, int(PARTS * self._part(name)))

    def _part(self, name: str) -> float:
        """The done part of a phase, with the farthest phase within it."""
        _, steps, done = self._phases[name]
        within = max((self._part(other) for other, (parent, _, _) in self._phases.items() if parent == name and other != name), default=0.0)
        return min(1.0, (done + within) / max(steps, 1))

    def _say(self, name: str, part: int) -> None:
        if part > self._told.get(name, -1):
            self._told[name] = part
            self._tick(name, part, PARTS)
