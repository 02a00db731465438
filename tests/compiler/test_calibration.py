"""Constants of CPUs against the times that they were fitted to, and calibrations: how far they move what is predicted, and what is refused."""
from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecomp import __version__, devices
from edgecomp.devices import Cpu, Device, Memory, Peaks, Sources
from edgecomp.predict import calibration, efficiency
from edgecomp.predict.calibration import Calibration, Measured, correction
from edgecomp.predict.model import Shape
from edgecomp.predict.predict import Prediction, Request, predict
from edgecomp.predict.work import work
from edgecomp_runtime.errors import EdgecompError

ROOT = Path(__file__).parents[2]
TIMES = list(csv.DictReader((ROOT / "benchmarks" / "data" / "cpu_times.csv").open(encoding="utf-8")))
MODELS = json.loads((ROOT / "benchmarks" / "data" / "models.json").read_text(encoding="utf-8"))
SHAPE = Shape.of_config(MODELS["Qwen3-VL-2B"]["config"])
ASKED = Request(600, 600, 256)
PHASES = {"vision": "vision_ms", "prefill": "prefill_ms", "decode": "tpot_ms"}
NAME = "my-machine"


def measured_cpu(line: dict[str, str]) -> Device:
    """The machine of a row."""
    return Device(line["machine"], line["machine"], "CPU", Memory("not known", 24, False, float(line["bandwidth_gb_per_s"])),
                  Peaks(fp32_tflops=float(line["fp32_tflops"])), Sources(("measured",), ("measured",)),
                  cpu=Cpu(line["chip"], line["architecture"], int(line["cores"]), line["vector"]))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, empty."""
    monkeypatch.setenv("EDGECOMP_PROFILES", str(tmp_path / "own"))
    return tmp_path / "own"


# ---- CPUs ----

@pytest.mark.parametrize("phase", PHASES)
def test_measured_times_are_met(phase: str) -> None:
    """Rows as they were measured; the constants saw them."""
    errors = []
    for line in (line for line in TIMES if line["phase"] == phase):
        flops = {part.partition("=")[0]: float(part.partition("=")[2]) for part in line["flops"].split()}
        device = measured_cpu(line)
        known = efficiency.constants(phase, device, "onnxruntime", line["format"])
        assert known.known == "path" and "on one x86-64 CPU" in known.of and known.rows >= 3
        # the form, written out: constants times ideal times
        moved = sum(float(line[name]) for name in ("weight_bytes", "cache_read_bytes", "cache_write_bytes"))
        bandwidth, peak = float(line["bandwidth_gb_per_s"]) * 1e9, float(line["fp32_tflops"]) * 1e12
        took = known.values["layers"] * int(line["layers"])
        if phase == "decode":
            took += known.values["bytes"] * moved / bandwidth
        else:
            took += known.values["compute"] * sum(flops.values()) / peak
        if phase == "prefill":
            took += known.values["bytes"] * float(line["weight_bytes"]) / bandwidth
        errors.append(abs(took / float(line["seconds"]) - 1))
    assert len(errors) >= 8 and median(errors) < 0.25


def test_another_cpu_has_a_wider_interval_and_an_arm_one_the_widest() -> None:
    here, x86, arm = measured_cpu(TIMES[0]), devices.load("cpu-x86-8-cores"), devices.load("cpu-arm-cortex-a76-4-cores")
    for phase in PHASES:
        for format_ in ("fp32", "fp16"):
            same, other, furthest = (efficiency.constants(phase, device, "onnxruntime", format_) for device in (here, x86, arm))
            assert same.spread < other.spread < furthest.spread
            assert "this is another" in other.of and "no Arm CPU was measured" in furthest.of and "pooled" not in same.of
    found = predict(SHAPE, arm, ASKED, weights="fp32")
    assert found.engine == "onnxruntime" and "no Arm CPU was measured" in found.tpot_ms.constants


@pytest.mark.parametrize(("engine", "weights", "telling"), [
    ("TensorRT", "fp16", "cpu-x86-8-cores is a CPU, and TensorRT was not measured on one, but onnxruntime: leave out --engine"),
    ("onnxruntime", "nvfp4", "cpu-x86-8-cores is a CPU, and nvfp4 under onnxruntime was not measured on one, but fp16 and fp32"),
])
def test_what_no_cpu_was_measured_with_is_refused(engine: str, weights: str, telling: str) -> None:
    with pytest.raises(EdgecompError) as said:
        predict(SHAPE, devices.load("cpu-x86-8-cores"), ASKED, weights=weights, engine=engine)
    assert str(said.value).startswith(telling) and "\n" not in str(said.value)


# ---- how far rows move a prediction ----

def test_a_correction_by_hand() -> None:
    # one model, as wide before as a path is: half of the way; two: two thirds; a path half as wide: four fifths
    assert correction([0.4], ["a"], 0.5, 0.5)[0] == pytest.approx(0.2)
    assert correction([0.4, 0.4], ["a", "b"], 0.5, 0.5)[0] == pytest.approx(0.4 * 2 / 3)
    assert correction([0.3, 0.4, 0.9], ["a"] * 3, 1.0, 0.5)[0] == pytest.approx(0.4 * 4 / 5)
    # no narrower than a path for one model, however many rows; by the rows alone for two models and nine rows
    assert correction([0.1] * 20, ["a"] * 20, 0.5, 0.3)[1] == 0.3
    assert correction([0.0] * 9, ["a"] * 4 + ["b"] * 5, 0.5, 0.3)[1] == 0.0
    assert correction([0.0] * 8, ["a"] * 4 + ["b"] * 4, 0.5, 0.3)[1] == 0.3
    assert correction([-2.0, 2.0], ["a", "b"], 0.5, 0.3)[1] == 2.0


@given(st.lists(st.tuples(st.floats(-3, 3), st.sampled_from("abcdefgh")), min_size=1, max_size=30), st.floats(0.05, 2), st.floats(0.05, 1))
def test_a_correction_goes_towards_the_median_and_no_further(rows: list[tuple[float, str]], before: float, share: float) -> None:
    off, models = [each for each, _ in rows], [model for _, model in rows]
    moved, width = correction(off, models, before, before * share)
    middle = median(off)
    assert abs(moved) <= abs(middle) and moved * middle >= 0 and width >= 0
    more, _ = correction(off * 3, [model + str(n) for n in range(3) for model in models], before, before * share)
    assert abs(more) >= abs(moved)  # of three times as many models


# ---- calibrations of a user ----

def rows_of(device: Device, factor: float, models: int = 3, weights: str = "fp16", engine: str | None = None) -> tuple[Measured, ...]:
    """Times that are so many times what is predicted for several models, each for all phases."""
    rows = []
    for name in ("Qwen3-VL-2B", "Qwen2.5-VL-7B", "Qwen3-VL-8B", "LLaVA-1.5-7B", "Qwen3.5-4B")[:models]:
        model = Shape.of_config(MODELS[name]["config"])
        found = predict(model, device, ASKED, weights=weights, engine=engine)
        for phase, key in PHASES.items():
            asked = work(model, phase, prompt_tokens=600, context=600, visual_tokens=256, weights=weights)
            format_ = "fp16" if phase == "vision" else weights
            rows.append(Measured(phase, format_, name, "full", 600, asked, factor * getattr(found, key).value / 1000))
    return tuple(rows)


def calibrate(device: Device, factor: float, **choices: Any) -> Path:
    engine = choices.get("engine") or "onnxruntime"
    rows = rows_of(device, factor, **choices)
    return calibration.save(Calibration(device.id, engine, "2026-11-22", __version__, calibration.version(engine), rows))


def ratios(now: Prediction, before: Prediction) -> list[float]:
    return [getattr(now, key).value / getattr(before, key).value for key in PHASES.values()]


def test_a_calibrated_cpu(own: Path) -> None:
    device = devices.load("cpu-x86-8-cores")
    before = predict(SHAPE, device, ASKED)
    path = calibrate(device, 2.0)
    assert path == own / "cpu-x86-8-cores.onnxruntime.json"
    now = predict(SHAPE, device, ASKED)
    for ratio, key in zip(ratios(now, before), PHASES.values(), strict=True):
        was, estimate = getattr(before, key), getattr(now, key)
        assert 1.7 < ratio < 2  # most of the way, for three models where little was known
        assert estimate.high / estimate.low < was.high / was.low
        assert estimate.constants == "calibrated on cpu-x86-8-cores, 2026-11-22, 3 rows"
    assert now.memory_bytes == before.memory_bytes
    other = predict(SHAPE, devices.load("cpu-arm-cortex-a76-4-cores"), ASKED)
    assert "calibrated" not in other.tpot_ms.constants
    fp32 = predict(SHAPE, device, ASKED, weights="fp32")
    assert "calibrated" not in fp32.tpot_ms.constants  # no row is of that format
    path.unlink()
    assert predict(SHAPE, device, ASKED) == before


def test_a_prediction_reads_its_calibration_once(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = devices.load("cpu-x86-8-cores")
    calibrate(device, 2.0)
    read: list[str] = []
    monkeypatch.setattr(calibration, "load", lambda *asked, load=calibration.load: read.append(asked[0]) or load(*asked))
    assert "calibrated" in predict(SHAPE, device, ASKED).ttft_ms.constants and read == ["cpu-x86-8-cores"]


def test_a_calibrated_gpu_but_not_its_power_modes(own: Path) -> None:
    device = devices.load("jetson-orin-nano-8gb")
    before = predict(SHAPE, device, ASKED, weights="int4")
    mode = predict(SHAPE, devices.load("jetson-orin-nano-8gb@15W"), ASKED, weights="int4")
    calibrate(device, 0.5, models=5, weights="int4", engine="TensorRT")
    now = predict(SHAPE, device, ASKED, weights="int4")
    assert all(0.5 < ratio < 0.65 for ratio in ratios(now, before))
    assert now.prefill_ms.constants == "calibrated on jetson-orin-nano-8gb, 2026-11-22, 5 rows"
    assert "calibrated" not in predict(SHAPE, device, ASKED, weights="int4", engine="TensorRT Edge-LLM").prefill_ms.constants
    assert predict(SHAPE, devices.load("jetson-orin-nano-8gb@15W"), ASKED, weights="int4") == mode


def test_other_versions_are_used_and_named_and_go_at_the_next_save(own: Path) -> None:
    device = devices.load("cpu-x86-8-cores")
    path = calibrate(device, 2.0, models=2)
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "edgecomp": "0.0.1", "engine_version": "1.2.3"}))
    said = predict(SHAPE, device, ASKED).tpot_ms.constants
    assert said == "calibrated on cpu-x86-8-cores, 2026-11-22, 2 rows, with edgecomp 0.0.1 and onnxruntime 1.2.3"
    calibrate(device, 3.0, models=1)
    assert len(json.loads(path.read_text())["rows"]) == 3


def test_a_save_adds_to_what_is_there_and_replaces_the_same_run(own: Path) -> None:
    device = devices.load("cpu-x86-8-cores")
    plain = {row.model + row.phase: row.seconds for row in rows_of(device, 1.0)}
    calibrate(device, 2.0, models=1)
    new = tuple(dataclasses.replace(row, seconds=5 * plain[row.model + row.phase]) for row in rows_of(device, 1.0)[2:4])  # the first of them is there
    path = calibration.save(Calibration(device.id, "onnxruntime", "2026-12-01", __version__, calibration.version("onnxruntime"), new))
    saved = calibration.load(device.id, "onnxruntime")
    assert saved is not None and saved.created == "2026-12-01"
    first, second = saved.rows[0].model, saved.rows[-1].model
    assert {(row.model, row.phase): round(row.seconds / plain[row.model + row.phase], 6) for row in saved.rows} == {
        (first, "vision"): 2, (first, "prefill"): 2, (first, "decode"): 5, (second, "vision"): 5}
    assert [each.name for each in own.iterdir()] == [path.name]


def row(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    return lambda data: change(data["rows"][0])


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another device's": (lambda data: data.update(device="rtx-4090"), "it is of rtx-4090 and onnxruntime, but named as of cpu-x86-8-cores and "),
    "no rows": (lambda data: data.update(rows=[]), "it has no rows"),
    "a missing field": (lambda data: data.pop("created"), "missing field created"),
    "an unknown field": (row(lambda data: data.update(speed=3)), "rows[0]: unknown field speed"),
    "a text for a number": (row(lambda data: data.update(seconds="fast")), "rows[0]: seconds: 'fast' is not of the expected kind, a number"),
    "no time": (row(lambda data: data.update(seconds=0.0)), "rows[0]: vision took 0.0 s for "),
    "no number": (row(lambda data: data.update(seconds=math.nan)), "rows[0]: vision took nan s for "),
    "no work": (row(lambda data: data["work"].update(flops={"fp16": 0.0})), "for 0 operations, which cannot be"),
    "bytes below nothing": (row(lambda data: data["work"].update(weight_bytes=-1.0)), "which cannot be"),
    "another phase": (row(lambda data: data.update(phase="training")), "rows[0]: 'training' in 'fp16' and fp16 is no phase, "),
    "another precision": (row(lambda data: data["work"].update(flops={"fp12": 1.0})), "rows[0]: 'vision' in 'fp16' and fp12 is no phase, "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_calibration_is_one_clear_line(name: str, own: Path) -> None:
    change, telling = BROKEN[name]
    device = devices.load("cpu-x86-8-cores")
    path = calibrate(device, 2.0, models=1)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(EdgecompError) as said:
        predict(SHAPE, device, ASKED)
    assert str(said.value).startswith(f"{path}: ") and telling in str(said.value) and "\n" not in str(said.value)
    assert str(said.value).endswith(": remove the file, or measure again with `edgecomp profile --save`")


@pytest.mark.parametrize("text", ["", "{", "[" * 5000, '"rows"', "\xff"])
def test_a_file_that_is_no_calibration_is_one_line(text: str, own: Path) -> None:
    own.mkdir()
    path = own / "cpu-x86-8-cores.onnxruntime.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(EdgecompError, match=rf"^{path}: .*: remove the file, or measure again") as said:
        predict(SHAPE, devices.load("cpu-x86-8-cores"), ASKED)
    assert "\n" not in str(said.value)


def test_the_users_folder_without_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGECOMP_PROFILES")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert devices.own_folder() == tmp_path / "edgecomp" / "profiles"
    text = (devices.profile_folder() / "rtx-4090.toml").read_text(encoding="utf-8").replace('id = "rtx-4090"', f'id = "{NAME}"')
    devices.own_folder().mkdir(parents=True)
    (devices.own_folder() / f"{NAME}.toml").write_text(text, encoding="utf-8")
    assert NAME in devices.names() and devices.load(NAME).gpu is not None
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert devices.own_folder() == tmp_path / ".local" / "share" / "edgecomp" / "profiles"
