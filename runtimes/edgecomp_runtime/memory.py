"""This process's memory, with the name of the meter that read it."""
from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import numpy as np

LARGE = 2 * 2**20  # bytes of a large page, on x86 and on ARM with pages of 4 KiB
COLLAPSE = 25  # MADV_COLLAPSE, linux/mman.h


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


def settle() -> None:
    """Returns to the system what was freed while a model was loaded, and puts what is held into large pages. Other threads may go on.

    A token reads all weights; in pages of 4 KiB a tenth of its time goes by in finding them. By glibc's malloc_trim and Linux's
    MADV_COLLAPSE (from 6.1); elsewhere nothing happens.
    """
    try:
        library = ctypes.CDLL(None)
        library.malloc_trim(0)
        library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for address in _filled_stretches():
            library.madvise(address, LARGE, COLLAPSE)  # one that is not to be had stays as it is
    except (OSError, AttributeError, TypeError, ValueError):
        return


def _filled_stretches() -> list[int]:
    """Where the private memory of this process could have large pages without becoming much larger: at least half of each is there."""
    found: list[int] = []
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pages:
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            place, access, _, _, file, *name = line.split()
            if access != "rw-p" or file != "0" or name not in ([], ["[heap]"]):
                continue
            first, end = (int(address, 16) for address in place.split("-"))
            first, end = -(-first // LARGE) * LARGE, end // LARGE * LARGE
            pages.seek(first // mmap.PAGESIZE * 8)
            entries = np.frombuffer(pages.read(max(end - first, 0) // mmap.PAGESIZE * 8), np.uint64)
            there = (entries >> np.uint64(63)).reshape(-1, LARGE // mmap.PAGESIZE).mean(1)  # the bit that says that a page is in memory
            found += (first + LARGE * np.flatnonzero(there >= 0.5)).tolist()
    return found
