"""What a build takes while it runs, and its end before its time: TensorRT is in its own code for minutes, where Python hears no signal."""
from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SECONDS = 0.02  # between two looks at memory
NEWS = 2**26  # bytes more than last said are worth saying


class Watch(threading.Thread):
    """Samples this process's memory, and ends the process on a signal or when its parent has gone; then nothing half written stays.

    To be made before any other thread: signals are then kept from all of them, and this one takes them.

    Args:
        say: is called with the peaks each time they have grown.
        leftovers: files to remove where the process has to end.
        parent: the process to end with; None for none.
    """

    def __init__(self, say: Callable[..., None], leftovers: Sequence[Path], parent: int | None):
        super().__init__(daemon=True)
        self.anonymous = self.resident = 0
        self._say, self._leftovers, self._parent, self._said = say, leftovers, parent, -NEWS
        self._signals = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        self.start()

    def run(self) -> None:
        while True:
            self.look()
            if self.anonymous > self._said + NEWS:
                self._said = self.anonymous
                self._say(peak_anonymous_bytes=self.anonymous, peak_resident_bytes=self.resident)
            got = signal.sigtimedwait(self._signals, SECONDS)
            if got is not None:
                self._end(128 + got.si_signo)
            if self._parent is not None and os.getppid() != self._parent:
                self._end(1)

    def look(self) -> None:
        """Anonymous memory at this moment, and the resident memory's peak as the kernel has it."""
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        self.anonymous = max(self.anonymous, int(fields["RssAnon"].split()[0]) * 1024)
        self.resident = int(fields["VmHWM"].split()[0]) * 1024

    def _end(self, code: int) -> None:
        for path in self._leftovers:
            path.unlink(missing_ok=True)
        os._exit(code)
