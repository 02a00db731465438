"""Clocks, power and temperature, where the system tells them: Linux's sysfs, and nvidia-smi where there is one.

Read before something is measured and after it. Many systems tell nothing, virtual machines above all, and some counters only to root.
"""
from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

SYSTEM = Path("/sys")
# hwmon, https://docs.kernel.org/hwmon/sysfs-interface.html: begin of the file's name -> (unit, units of the file in one of it)
HWMON = {"temp": ("°C", 1e3), "power": ("W", 1e6), "freq": ("MHz", 1e6)}
# what nvidia-smi is asked for -> (name, unit), `nvidia-smi --help-query-gpu`
NVIDIA = {"clocks.sm": ("clock", "MHz"), "power.draw": ("power", "W"), "temperature.gpu": ("temperature", "°C")}
WAIT = 10  # seconds for nvidia-smi


@dataclass(frozen=True)
class Reading:
    """What the gauges said at one moment. values: by (name, unit). counters: joules so far, and what they go up to before they start again."""
    at: float
    values: Mapping[tuple[str, str], float]
    counters: Mapping[str, tuple[float, float]]


def read(system: Path = SYSTEM) -> Reading:
    """All gauges now. One that cannot be read is not there."""
    values = {}
    for part in (_clocks, _hwmon, _thermal):
        values.update({(name, unit): value for name, unit, value in part(system)})
    values.update({(name, unit): value for name, unit, value in _nvidia()})
    return Reading(time.monotonic(), values, dict(_energy(system)))


def between(before: Reading, after: Reading) -> list[dict[str, Any]]:
    """Both readings side by side, as JSON. Of a counter of energy the mean power between them, as `after`; `before` is None there."""
    found = [{"name": name, "unit": unit, "before": before.values.get((name, unit)), "after": after.values.get((name, unit)), "kind": "measured"}
             for name, unit in dict.fromkeys([*before.values, *after.values])]
    for name, (joules, most) in after.counters.items():
        if name in before.counters and after.at > before.at:
            spent = joules - before.counters[name][0]
            watts = (spent if spent >= 0 else spent + most) / (after.at - before.at)
            found.append({"name": f"{name}, mean power between", "unit": "W", "before": None, "after": watts, "kind": "measured"})
    return found


def _text(path: Path) -> str:
    """What a file says; '' where it cannot be read: some sensors are asleep, some are root's."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(path: Path) -> float | None:
    try:
        return float(_text(path))
    except ValueError:
        return None


def _clocks(system: Path) -> Iterator[tuple[str, str, float]]:
    """The mean over the CPU's cores, and devices that scale theirs, as a Jetson's GPU does."""
    cores = [clock / 1e3 for path in sorted(system.glob("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")) if (clock := _number(path))]
    if cores:
        yield "CPU clock", "MHz", fmean(cores)
    for path in sorted(system.glob("class/devfreq/*/cur_freq")):
        if clock := _number(path):
            yield f"{path.parent.name} clock", "MHz", clock / 1e6


def _hwmon(system: Path) -> Iterator[tuple[str, str, float]]:
    """Sensors of the board. An INA3221, as Jetsons have it, tells voltage and current a rail: together its power."""
    for chip in sorted(system.glob("class/hwmon/hwmon*")):
        name = _text(chip / "name") or chip.name
        for kind, (unit, scale) in HWMON.items():
            for path in sorted([*chip.glob(f"{kind}[0-9]*_input"), *chip.glob(f"{kind}[0-9]*_average")]):
                if (value := _number(path)) is not None:
                    sensor = path.name.rpartition("_")[0]
                    yield f"{name} {_text(chip / f'{sensor}_label') or sensor}", unit, value / scale
        for path in sorted(chip.glob("curr[0-9]*_input")):
            rail = path.name.removeprefix("curr").removesuffix("_input")
            volts, amperes = _number(chip / f"in{rail}_input"), _number(path)
            if volts is not None and amperes is not None:
                yield f"{name} {_text(chip / f'in{rail}_label') or f'rail {rail}'}", "W", volts / 1e3 * amperes / 1e3


def _thermal(system: Path) -> Iterator[tuple[str, str, float]]:
    for zone in sorted(system.glob("class/thermal/thermal_zone*")):
        if (value := _number(zone / "temp")) is not None:
            yield _text(zone / "type") or zone.name, "°C", value / 1e3


def _energy(system: Path) -> Iterator[tuple[str, tuple[float, float]]]:
    """Of Intel's and AMD's packages (powercap); the parts within a package are counted in it."""
    for zone in sorted(system.glob("class/powercap/intel-rapl:*")):
        energy, most = _number(zone / "energy_uj"), _number(zone / "max_energy_range_uj")
        if zone.name.count(":") == 1 and energy is not None and most is not None:
            yield _text(zone / "name") or zone.name, (energy / 1e6, most / 1e6)


def _nvidia() -> Iterator[tuple[str, str, float]]:
    """Of NVIDIA's cards; what one does not tell is '[N/A]'."""
    try:
        said = subprocess.run(["nvidia-smi", f"--query-gpu={','.join(NVIDIA)}", "--format=csv,noheader,nounits"], capture_output=True, text=True,
                              timeout=WAIT, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return
    for number, line in enumerate(said.splitlines()):
        for (name, unit), cell in zip(NVIDIA.values(), line.split(",")):
            try:
                yield f"GPU {number} {name}", unit, float(cell)
            except ValueError:
                continue
