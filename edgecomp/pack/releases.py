"""Which JetPack release an archive is for: each brings one TensorRT, and graphs are lowered for that one."""
from __future__ import annotations

import re
import sys
from dataclasses import dataclass

from edgecomp.build.toolchain import Toolchain, dialect_of
from edgecomp.devices import Device, Software
from edgecomp.dialects.targets import TARGETS
from edgecomp_runtime.errors import EdgecompError, UnknownNameError

BACKEND = "tensorrt"


@dataclass(frozen=True)
class Release:
    """One JetPack release of a board, by its number, as `6.2`."""
    jetpack: str
    software: Software

    @property
    def dialect(self) -> str:
        return dialect_of(BACKEND, self.software.tensorrt)

    @property
    def versions(self) -> tuple[str, str]:
        """The TensorRT versions that take its graphs: from, and up to but not with; '' is no end."""
        known = sorted((name.removeprefix(f"{BACKEND}-") for name in TARGETS if name[len(BACKEND) + 1].isdigit()), key=numbers)
        mine = known.index(self.dialect.removeprefix(f"{BACKEND}-"))
        return known[mine], known[mine + 1] if mine + 1 < len(known) else ""

    def toolchain(self, device: Device) -> Toolchain:
        """What will build on the board."""
        return Toolchain(BACKEND, BACKEND, self.software.tensorrt, device.compute_capability)


def releases(device: Device) -> list[Release]:
    """The JetPack releases of a board that graphs can be lowered for, oldest first.

    Raises EdgecompError where the device is no Jetson, or has no such release.
    """
    if device.family != "Jetson":
        raise EdgecompError(f"{device.id} is not a Jetson: `edgecomp build BUNDLE --device {device.id}` builds its engines, here or on the machine "
                            "that has it")
    every = sorted((Release(s.release.removeprefix("JetPack "), s) for s in device.software), key=lambda release: numbers(release.jetpack))
    if found := [release for release in every if not _too_old(release)]:
        return found
    newest = f"its newest JetPack, {every[-1].jetpack}, has TensorRT {every[-1].software.tensorrt}" if every else "no JetPack of it is known"
    raise EdgecompError(f"{device.id} is too old: {newest}, and graphs are written for TensorRT 8.6 and newer")


def choose(device: Device, jetpack: str | None) -> Release:
    """The release of that number, or the newest. Raises EdgecompError, UnknownNameError where the board has not got it."""
    found = releases(device)
    if jetpack is None:
        return found[-1]
    wanted = re.sub(r"(?i)^jetpack\s*", "", jetpack.strip())
    for release in found:
        if release.jetpack == wanted:
            return release
    for software in device.software:
        if software.release == f"JetPack {wanted}":
            raise EdgecompError(f"JetPack {wanted} has TensorRT {software.tensorrt}, and graphs are written for 8.6 and newer: flash the board with "
                                f"JetPack {', '.join(release.jetpack for release in found)}")
    raise UnknownNameError(f"JetPack release of {device.id}", jetpack, [release.jetpack for release in found])


def numbers(version: str) -> tuple[int, ...]:
    """'6.2.1' as numbers, for comparing; '5.1.x' is the newest of 5.1."""
    return tuple(int(part) if part.isdecimal() else sys.maxsize for part in version.split("."))


def _too_old(release: Release) -> bool:
    try:
        return not release.dialect
    except EdgecompError:
        return True
