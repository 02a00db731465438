"""Whether memory fits a device beside its system, and what would make it fit."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgecomp.devices import Device

GIB = 2**30
# What the system keeps, in GiB: without a desktop, and with one. Jetson: 6.9 and 5.2 of 7.44 are free on an Orin Nano (its profile's
# notes); a card: its driver and context (edgecomp.devices.Memory).
SYSTEM_GIB = {"unified": (0.54, 2.24), "card": (0.6, 1.5)}


@dataclass(frozen=True)
class Verdict:
    """Whether memory fits a device: 'fits' beside a desktop with all of its interval, 'does not fit' without one with any of it, or 'tight'.

    usable_bytes: what the device has beside its system, without a desktop. largest: the largest part. way_out: what would make it fit, ''
    where it does.
    """
    verdict: str
    usable_bytes: int
    largest: str
    way_out: str


def kept_by_system(device: Device) -> tuple[int, int]:
    """Bytes that the system keeps without a desktop, and with one."""
    least, most = SYSTEM_GIB["card" if device.gpu is not None and not device.memory.unified else "unified"]
    return round(least * GIB), round(most * GIB)


def judge(parts: Mapping[str, float], device: Device, low: float | None = None, high: float | None = None) -> Verdict:
    """Whether parts of memory fit a device beside its system, and what would make them fit; `low` to `high` is the interval of their sum."""
    has = (device.memory.usable_gib or device.memory.total_gib) * GIB
    least, most = kept_by_system(device)
    needed, largest = sum(parts.values()), max(parts, key=lambda part: parts[part])
    low, high = needed if low is None else low, needed if high is None else high
    usable = has - least
    verdict = "fits" if high <= has - most else "does not fit" if low > usable else "tight"
    share = f"{largest} {parts[largest] / GIB:.2f} of {needed / GIB:.2f} GiB"
    if verdict == "fits":
        way = ""
    elif needed <= usable and high > usable:
        way = f"{share}; it may need up to {high / GIB:.2f} GiB: {way_out(largest)}"
    elif needed <= usable:
        way = f"{share}; it fits where no desktop runs"
    else:
        short = needed - usable
        way = f"{short / GIB:.2f} GiB short, {share}: {way_out(largest)}{'' if parts[largest] > short else ', which alone is not enough'}"
    return Verdict(verdict, round(usable), largest, way)


def way_out(largest: str) -> str:
    """What would make it fit, where this part of the memory is the largest."""
    return WAYS_OUT.get(largest.split()[-1], "a smaller model")


WAYS_OUT = {
    "weights": "weights of fewer bits, a smaller model, or a device with more memory",
    "cache": "a smaller --context, or fewer visual tokens (--keep)",
    "activations": "fewer visual tokens (--keep), a smaller --image-size, or fewer tiles",
    "runtime": "a device with more memory",
    "buffers": "a smaller --context, or fewer --max-images",
}
