"""Workers as processes: asked by one thread each, and ended with whoever asks them, however that ends."""
from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgecomp_runtime.errors import EdgecompError


class Ended(Exception):
    """A process was asked after it had been ended."""


class Process:
    """A worker. Started when it is first asked, and again after it failed. Ctrl-C does not reach it: whoever gets that ends it."""

    def __init__(self, folder: Path, threads: int | None, most_bytes: int):
        self._start = {"folder": str(folder), "threads": threads, "most_bytes": most_bytes}
        self._child: subprocess.Popen[str] | None = None
        self._ended, self._lock = False, threading.Lock()

    def ask(self, **task: Any) -> dict[str, Any]:
        """What the worker found. Raises EdgecompError where it could not."""
        child = self._running()
        self._tell(child, task)
        assert child.stdout is not None
        answer: dict[str, Any] = next((a for line in child.stdout if (a := json.loads(line))), {})
        if "done" in answer:
            found: dict[str, Any] = answer["done"]
            return found
        code = child.wait()
        self._child = None
        if self._ended:
            raise Ended
        raise EdgecompError(answer.get("error") or f"its process ended with exit code {code}" + (": was memory short?" if code == -9 else ""))

    def restart(self) -> None:
        """The next question is answered by a new process."""
        with self._lock:
            self._stop()

    def end(self) -> None:
        """Ends the process, for good."""
        with self._lock:
            self._ended = True
            self._stop()

    def _running(self) -> subprocess.Popen[str]:
        with self._lock:
            if self._ended:
                raise Ended
            if self._child is None:
                self._child = subprocess.Popen([sys.executable, "-m", "edgecomp.sweep.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                               text=True, start_new_session=True)
                self._tell(self._child, self._start)
            return self._child

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()

    @staticmethod
    def _tell(child: subprocess.Popen[str], line: dict[str, Any]) -> None:
        assert child.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and its last line says why
            child.stdin.write(json.dumps(line) + "\n")
            child.stdin.flush()


def together(works: Sequence[Callable[[], None]], processes: Sequence[Process]) -> None:
    """Runs each work in a thread of its own. However they end, by Ctrl-C too, the processes that they ask end with them."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)
    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not errors:
            for thread in threads:
                thread.join(0.1)  # without a limit Ctrl-C would wait for the end, too
    finally:
        for process in processes:
            process.end()
    if errors:
        raise errors[0]
