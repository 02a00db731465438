"""Device profiles: what a device has, in plain numbers with their units in the name and their sources beside them.

A profile is one TOML file, `profiles/<id>.toml`; its tables are the dataclasses below, field by field. A field that
nobody has published is left out, and is None here. Numbers are addressed by dotted names, `peaks.fp16_tflops` or
`power_modes.15W.clock_mhz`; `sources.uncertain` and `sources.derived` are lists of such names.
"""
from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecomp_runtime.errors import BundleError, EdgecompError, UnknownNameError
from edgecomp_runtime.typed import build

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = Path(__file__).parent
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")  # enum ComputeCapability of TensorRT for RTX 1.7, which builds for them without a GPU


# What a number of a profile can be: ten times and more of what the largest accelerators have (NVIDIA's B200: 8 TB/s, 9 dense PFLOPS in fp4, 1 kW;
# 6.2 GHz is the highest clock of a CPU that is sold), and little enough for the smallest boards, so that a value in another unit is found out
LIMITS = {"total_gib": (0.25, 1e5), "usable_gib": (0.1, 1e5), "bandwidth_gb_per_s": (0.5, 1e5), "sm_count": (1, 1e4), "cuda_cores": (1, 1e6),
          "clock_mhz": (20, 2e4), "tensor_clock_mhz": (20, 2e4), "l2_mib": (1e-3, 1e4), "cores": (1, 1e4), "watts": (0.1, 1e5),
          "power_watts": (0.1, 1e5), **{f"{name}_tflops": (1e-5, 1e6) for name in ("fp32", "fp16", "fp16_acc16", "bf16", "fp8", "fp4")},
          "int8_tops": (1e-5, 1e6)}


@dataclass(frozen=True)
class Gpu:
    """The GPU at its highest clock. `tensor_clock_mhz`: what the tensor peaks were made with, where that is another clock."""
    chip: str
    architecture: str
    compute_capability: str
    sm_count: int
    cuda_cores: int
    clock_mhz: float
    tensor_clock_mhz: float | None = None
    l2_mib: float | None = None


@dataclass(frozen=True)
class Cpu:
    """A CPU that bundles run on by themselves. `vector`: its widest instructions, as 'AVX2' or 'NEON'."""
    chip: str
    architecture: str
    cores: int
    vector: str
    clock_mhz: float | None = None


@dataclass(frozen=True)
class Memory:
    """`unified`: one memory for CPU and GPU. `usable_gib`: what the system reports as the total (MemTotal, nvidia-smi).

    Not all of that is free: a driver and its context take 0.3-0.6 GiB of a discrete card (1-1.5 with a display), and
    a Jetson's system some more (see the profile's notes).
    """
    type: str
    total_gib: float
    unified: bool
    bandwidth_gb_per_s: float
    usable_gib: float | None = None


@dataclass(frozen=True)
class Peaks:
    """Dense peaks, never sparse, of the GPU alone, or of all cores of a CPU. `fp16_tflops` accumulates in fp32, `fp16_acc16_tflops` in fp16."""
    fp32_tflops: float | None = None
    fp16_tflops: float | None = None
    fp16_acc16_tflops: float | None = None
    bf16_tflops: float | None = None
    int8_tops: float | None = None
    fp8_tflops: float | None = None
    fp4_tflops: float | None = None


@dataclass(frozen=True)
class PowerMode:
    """One power mode (nvpmodel) and what it lowers. None: not published; the device's own number is an upper bound."""
    name: str
    watts: float | None = None
    sm_count: int | None = None
    clock_mhz: float | None = None
    bandwidth_gb_per_s: float | None = None
    default: bool = False


@dataclass(frozen=True)
class Software:
    """One release that runs on the device, as `JetPack 6.2`, and the versions it brings."""
    release: str
    cuda: str
    tensorrt: str
    l4t: str | None = None
    cudnn: str | None = None


@dataclass(frozen=True)
class Sources:
    """Where the numbers are from: `spec` is for gpu and memory, the others are for the field or table of their name.

    uncertain: numbers that sources disagree on, or that are estimates. derived: numbers that were computed, not read.
    """
    spec: tuple[str, ...]
    peaks: tuple[str, ...]
    power: tuple[str, ...] = ()
    usable_memory: tuple[str, ...] = ()
    software: tuple[str, ...] = ()
    uncertain: tuple[str, ...] = ()
    derived: tuple[str, ...] = ()


@dataclass(frozen=True)
class Device:
    """One device: a GPU with what belongs to it, or a CPU. `power_watts` is the card's TDP or the module's maximum.

    mode: the power mode that its numbers are of; None: they are the device's highest, and no profile says one.
    """
    id: str
    name: str
    family: str
    memory: Memory
    peaks: Peaks
    sources: Sources
    power_watts: float | None = None
    gpu: Gpu | None = None
    cpu: Cpu | None = None
    power_modes: tuple[PowerMode, ...] = ()
    software: tuple[Software, ...] = ()
    notes: tuple[str, ...] = ()
    mode: PowerMode | None = None

    @property
    def label(self) -> str:
        """The id as a user says it, with the mode."""
        return f"{self.id}@{self.mode.name}" if self.mode else self.id

    def numbers(self) -> dict[str, float]:
        """Every number that the profile has, by its dotted name."""
        return dict(_numbers(dataclasses.asdict(self), ""))

    @property
    def compute_capability(self) -> str:
        """Of the GPU, as '8.7'; '' where there is none."""
        return self.gpu.compute_capability if self.gpu else ""

    def is_uncertain(self, name: str) -> bool:
        """Whether the number of that dotted name is an estimate or disputed."""
        return name in self.sources.uncertain


def profile_folder() -> Path:
    """Where edgecomp's own profiles are: package data where it is installed, `profiles/` beside the package in a checkout."""
    packaged = PACKAGE / "_data" / "profiles"
    return packaged if packaged.is_dir() else PACKAGE.parent / "profiles"


def own_folder() -> Path:
    """Where the user's own profiles and calibrations are: EDGECOMP_PROFILES, else the system's folder for a user's data."""
    if given := os.environ.get("EDGECOMP_PROFILES"):
        return Path(given)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "edgecomp" / "profiles"


def names(folders: Sequence[Path] | None = None) -> list[str]:
    """The ids of all known devices, sorted."""
    return sorted(_files(folders))


def load(name: str, folders: Sequence[Path] | None = None) -> Device:
    """The profile of that id, from the first of the folders that has it (default: the user's, then edgecomp's own); or of that
    file, where the name ends in .toml. Where only one id goes on behind a name, as `rtx-3060-12gb` does behind `rtx-3060`, the name is enough.
    `ID@MODE` is the device in that power mode (`edgecomp.power_modes`).

    Raises UnknownNameError where there is none, EdgecompError where it cannot be read or does not hold together.
    """
    name, at, mode = name.rpartition("@") if "@" in Path(name).name else (name, "", "")
    if at:
        from edgecomp.power_modes import in_mode  # it knows devices itself
        return in_mode(load(name, folders), mode)
    files = _files(folders)
    longer = [known for known in files if known.startswith(f"{name}-")]
    if name not in files and len(longer) == 1:
        name, = longer
    if name.endswith(".toml"):
        files[name] = Path(name)
    if name not in files:
        raise UnknownNameError("device", name, files)
    path = files[name]
    try:
        device: Device = build(Device, tomllib.loads(path.read_text(encoding="utf-8")), str(path))
    except BundleError as error:
        raise EdgecompError(str(error)) from None
    except (OSError, ValueError) as error:
        raise EdgecompError(f"{path}: not a readable TOML file ({error})") from None
    if problem := next(_problems(device, path), None):
        raise EdgecompError(f"{path}: {problem}")
    return device


def _files(folders: Sequence[Path] | None) -> dict[str, Path]:
    searched = [own_folder(), profile_folder()] if folders is None else folders
    return {path.stem: path for folder in reversed(searched) for path in Path(folder).glob("*.toml")}


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _numbers(part, f"{name}.{key}" if name else key)
    elif isinstance(value, (list, tuple)):
        for part in value:
            if isinstance(part, dict) and "name" in part:
                yield from _numbers(part, f"{name}.{part['name']}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, value


def _problems(device: Device, path: Path) -> Iterator[str]:
    """What the types cannot say."""
    if device.id != path.stem:
        yield f"id is {device.id!r}, but the file is named {path.stem!r}: they must be the same"
    if (device.gpu is None) == (device.cpu is None):
        yield "a device has either a table gpu or a table cpu"
    if device.gpu and not re.fullmatch(r"\d+\.\d", device.gpu.compute_capability):
        yield f"gpu: compute_capability: {device.gpu.compute_capability!r} is not of the form '8.7'"
    if device.gpu and device.power_watts is None:
        yield "power_watts is missing: the card's TDP or the module's maximum"
    if repeated := [name for name, count in Counter(mode.name for mode in device.power_modes).items() if count > 1]:
        yield f"power_modes: {repeated[0]!r} is there more than once: give each mode its own name"
    if device.mode:
        yield "mode is not for a profile: it is chosen behind the id, as in ID@15W"
    numbers = device.numbers()
    for name, value in numbers.items():
        least, most = LIMITS[name.rsplit(".", 1)[-1]]
        if not 0 < value < math.inf:
            yield f"{name} is {value}: a positive number is expected; leave out what is not known"
        elif not least <= value <= most:
            yield f"{name} is {value:g}, and nothing has that: {least:g} to {most:g} is expected; look at the unit, which is in the name"
    if device.gpu:
        own = {"sm_count": device.gpu.sm_count, "clock_mhz": device.gpu.clock_mhz, "bandwidth_gb_per_s": device.memory.bandwidth_gb_per_s}
        for mode in device.power_modes:
            for field, most in own.items():
                if (getattr(mode, field) or 0) > most:
                    yield f"power_modes.{mode.name}.{field} {getattr(mode, field):g} is more than the device's own {most:g}"
    if (device.memory.usable_gib or 0) > device.memory.total_gib:
        yield f"memory.usable_gib {device.memory.usable_gib} is more than total_gib {device.memory.total_gib}"
    for field in ("spec", "peaks", *(("power",) if device.power_watts else ())):
        if not any(line.strip() for line in getattr(device.sources, field)):
            yield f"sources: {field} is empty: say where the numbers are from"
    for field in ("uncertain", "derived"):
        if unknown := [name for name in getattr(device.sources, field) if name not in numbers]:
            yield f"sources: {field} names {unknown[0]!r}, which is no number of this profile"
