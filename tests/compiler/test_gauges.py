"""Clocks, power and temperature from a system's files: a folder laid out as the kernel documents it, with the numbers worked out by hand."""
from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from edgecomp import gauges
from edgecomp.gauges import Reading, between, read

# A Jetson's power monitor and GPU clock, a desktop's package, a card's sensors, and files that cannot be read as numbers
FILES = {
    "class/hwmon/hwmon0/name": "ina3221", "class/hwmon/hwmon0/in1_label": "VDD_IN", "class/hwmon/hwmon0/in1_input": "4960",
    "class/hwmon/hwmon0/curr1_input": "1250", "class/hwmon/hwmon0/in2_input": "5000", "class/hwmon/hwmon0/curr3_input": "10",
    "class/hwmon/hwmon1/name": "k10temp", "class/hwmon/hwmon1/temp1_label": "Tctl", "class/hwmon/hwmon1/temp1_input": "61500",
    "class/hwmon/hwmon1/temp2_input": "asleep", "class/hwmon/hwmon2/name": "amdgpu", "class/hwmon/hwmon2/power1_average": "35000000",
    "class/hwmon/hwmon2/freq1_label": "sclk", "class/hwmon/hwmon2/freq1_input": "2400000000",
    "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1500000", "devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "2500000",
    "class/devfreq/17000000.gpu/cur_freq": "624750000",
    "class/thermal/thermal_zone0/type": "cpu-thermal", "class/thermal/thermal_zone0/temp": "48250",
    "class/powercap/intel-rapl:0/name": "package-0", "class/powercap/intel-rapl:0/energy_uj": "999000000",
    "class/powercap/intel-rapl:0/max_energy_range_uj": "1000000000",
    "class/powercap/intel-rapl:0:0/name": "core", "class/powercap/intel-rapl:0:0/energy_uj": "5",
    "class/powercap/intel-rapl:0:0/max_energy_range_uj": "9",
}
VALUES = {
    ("ina3221 VDD_IN", "W"): 4.96 * 1.25, ("k10temp Tctl", "°C"): 61.5, ("amdgpu power1", "W"): 35.0, ("amdgpu sclk", "MHz"): 2400.0,
    ("CPU clock", "MHz"): 2000.0, ("17000000.gpu clock", "MHz"): 624.75, ("cpu-thermal", "°C"): 48.25,
}


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system with these files, and without nvidia-smi."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name, text in FILES.items():
        path = tmp_path / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return tmp_path / "sys"


def test_gauges_of_a_system(system: Path) -> None:
    found = read(system)
    assert found.values == pytest.approx(VALUES)
    assert found.counters == {"package-0": (999.0, 1000.0)}


def test_before_and_after(system: Path) -> None:
    before = read(system)
    (system / "class/thermal/thermal_zone0/temp").write_text("52000")
    (system / "class/hwmon/hwmon1/temp1_input").unlink()
    (system / "class/powercap/intel-rapl:0/energy_uj").write_text("20000000")  # 1 J to the end of the counter, and 20 more
    after = dataclasses.replace(read(system), at=before.at + 3)
    rows = {row["name"]: row for row in between(before, after)}
    assert rows["cpu-thermal"] == {"name": "cpu-thermal", "unit": "°C", "before": 48.25, "after": 52.0, "kind": "measured"}
    assert (rows["k10temp Tctl"]["before"], rows["k10temp Tctl"]["after"]) == (61.5, None)
    assert rows["package-0, mean power between"] == {"name": "package-0, mean power between", "unit": "W", "before": None,
                                                     "after": pytest.approx(7.0), "kind": "measured"}
    assert len(rows) == len(VALUES) + 1


def test_a_system_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = read(tmp_path / "nothing")
    assert not found.values and not found.counters and between(found, found) == []


def test_energy_of_a_reading_alone_is_no_power() -> None:
    reading = Reading(1.0, {}, {"package-0": (5.0, 9.0)})
    assert between(reading, reading) == []
    assert between(Reading(0.0, {}, {}), reading) == []


def test_cards_as_nvidia_smi_tells_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$*" = "--query-gpu=clocks.sm,power.draw,temperature.gpu --format=csv,noheader,nounits" ] || exit 2\n'
                    'echo "1980, 112.53, 41"; echo "345, [N/A], 30"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read(tmp_path / "nothing").values == {
        ("GPU 0 clock", "MHz"): 1980.0, ("GPU 0 power", "W"): 112.53, ("GPU 0 temperature", "°C"): 41.0, ("GPU 1 clock", "MHz"): 345.0,
        ("GPU 1 temperature", "°C"): 30.0}


@pytest.mark.parametrize("script", ["exit 1", "exec /bin/sleep 5"])
def test_an_nvidia_smi_that_fails_or_hangs_tells_nothing(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gauges, "WAIT", 0.2)
    assert not read(tmp_path / "nothing").values
