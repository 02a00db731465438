"""Asks a process for an engine, tells how far it is, and ends it with whoever asked."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from edgecomp.build.order import Order
from edgecomp_runtime.errors import EdgecompError


@dataclass(frozen=True)
class Result:
    """What a build gave and took. Anonymous memory is what cannot be dropped: without pages of mapped files, which resident memory counts."""
    seconds: float
    engine_bytes: int
    peak_anonymous_bytes: int
    peak_resident_bytes: int
    layers: int
    version: str
    notes: tuple[str, ...] = ()


def build_engine(job: Mapping[str, Any], tick: Callable[[str, int, int], None]) -> Result:
    """Builds one engine in a process of its own. Ctrl-C ends that process; whatever ends it, nothing half written stays.

    Args:
        job: what to build: the fields of `edgecomp.build.order.Order`.
        tick: is called with a phase, the steps done and all steps (0: unknown). Within a phase steps only grow.

    Raises:
        EdgecompError: it could not be built, or the process was killed; what it had taken by then is in the message.
    """
    order = Order(**job)
    child = subprocess.Popen([sys.executable, "-m", "edgecomp.build.engine", "/dev/stdin", str(os.getpid())], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert child.stdin and child.stdout and child.stderr
    try:
        with suppress(BrokenPipeError), child.stdin as file:  # one that has ended says why
            file.write(order.to_json())
        last = _listen(child, tick)
        said = child.stderr.read().splitlines()  # of the time before it had a log
        code = child.wait()
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
        child.stderr.close()
        for path in order.partial(child.pid):
            path.unlink(missing_ok=True)
    if "seconds" in last and code == 0:
        return Result(**{**last, "notes": tuple(last["notes"])})
    raise EdgecompError(last.get("error") or _ended(order, code, last, said))


def _listen(child: subprocess.Popen[str], tick: Callable[[str, int, int], None]) -> dict[str, Any]:
    """The last line, or the peaks of memory where the process did not get so far."""
    last: dict[str, Any] = {}
    assert child.stdout is not None
    for line in child.stdout:
        try:
            said = json.loads(line)
        except ValueError:
            continue  # cut off by its end
        if "phase" in said:
            tick(said["phase"], said["step"], said["steps"])
        else:
            last = said
    return last


def _ended(order: Order, code: int, last: dict[str, Any], said: list[str]) -> str:
    peak = f"; it had taken {last['peak_anonymous_bytes'] / 2**20:.0f} MiB by then" if "peak_anonymous_bytes" in last else ""
    if code == -signal.SIGKILL:
        return (f"the process that built {order.graph} was killed, as the system does when memory is short{peak}: end other programs, add swap, or "
                "build on a machine with more memory (about twice the engine is needed)")
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    reason = next((line for line in reversed(said) if line.strip()), "")
    return f"the process that built {order.graph} ended {how}{peak}{': ' + reason if reason else ''}" + (f" (see {order.log})" if order.log else "")
