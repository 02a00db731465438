"""Device profiles: what they say agrees with what is published, and one that is off is refused in a clear line.

The figures here are from NVIDIA's data sheets and architecture whitepapers, not from the profiles.
"""
from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import psutil
import pytest
import tomllib
from click.testing import CliRunner

from edgecomp import devices
from edgecomp.cli import main
from edgecomp.detect import to_toml
from edgecomp_runtime.errors import EdgecompError, UnknownNameError

# id -> compute capability, SMs, GiB, GB/s
PUBLISHED = {
    "jetson-orin-nano-8gb": ("8.7", 8, 8, 68),
    "jetson-orin-nano-8gb-super": ("8.7", 8, 8, 102),
    "jetson-orin-nx-16gb": ("8.7", 8, 16, 102.4),
    "jetson-agx-orin-64gb": ("8.7", 16, 64, 204.8),
    "jetson-agx-xavier": ("7.2", 8, 32, 136.5),
    "jetson-agx-thor": ("11.0", 20, 128, 273),
    "dgx-spark-gb10": ("12.1", 48, 128, 273),
    "rtx-3060-12gb": ("8.6", 28, 12, 360),
    "rtx-3090": ("8.6", 82, 24, 936),
    "rtx-4090": ("8.9", 128, 24, 1008),
    "rtx-5090": ("12.0", 170, 32, 1792),
    "rtx-a6000": ("8.6", 84, 48, 768),
    "t4": ("7.5", 40, 16, 320),
    "l4": ("8.9", 58, 24, 300),
    "a100-80gb-sxm": ("8.0", 108, 80, 2039),
    "h100-80gb-sxm": ("9.0", 132, 80, 3350),
    "h200-sxm": ("9.0", 132, 141, 4800),
}
# id -> dense peaks: whitepaper totals, or half of what is advertised with sparsity (rounded there)
PUBLISHED_PEAKS: dict[str, dict[str, float]] = {
    "rtx-3090": {"fp16_tflops": 71, "fp16_acc16_tflops": 142, "int8_tops": 284},
    "rtx-4090": {"fp16_tflops": 165.2, "fp16_acc16_tflops": 330.3, "int8_tops": 660.6, "fp8_tflops": 330.3},
    "rtx-5090": {"fp16_tflops": 209.5, "fp16_acc16_tflops": 419, "int8_tops": 838, "fp8_tflops": 419, "fp4_tflops": 3352 / 2},
    "t4": {"fp16_tflops": 65, "int8_tops": 130},
    "a10": {"fp16_tflops": 250 / 2, "int8_tops": 500 / 2},
    "l4": {"fp16_tflops": 242 / 2, "int8_tops": 485 / 2, "fp8_tflops": 485 / 2},
    "a100-80gb-sxm": {"fp32_tflops": 19.5, "fp16_tflops": 312, "bf16_tflops": 312, "int8_tops": 624},
    "h100-80gb-sxm": {"fp32_tflops": 67, "fp16_tflops": 989, "int8_tops": 1979, "fp8_tflops": 3958 / 2},
    "h100-80gb-pcie": {"fp32_tflops": 51, "fp16_tflops": 756, "fp8_tflops": 3026 / 2},
    "jetson-orin-nano-8gb": {"int8_tops": 40 / 2},
    "jetson-orin-nano-8gb-super": {"int8_tops": 67 / 2},
    "jetson-agx-orin-64gb": {"int8_tops": 170 / 2, "fp32_tflops": 5.3},
    "jetson-agx-thor": {"fp4_tflops": 2070 / 2, "fp8_tflops": 1035 / 2, "fp16_tflops": 517 / 2},
}
# fp16 FLOP of one SM in one clock, by compute capability (tensor cores; in pairs on CUDA cores before 7.0)
FLOP_PER_CLOCK_PER_SM = {"5.3": 512, "6.2": 512, "7.2": 1024, "7.5": 1024, "8.0": 2048, "8.6": 1024, "8.7": 2048, "8.9": 1024,
                         "9.0": 4096, "11.0": 8192, "12.0": 1024}
CUDA_CORES_PER_SM = {"7.2": 64, "7.5": 64, "8.0": 64}   # 128 elsewhere
ORINS = [name for name in devices.names() if "orin" in name]


GPUS = [name for name in devices.names() if not name.startswith("cpu-")]


@pytest.fixture(params=devices.names())
def device(request: pytest.FixtureRequest) -> devices.Device:
    return devices.load(request.param)


def test_there_are_profiles_of_every_tier() -> None:
    assert len(GPUS) >= 56 and set(PUBLISHED) | set(PUBLISHED_PEAKS) <= set(devices.names())


@pytest.mark.parametrize("name", PUBLISHED)
def test_agrees_with_the_data_sheet(name: str) -> None:
    capability, sm_count, total_gib, bandwidth_gb_per_s = PUBLISHED[name]
    device = devices.load(name)
    assert (device.gpu.compute_capability, device.gpu.sm_count, device.memory.total_gib) == (capability, sm_count, total_gib)
    assert device.memory.bandwidth_gb_per_s == pytest.approx(bandwidth_gb_per_s, rel=0.01)


@pytest.mark.parametrize(("name", "peak"), [(name, peak) for name, peaks in PUBLISHED_PEAKS.items() for peak in peaks])
def test_peaks_are_the_published_dense_ones(name: str, peak: str) -> None:
    assert getattr(devices.load(name).peaks, peak) == pytest.approx(PUBLISHED_PEAKS[name][peak], rel=0.025)


@pytest.mark.parametrize("name", GPUS)
def test_derived_peaks_follow_from_sms_and_clock(name: str) -> None:
    device = devices.load(name)
    gpu, peaks = device.gpu, device.peaks
    assert gpu.cuda_cores == gpu.sm_count * CUDA_CORES_PER_SM.get(gpu.compute_capability, 128)
    assert peaks.fp32_tflops == pytest.approx(2 * gpu.cuda_cores * gpu.clock_mhz / 1e6, rel=0.03)
    if device.id == "dgx-spark-gb10":
        return   # its peaks are ratios of the advertised FP4
    clock_mhz = gpu.tensor_clock_mhz or gpu.clock_mhz
    full = gpu.sm_count * FLOP_PER_CLOCK_PER_SM[gpu.compute_capability] * clock_mhz / 1e6
    half_rate = "GeForce" in device.family   # with fp32 accumulation
    if device.id == "l40":
        full /= 2                            # its data sheet has half of the L40S
    assert peaks.fp16_acc16_tflops == pytest.approx(full, rel=0.03)
    if peaks.fp16_tflops:
        assert peaks.fp16_tflops == pytest.approx(full / 2 if half_rate else full, rel=0.03)
        assert peaks.int8_tops == pytest.approx(2 * full, rel=0.03)
    if peaks.bf16_tflops:
        assert peaks.bf16_tflops == peaks.fp16_tflops


@pytest.mark.parametrize(("name", "a_cycle"), [("cpu-x86-8-cores", 32), ("cpu-arm-cortex-a76-4-cores", 16)])
def test_a_cpus_peak_follows_from_cores_and_clock(name: str, a_cycle: int) -> None:
    cpu, peaks = devices.load(name).cpu, devices.load(name).peaks
    assert cpu is not None and cpu.clock_mhz is not None
    assert peaks.fp32_tflops == pytest.approx(cpu.cores * cpu.clock_mhz * a_cycle / 1e6)


def test_every_number_has_a_source(device: devices.Device) -> None:
    assert device.sources.spec and device.sources.peaks and bool(device.sources.power) == (device.power_watts is not None)
    assert bool(device.sources.usable_memory) == (device.memory.usable_gib is not None)
    assert bool(device.sources.software) == bool(device.software)


def test_a_mode_never_has_more_than_its_device(device: devices.Device) -> None:
    for mode in device.power_modes:
        assert (mode.watts or 0) <= device.power_watts and (mode.sm_count or 0) <= device.gpu.sm_count
        assert (mode.clock_mhz or 0) <= device.gpu.clock_mhz
        assert (mode.bandwidth_gb_per_s or 0) <= device.memory.bandwidth_gb_per_s
    assert sum(mode.default for mode in device.power_modes) <= 1


@pytest.mark.parametrize("name", ORINS)
def test_jetpack_6_means_tensorrt_10_3(name: str) -> None:
    releases = {each.release: each for each in devices.load(name).software}
    assert releases["JetPack 6.2"].tensorrt.startswith("10.3.") and releases["JetPack 6.2"].cuda.startswith("12.6")
    assert "JetPack 7.0" not in releases   # Thor only


def test_an_estimate_is_marked() -> None:
    spark = devices.load("dgx-spark-gb10")
    assert spark.is_uncertain("peaks.fp16_tflops") and not spark.is_uncertain("memory.bandwidth_gb_per_s")


def test_a_name_that_only_one_device_goes_on_from_is_enough() -> None:
    assert devices.load("rtx-3060").id == "rtx-3060-12gb" and devices.load("rtx-4090").id == "rtx-4090"
    for several in ("jetson-orin-nano", "rtx-306", "rtx"):
        with pytest.raises(UnknownNameError):
            devices.load(several)



def test_a_power_mode_by_hand() -> None:
    """An Orin Nano at 7 W: 4 of 8 SMs at 408 of 625 MHz (nvpmodel), 2,048 FLOP an SM and clock in fp16, with the same memory."""
    low, full = devices.load("jetson-orin-nano-8gb@7W"), devices.load("jetson-orin-nano-8gb")
    assert low.gpu is not None and full.gpu is not None
    assert (low.gpu.sm_count, low.gpu.clock_mhz, low.gpu.cuda_cores, low.memory.bandwidth_gb_per_s) == (4, 408, 512, 68.2)
    assert low.peaks.fp16_tflops == pytest.approx(4 * 2048 * 408e6 / 1e12) and low.peaks.fp8_tflops is None
    assert (low.id, low.label, low.power_watts, full.label) == (full.id, "jetson-orin-nano-8gb@7W", 7, full.id)
    assert low.notes == full.notes and "peaks.fp16_tflops" in low.sources.derived
    assert devices.load("jetson-agx-orin-64gb@15W").memory.bandwidth_gb_per_s == 136.5


def test_what_a_mode_does_not_say_is_an_upper_bound() -> None:
    mode, full = devices.load("jetson-agx-thor@120W"), devices.load("jetson-agx-thor")
    assert (mode.peaks, mode.gpu, mode.memory) == (full.peaks, full.gpu, full.memory)
    assert mode.is_uncertain("peaks.fp16_tflops") and mode.is_uncertain("gpu.clock_mhz") and not mode.is_uncertain("memory.bandwidth_gb_per_s")
    assert mode.notes[-1] == "Power mode 120W: sm_count, clock_mhz not published; the device's own stand in, an upper bound."
    assert "sm_count, clock_mhz not published" in CliRunner().invoke(main, ["devices", "jetson-agx-thor@120W"]).output


def test_modes_that_there_are_not() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown power mode of jetson-orin-nano-8gb '15w'; did you mean '15W'\? \(known: 15W, 7W\)"):
        devices.load("jetson-orin-nano-8gb@15w")
    with pytest.raises(EdgecompError, match="rtx-4090 has no power modes in its profile: leave out '@450W'"):
        devices.load("rtx-4090@450W")
    with pytest.raises(UnknownNameError, match="did you mean 'jetson-orin-nano-8gb'"):
        devices.load("jetson-orin-nano-8bg@7W")


def test_a_file_in_a_mode(tmp_path: Path) -> None:
    text = (devices.profile_folder() / "jetson-nano.toml").read_text(encoding="utf-8")
    folder = tmp_path / "boards@home"
    folder.mkdir()
    (folder / "jetson-nano.toml").write_text(text, encoding="utf-8")
    assert devices.load(f"{folder / 'jetson-nano.toml'}@5W").gpu == devices.load("jetson-nano@5W").gpu
    assert devices.load(str(folder / "jetson-nano.toml")).mode is None


def test_a_mistyped_name_gets_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown device 'rtx-409'; did you mean 'rtx-4090'\?"):
        devices.load("rtx-409")


def test_a_name_is_no_path() -> None:
    with pytest.raises(UnknownNameError):
        devices.load("../profiles/rtx-4090")


def written(folder: Path, old: str, new: str) -> Path:
    """A folder with one profile, the RTX 4090's with `old` replaced."""
    text = (devices.profile_folder() / "rtx-4090.toml").read_text(encoding="utf-8")
    assert text.count(old) == 1
    (folder / "rtx-4090.toml").write_text(text.replace(old, new), encoding="utf-8")
    return folder


TWO_MODES = 'power_watts = 450\npower_modes = [{name = "low"}, {name = "low"}]'


@pytest.mark.parametrize(("old", "new", "said"), [
    ("sm_count = 128\n", "", "gpu: missing field sm_count"),
    ("sm_count = 128", "sm_count = 128\nshaders = 3", "gpu: unknown field shaders"),
    ("sm_count = 128", "sm_count = -128", "gpu.sm_count is -128: a positive number is expected"),
    ("clock_mhz = 2520", "clock_mhz = nan", "gpu.clock_mhz is nan: a positive number is expected"),
    ("clock_mhz = 2520", 'clock_mhz = "fast"', "gpu: clock_mhz: 'fast' is not of the expected kind"),
    ("l2_mib = 72", 'l2_mib = "72"', "gpu: l2_mib: '72' is not of the expected kind"),
    ('"8.9"', '"sm_89"', "compute_capability: 'sm_89' is not of the form '8.7'"),
    ('id = "rtx-4090"', 'id = "rtx-409O"', "id is 'rtx-409O', but the file is named 'rtx-4090'"),
    ("power_watts = 450", TWO_MODES, "power_modes: 'low' is there more than once"),
    ("usable_gib = 23.99", "usable_gib = 30", "memory.usable_gib 30.0 is more than total_gib 24.0"),
    ('power = ["TechPowerUp"]', "power = []", "sources: power is empty"),
    ('uncertain = ["memory.usable_gib"]', 'uncertain = ["memory.speed"]', "sources: uncertain names 'memory.speed'"),
    ("[gpu]", "[gpu", "not a readable TOML file"),
    ("bandwidth_gb_per_s = 1008", "bandwidth_gb_per_s = 0", "memory.bandwidth_gb_per_s is 0.0: a positive number is expected"),
    ("bandwidth_gb_per_s = 1008", "bandwidth_gb_per_s = 1e9", "bandwidth_gb_per_s is 1e+09, and nothing has that: 0.5 to 100000 is expected"),
    ("clock_mhz = 2520", "clock_mhz = 2.52", "gpu.clock_mhz is 2.52, and nothing has that: 20 to 20000 is expected; look at the unit"),
    ("total_gib = 24", "total_gib = 25769803776", "memory.total_gib is 2.57698e+10, and nothing has that"),
    ("power_watts = 450", 'power_watts = 450\npower_modes = [{name = "fast", clock_mhz = 9999}]',
     "power_modes.fast.clock_mhz 9999 is more than the device's own 2520"),
    ("power_watts = 450", 'power_watts = 450\nmode = {name = "fast"}', "mode is not for a profile: it is chosen behind the id, as in ID@15W"),
])
def test_a_malformed_profile_is_one_clear_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(EdgecompError) as caught:
        devices.load("rtx-4090", folders=[written(tmp_path, old, new)])
    message = str(caught.value)
    assert said in message and "rtx-4090.toml" in message and "\n" not in message
    assert type(caught.value) is EdgecompError


def test_own_folders_come_first(tmp_path: Path) -> None:
    own = written(tmp_path, 'name = "GeForce RTX 4090"', 'name = "Mine"')
    assert devices.load("rtx-4090", folders=[own, devices.profile_folder()]).name == "Mine"
    assert devices.load("l4", folders=[own, devices.profile_folder()]).name == "L4"
    assert devices.names(folders=[own]) == ["rtx-4090"]


def test_installed_profiles_come_before_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "PACKAGE", tmp_path / "edgecomp")
    assert devices.profile_folder() == tmp_path / "profiles"
    (tmp_path / "edgecomp" / "_data" / "profiles").mkdir(parents=True)
    assert devices.profile_folder() == tmp_path / "edgecomp" / "_data" / "profiles"


def test_command_prints_an_aligned_table() -> None:
    result = CliRunner().invoke(main, ["devices"])
    header, *rows = result.output.split("\n\n")[0].splitlines()
    assert result.exit_code == 0 and [row.split()[0] for row in rows] == devices.names()
    assert len({len(row) for row in [header, *rows]}) == 1
    spark = next(row for row in rows if row.startswith("dgx-spark-gb10"))
    assert spark.split() == ["dgx-spark-gb10", "128", "273", "125?", "250?", "12.1"]
    nano = next(row for row in rows if row.startswith("jetson-nano "))
    assert nano.split() == ["jetson-nano", "4", "25.6", "0.47", "-", "5.3"]   # no tensor cores: fp16 in pairs


def test_command_shows_one_device_with_its_sources() -> None:
    output = CliRunner().invoke(main, ["devices", "jetson-agx-orin-64gb"]).output
    for part in ("bandwidth_gb_per_s  204.8", "int8_tops           85.2*", "clock_mhz 829?", "JetPack 6.2 ", "TensorRT 10.3.0.30",
                 "source: https://www.techpowerup.com/gpu-specs/jetson-agx-orin-64-gb.c4085"):
        assert part in output


def test_command_shows_every_field_of_every_device(device: devices.Device) -> None:
    output = CliRunner().invoke(main, ["devices", device.id]).output
    assert all(name.rsplit(".", 1)[-1] in output for name in device.numbers())
    assert all(note in output for note in device.notes) and "None" not in output


def test_command_prints_json() -> None:
    single = json.loads(CliRunner().invoke(main, ["devices", "rtx-4090", "--json"]).output)
    assert single["gpu"]["sm_count"] == 128 and single["peaks"]["int8_tops"] == 660.6 and single["peaks"]["fp4_tflops"] is None
    assert "peaks.int8_tops" in single["sources"]["derived"]
    everything = json.loads(CliRunner().invoke(main, ["devices", "--json"]).output)
    assert [each["id"] for each in everything] == devices.names() and single in everything


def test_command_leaves_a_wrong_name_to_the_group() -> None:
    result = CliRunner().invoke(main, ["devices", "rtx-409"])
    assert result.exit_code == 1 and "rtx-409" in result.stderr and "did you mean" in result.stderr


# profiles of one's own

def test_a_profile_is_written_as_it_is_read(device: devices.Device, tmp_path: Path) -> None:
    (tmp_path / f"{device.id}.toml").write_text(to_toml(device))
    assert devices.load(str(tmp_path / f"{device.id}.toml")) == device


def test_a_folder_of_ones_own_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = dataclasses.replace(devices.load("rtx-4090"), name="mine")
    (tmp_path / "rtx-4090.toml").write_text(to_toml(mine))
    (tmp_path / "bench.toml").write_text(to_toml(dataclasses.replace(mine, id="bench")))
    monkeypatch.setenv("EDGECOMP_PROFILES", str(tmp_path))
    assert devices.load("rtx-4090").name == "mine" and "bench" in devices.names() and "rtx-4080" in devices.names()


def test_this_machine_is_detected(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["devices", "--detect"])
    assert result.exit_code == 0
    name = tomllib.loads(result.stdout)["id"]
    (tmp_path / f"{name}.toml").write_text(result.stdout)
    found = devices.load(str(tmp_path / f"{name}.toml"))
    assert found.cpu is not None and found.gpu is None and found.cpu.cores == len(os.sched_getaffinity(0))
    assert found.memory.total_gib == pytest.approx(psutil.virtual_memory().total / 2**30, abs=0.01)
    assert 0.5 < found.memory.bandwidth_gb_per_s < 2000 and 0.001 < (found.peaks.fp32_tflops or 0) < 100
    refused = CliRunner().invoke(main, ["devices", "--detect", "rtx-4090"])
    assert refused.exit_code == 2 and "leave out rtx-4090" in refused.stderr


@pytest.mark.parametrize(("text", "said"), [
    ("", "missing field"), ("[gpu", "not a readable TOML file"),
    (to_toml(dataclasses.replace(devices.load("rtx-4090"), id="own", gpu=None)), "either a table gpu or a table cpu"),
    (to_toml(dataclasses.replace(devices.load("rtx-4090"), id="own", power_watts=None)), "power_watts is missing")])
def test_a_file_that_is_no_profile_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "own.toml").write_text(text)
    result = CliRunner().invoke(main, ["devices", str(tmp_path / "own.toml")])
    assert result.exit_code == 1 and said in result.stderr and len(result.stderr.splitlines()) == 1
    missing = CliRunner().invoke(main, ["devices", str(tmp_path / "none.toml")])
    assert missing.exit_code == 1 and "none.toml" in missing.stderr and len(missing.stderr.splitlines()) == 1


def test_a_cpu_has_no_engines() -> None:
    result = CliRunner().invoke(main, ["doctor", "--device", "cpu-x86-8-cores"])
    assert "no   build its engines here: cpu-x86-8-cores has no NVIDIA GPU, so there are no engines for it" in result.stdout
