"""This process's memory, with the name of the meter that read it."""
from __future__ import annotations

import sys
from pathlib import Path


def peak() -> tuple[int, str]:
    """Peak resident bytes of this process so far, and what measured them."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024, "VmHWM"
    except OSError:
        pass
    import resource
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used * (1 if sys.platform == "darwin" else 1024), "ru_maxrss"


def proportional(pid: int | str = "self") -> int:
    """Proportional set size of a process in bytes, now: shared pages count by their part. Linux only; OSError elsewhere."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError("smaps_rollup has no Pss line")
