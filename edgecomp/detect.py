"""The profile of the machine at hand: what the system says of it, and two figures that are measured."""
from __future__ import annotations

import dataclasses
import json
import platform
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgecomp.devices import Cpu, Device, Memory, Peaks, Sources
from edgecomp.doctor import machine

COPY_BYTES = 256 * 2**20  # beyond any cache
MATRIX = 1536
REPEATS = 5
VECTORS = (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("sve", "SVE"), ("asimd", "NEON"), ("neon", "NEON"))  # by flags, the widest first


def detect() -> Device:
    """This machine's CPU and memory. Bandwidth and fp32 peak are the best of a few runs of numpy, so they are what numpy reaches, no more."""
    here = machine()
    bandwidth, peak = copy_bandwidth(), matrix_rate()
    chip, how = here["cpu"], "measured here by numpy: "
    name = re.sub(r"[^a-z0-9]+", "-", f"{chip} {here['cores']} cores".lower()).strip("-")
    return Device(
        name, f"{chip}, {here['cores']} cores", "CPU", Memory("not known", round(here["memory_bytes"] / 2**30, 2), False, round(bandwidth / 1e9, 1)),
        Peaks(fp32_tflops=round(peak / 1e12, 4)),
        Sources((f"{here['system']}, /proc/cpuinfo; bandwidth: {how}copying {COPY_BYTES >> 20} MiB, read and written bytes, the best of {REPEATS}",),
                (f"fp32: {how}a product of two {MATRIX} x {MATRIX} matrices, the best of {REPEATS}",)),
        cpu=Cpu(chip, platform.machine(), here["cores"], vector()))


def vector() -> str:
    """The widest vector instructions that the system names, 'scalar' where it names none."""
    try:
        said = Path("/proc/cpuinfo").read_text().lower()
    except OSError:
        return "not known"
    flags = set(re.findall(r"[a-z0-9_]+", next((line for line in said.splitlines() if line.startswith(("flags", "features"))), "")))
    return next((name for flag, name in VECTORS if flag in flags), "scalar")


def copy_bandwidth() -> float:
    """Bytes a second that one thread's large copy reads and writes."""
    source = np.ones(COPY_BYTES // 8)
    goal = np.empty_like(source)
    return 2 * COPY_BYTES / best(lambda: np.copyto(goal, source))


def matrix_rate() -> float:
    """Operations a second of a large product in fp32, on all the threads that numpy takes."""
    a = np.random.default_rng(0).random((MATRIX, MATRIX), np.float32)
    return 2 * MATRIX**3 / best(lambda: a @ a)


def best(run: Any) -> float:
    """Seconds of the fastest of a few runs."""
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def to_toml(device: Device) -> str:
    """A profile as its file; `devices.load` reads it back as it was."""
    return "\n".join(_lines({key: value for key, value in dataclasses.asdict(device).items() if value not in (None, ())})) + "\n"


def _lines(data: dict[str, Any]) -> Iterator[str]:
    for key, value in data.items():
        if not isinstance(value, dict):
            yield f"{key} = {_text(value)}"
    for key, value in data.items():
        if isinstance(value, dict):
            yield f"\n[{key}]"
            yield from (f"{name} = {_text(part)}" for name, part in value.items() if part not in (None, ()))


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_text, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_text(part)}" for name, part in value.items() if part not in (None, ())) + "}"
    return json.dumps(value, ensure_ascii=False)
