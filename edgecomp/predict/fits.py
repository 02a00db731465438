"""Whether memory fits a device beside its system, and what would make it fit."""
from __future__ import annotations

from dataclasses import dataclass

from edgecomp.devices import Device

GIB = 2**30
# What the system keeps, in GiB: without a desktop, and with one. Jetson: 6.9 and 5.2 of 7.44 are free on an Orin Nano (its profile's
# notes); a card: its driver and context (edgecomp.devices.Memory).
SYSTEM_GIB = {"unified": (0.54, 2.24), "card": (0.6, 1.5)}


@dataclass(frozen=True)
class Verdict:
    """Whether memory fits a device: 'fits' beside a desktop, 'tight' without one only, or 'does not fit'. `way_out` names the largest part."""
    verdict: str
    needed_bytes: int
    usable_bytes: int
    largest: str
    way_out: str


def kept_by_system(device: Device) -> tuple[int, int]:
    """Bytes that the system keeps without a desktop, and with one."""
    least, most = SYSTEM_GIB["card" if device.gpu is not None and not device.memory.unified else "unified"]
    return round(least * GIB), round(most * GIB)


def judge(parts: dict[str, int], device: Device) -> Verdict:
    """Whether parts of memory fit a device beside its system, and what would make them fit."""
    usable = round((device.memory.usable_gib or device.memory.total_gib) * GIB)
    least, most = kept_by_system(device)
    needed, largest = sum(parts.values()), max(parts, key=lambda part: parts[part])
    if needed + most <= usable:
        return Verdict("fits", needed, usable, largest, "")
    short = needed + least - usable
    share = f"{largest} {parts[largest] / GIB:.2f} of {needed / GIB:.2f} GiB"
    if short <= 0:
        return Verdict("tight", needed, usable, largest, f"{share}; it fits where no desktop runs")
    way = way_out(largest)
    enough = "" if parts[largest] > short else ", which alone is not enough"
    return Verdict("does not fit", needed, usable, largest, f"{short / GIB:.2f} GiB short, {share}: {way}{enough}")


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
