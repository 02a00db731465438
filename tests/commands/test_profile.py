"""`edgecomp profile`: plans measured beside their baselines, devices predicted beside them, the report in its forms, calibrations."""
from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgecomp import beside, devices, methods, profiling
from edgecomp.cli import main
from edgecomp.commands import profile as command
from edgecomp.compile import compile_model
from edgecomp.compress import Recipe
from edgecomp.measure import Spec, measure_here
from edgecomp.predict import memory
from edgecomp.quantize.apply import quantize
from edgecomp.quantize.subset import Calibration
from edgecomp_runtime.bundle import Bundle

PROMPT = "what number is written?"
DEVICES = ("jetson-orin-nano-8gb", "cpu-x86-8-cores")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's folder of profiles, empty before."""
    return tmp_path_factory.mktemp("data") / "profiles"


@pytest.fixture(scope="module")
def questions(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two tasks, about two pictures."""
    rows = [json.loads(line) for line in (scenes / "questions.jsonl").read_text().splitlines()]
    chosen = [row for row in rows if row["task"] in ("where", "number") and row["image"] < "images/scene-02"]
    assert len({row["image"] for row in chosen}) == 2
    data = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    data.write_text("\n".join(json.dumps({**row, "image": str(scenes / row["image"])}) for row in chosen))
    return data


@pytest.fixture(scope="module")
def result(demo: Path, questions: Path, own: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of the command."""
    beside_it, out = sorted(demo.parent.iterdir()), tmp_path_factory.mktemp("out") / "report.json"
    args = ["profile", demo, "--plan", "dart-64", "--data", questions, "--images", 1, "--prompt", PROMPT, "--repeats", 1, "--save", "my-machine",
            *(part for name in DEVICES for part in ("--device", name)), "-o", out, "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGECOMP_PROFILES", str(own))
        ran = CliRunner().invoke(main, [str(arg) for arg in args])
    assert ran.exit_code == 0, ran.output
    assert sorted(demo.parent.iterdir()) == beside_it
    found: dict[str, Any] = json.loads(ran.stdout)
    assert json.loads(out.read_text()) == found
    return found


def test_plans_are_measured_beside_their_baselines(result: dict[str, Any], questions: Path) -> None:
    rows = {plan["name"]: plan for plan in result["plans"]}
    assert list(rows) == ["full", "dart-64", "random-64", "random-64-seed1", "random-64-seed2", "pool-64"]
    asked = [json.loads(line)["image"] for line in questions.read_text().splitlines()]
    for name, row in rows.items():
        keep = 576 if name == "full" else 64
        assert row["counts"] == {"enter": keep, "after_cut": keep, "mean_over_layers": keep} and row["keep"] == keep
        assert row["peak"]["peak_bytes"] > row["memory"]["weights_bytes"] > 0 and row["peak"]["meter"] == "VmHWM"
        assert row["memory"]["cache_bytes"] == 2 * 8 * 64 * 4 * (2048 - 576 + keep)
        assert all(row["latency"][phase]["median"] > 0 for phase in ("vision_ms", "prefill_ms", "first_token_ms", "per_token_ms"))
        assert row["accuracy"]["questions"] == asked.count(asked[0]) and row["accuracy"]["scenes"] == 1 and 0 <= row["accuracy"]["all"] <= 100
    assert [rows[f"random-64{seed}"]["parameters"]["seed"] for seed in ("", "-seed1", "-seed2")] == [0, 1, 2]
    assert rows["pool-64"]["nearest_to"] is None and rows["pool-64"]["kind"] == "merging"
    assert result["example"]["question"] == PROMPT
    kept = {name: example["kept"] for name, example in result["example"]["plans"].items()}
    assert {name: len(places) for name, places in kept.items()} == {name: row["keep"] for name, row in rows.items()}
    assert len({tuple(kept[f"random-64{seed}"]) for seed in ("", "-seed1", "-seed2")}) == 3  # three different sets


def test_every_group_of_numbers_says_what_it_is(result: dict[str, Any]) -> None:
    for plan in result["plans"]:
        assert {group: plan[group]["kind"] for group in ("latency", "accuracy", "memory", "peak")} == {
            "latency": "measured", "accuracy": "measured", "memory": "counted", "peak": "measured"}
        assert not {"peak_bytes", "meter"} & set(plan["memory"])
    for device in result["devices"]:
        for plan in device["plans"].values():
            estimates = [value for value in plan.values() if isinstance(value, dict) and "value" in value]
            assert plan["kind"] == "predicted" and len(estimates) == 6
            assert all(each["kind"] == "predicted" and each["low"] <= each["value"] <= each["high"] and each["constants"] for each in estimates)


def test_devices_are_predicted_beside_the_machine_at_hand(result: dict[str, Any]) -> None:
    here, *others = result["devices"]
    assert (here["id"], here["here"], here["engine"], here["calibrated"]) == ("here", True, "onnxruntime", None)
    assert [(device["id"], device["here"]) for device in others] == [(name, False) for name in DEVICES]
    names = [plan["name"] for plan in result["plans"]]
    for device in result["devices"]:
        assert list(device["plans"]) == names and device["sources"]
        full, cut = device["plans"]["full"], device["plans"]["dart-64"]
        # 64 of 576 tokens in a prompt of some 600 rows: of the products a ninth is left, of attention less
        assert cut["work"]["prefill"]["flops"] < full["work"]["prefill"]["flops"] / 5
        assert cut["prefill_ms"]["value"] < full["prefill_ms"]["value"]
        assert full["ttft_ms"]["value"] == pytest.approx(full["vision_ms"]["value"] + full["prefill_ms"]["value"])
        assert sum(full["memory_parts"].values()) == pytest.approx(full["memory_bytes"]["value"])
        assert full["verdict"] == "fits" and full["way_out"] == ""
    orin, profile = others[0], devices.load(DEVICES[0])
    assert orin["bandwidth_bytes_per_s"] == profile.memory.bandwidth_gb_per_s * 1e9
    assert orin["peak_flops_per_s"] == (profile.peaks.fp32_tflops or 0) * 1e12 and orin["peak_precision"] == "fp32"
    assert orin["uncertain"] == list(profile.sources.uncertain)
    assert set(profile.sources.spec) <= set(orin["sources"])


def test_the_machine_at_hand_is_predicted_against_measured(result: dict[str, Any]) -> None:
    plans = {plan["name"]: plan for plan in result["plans"]}
    assert [(pair["plan"], pair["phase"]) for pair in result["compared"]] == [
        (name, phase) for name in plans for phase in ("vision_ms", "prefill_ms", "per_token_ms", "peak_bytes")]
    guesses = result["devices"][0]["plans"]
    for pair in result["compared"]:
        plan, guess = plans[pair["plan"]], guesses[pair["plan"]]
        name = {"per_token_ms": "tpot_ms", "peak_bytes": "memory_bytes"}.get(pair["phase"], pair["phase"])
        assert pair["predicted"] == {end: guess[name][end] for end in ("value", "low", "high")}
        assert pair["measured"] == (plan["peak"] if pair["phase"] == "peak_bytes" else plan["latency"])[pair["phase"]] or \
            pair["measured"] == plan["latency"][pair["phase"]]["median"]


def test_memory_is_predicted_within_a_tenth(result: dict[str, Any]) -> None:
    pairs = [pair for pair in result["compared"] if pair["phase"] == "peak_bytes" and pair["plan"] in ("full", "dart-64")]
    assert [pair["measured"] for pair in pairs] == [pytest.approx(pair["predicted"]["value"], rel=0.1) for pair in pairs]


def test_what_is_saved_corrects_the_next_predictions(result: dict[str, Any], demo: Path, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECOMP_PROFILES", str(own))
    assert sorted(path.name for path in own.iterdir()) == ["my-machine.onnxruntime.json", "my-machine.toml"]
    mine, rows = devices.load("my-machine"), json.loads((own / "my-machine.onnxruntime.json").read_text())["rows"]
    assert mine.cpu is not None and mine.cpu.cores == len(os.sched_getaffinity(0))
    took = {plan["name"]: plan["latency"] for plan in result["plans"]}
    names = {"vision": "vision_ms", "prefill": "prefill_ms", "decode": "per_token_ms"}
    assert {(row["plan"], row["phase"]): row["seconds"] for row in rows} == {
        (plan, phase): latency[name]["median"] / 1000 for plan, latency in took.items() for phase, name in names.items()}
    bundle = Bundle.open(demo)
    asked = [beside.asked(bundle, "full", "full", took["full"])]
    corrected = beside.on_device(asked, mine, False)
    plain = result["devices"][0]["plans"]["full"]
    for phase, name in names.items():
        key = {"decode": "tpot_ms"}.get(phase, name)
        off = sorted(math.log(latency[name]["median"] / result["devices"][0]["plans"][plan][key]["value"]) for plan, latency in took.items())
        middle = (off[2] + off[3]) / 2
        moved = math.log(corrected["plans"]["full"][key]["value"] / plain[key]["value"])
        assert moved * middle > 0 and abs(moved) < abs(middle)  # towards what was measured, and not all of the way for one model
        assert re.fullmatch(r"calibrated on my-machine, \d{4}-\d\d-\d\d, 6 rows", corrected["plans"]["full"][key]["constants"])
    assert corrected["calibrated"].endswith(", 18 rows")


def test_memory_is_planned_once_a_plan(result: dict[str, Any], demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two GPUs and two CPUs, the same as of each alone."""
    here = [devices.load(name) for name in ("jetson-orin-nano-8gb", "rtx-4090", "cpu-x86-8-cores", "cpu-arm-cortex-a76-4-cores")]
    planned: list[str] = []
    for real in (memory.memory_of, memory.activations_of):
        monkeypatch.setattr(memory, real.__name__, lambda *given, real=real, **sizes: planned.append(real.__name__) or real(*given, **sizes))

    def asked() -> list[beside.Asked]:
        return [beside.asked(Bundle.open(demo), "full", "full", result["plans"][0]["latency"])]
    plans = asked()
    found = [beside.on_device(plans, device, False) for device in here]
    assert sorted(planned) == ["activations_of", "memory_of"]
    assert found == [beside.on_device(asked(), device, False) for device in here]


def test_what_cannot_be_predicted_is_refused_in_its_place(result: dict[str, Any], demo: Path) -> None:
    bundle, took = Bundle.open(demo), result["plans"][0]["latency"]
    device = dataclasses.replace(devices.load("jetson-orin-nano-8gb"), peaks=devices.Peaks(int8_tops=20))
    found = beside.on_device([beside.asked(bundle, "full", "full", took)], device, False)
    assert found["plans"] == {"full": {"refused": "the profile of jetson-orin-nano-8gb has no peak for fp32: add peaks.fp32_tflops to it"}}
    assert found["peak_flops_per_s"] is None and found["usable_bytes"] > 2**32
    assert beside.compared(found, result["plans"][:1]) == []


def test_the_terminal_shows_what_the_result_has(result: dict[str, Any]) -> None:
    measured, gauges, compared, orin, cpu = list(command._text(result))
    assert "measured" in measured and "predicted" not in measured and "random-64-seed2" in measured
    assert gauges == "This system tells neither clocks nor power nor temperature." or "before" in gauges
    assert compared.count("full  ") == 4 and "seed" not in compared
    for device, text in zip(result["devices"][1:], (orin, cpu)):
        assert device["id"] in text.splitlines()[0] and text.splitlines()[-1].startswith(f"{device['engine']}, {device['weights']}")
    told = {**result, "machine": {**result["machine"], "gauges": [{"name": "CPU", "unit": "W", "before": None, "after": 3.25, "kind": "measured"}]}}
    assert re.search(r"CPU +- +3\.2 W", list(command._text(told))[1])
    refused = {**result["devices"][1], "plans": {"full": {"refused": "no peak for fp32"}}}
    assert "no peak for fp32" in list(command._text({**result, "devices": [refused]}))[-1]


def test_reports_in_the_form_of_their_suffix(result: dict[str, Any]) -> None:
    html, markdown = command.FORMS[".html"](result), command.FORMS[".md"](result)
    assert html.startswith("<!") and "jetson-orin-nano-8gb" in html
    assert not markdown.startswith("<") and "jetson-orin-nano-8gb" in markdown


@pytest.mark.parametrize(("options", "telling"), [
    (["--device", "jetson-orin-nano-8g"], "unknown device 'jetson-orin-nano-8g'; did you mean 'jetson-orin-nano-8gb'?"),
    (["--save", "rtx-4090"], "--save rtx-4090: rtx-4090 is a GPU, and what is measured here runs on the CPU: choose another id"),
    (["--save", "cpu-x86-8-cores"], "--save cpu-x86-8-cores: cpu-x86-8-cores has 8 cores, CPU, x86-64, and this machine "),
    (["--save", "../x"], "--save ../x: an id has small letters, digits, '-' and '.', and is not 'here', such as "),
    (["--save", "here"], "--save here: an id has small letters, digits, '-' and '.', and is not 'here', such as "),
    (["-o", "report.pdf"], "report.pdf: a report ends in .html, .md, .json, which says its form"),
])
def test_what_cannot_be_is_said_before_anything_is_measured(options: list[str], telling: str, demo: Path) -> None:
    if options[-1] == "cpu-x86-8-cores" and len(os.sched_getaffinity(0)) == 8:
        pytest.skip("this machine could be that one")
    ran = CliRunner().invoke(main, ["profile", str(demo), *options])
    assert ran.exit_code in (1, 2) and telling in ran.output and "measuring" not in ran.output


@pytest.mark.parametrize("option", ["--device", "--save"])
def test_a_broken_calibration_is_said_before_anything_is_measured(option: str, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECOMP_PROFILES", str(tmp_path))
    name = {"--device": "cpu-x86-8-cores", "--save": "my-machine"}[option]
    (tmp_path / f"{name}.onnxruntime.json").write_text("{")
    ran = CliRunner().invoke(main, ["profile", str(demo), option, name])
    assert ran.exit_code == 1 and f"{name}.onnxruntime.json: no JSON (" in ran.output and "measuring" not in ran.output


BITS = {"fp32": "fp32", "both": "int8 and int8 tower"}  # bundle -> what its plans are in


@pytest.fixture(scope="module")
def bundles(tiny: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with one plan in fp32, and with weights and tower in int8."""
    folder = tmp_path_factory.mktemp("bits")
    compile_model(str(tiny), folder / "fp32", [Recipe.of(methods.make("stride"), "9")])
    quantize(folder / "fp32", folder / "both", "int8", block=16, calibration=Calibration(scenes / "images", 1))
    return folder


@pytest.fixture(scope="module")
def joint(bundles: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[tuple[Any, ...]], Path]:
    """One run of the command on both: its result, what was measured of which bundle in turn, and the user's folder of profiles."""
    seen: list[tuple[Any, ...]] = []

    def measure(spec: Spec) -> dict[str, Any]:
        manifest = Bundle.open(spec.bundle).manifest
        seen.append((spec.plan, manifest.weights, manifest.calibrated is not None))
        return measure_here(spec)
    own, before = tmp_path_factory.mktemp("own"), sorted(bundles.iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGECOMP_PROFILES", str(own))
        patch.setattr(profiling, "measure", measure)  # a process for each is what another test has
        ran = CliRunner().invoke(main, ["profile", *(str(bundles / name) for name in BITS), "--data", str(questions), "--images", "1",
                                        "--repeats", "1", "--device", DEVICES[0], "--save", "mine", "-o", str(own / "report.html"), "--json"])
    assert ran.exit_code == 0, ran.output
    assert sorted(bundles.iterdir()) == before
    return json.loads(ran.stdout), seen, own


def test_bundles_in_other_bits_are_measured_beside_each_other(joint: tuple[dict[str, Any], list[tuple[Any, ...]], Path], bundles: Path) -> None:
    result, seen, own = joint
    plans = ["full", "stride-9", "random-9", "random-9-seed1", "random-9-seed2", "pool-9"]
    assert [(row["name"], row["bits"]) for row in result["plans"]] == [(f"{plan} in {bits}", bits) for bits in BITS.values() for plan in plans]
    assert seen == [(plan, *of) for of in (("fp32", False), ("int8", True)) for plan in plans]
    assert [(bundle["name"], bundle["bits"]) for bundle in result["bundles"]] == list(BITS.items())
    for row, name in zip(result["plans"], (name for name in BITS for _ in plans)):
        assert row["memory"]["weights_bytes"] == sum(path.stat().st_size for path in (bundles / name).rglob("*.bin"))
        assert row["accuracy"]["questions"] > 0 and row["latency"]["prompt_rows"] > 9
    assert set(result["example"]["plans"]) == {f"{plan} in fp32" for plan in plans}
    page = (own / "report.html").read_text()
    assert "<title>fp32, both: edgecomp profile</title>" in page and 'id="joint"' in page


def test_devices_and_calibrations_are_of_every_bundle(joint: tuple[dict[str, Any], list[tuple[Any, ...]], Path]) -> None:
    result, _, own = joint
    names = [row["name"] for row in result["plans"]]
    assert all(list(device["plans"]) == names for device in result["devices"])
    read = {bits: result["devices"][1]["plans"][f"full in {bits}"]["work"]["decode"]["bytes"] for bits in BITS.values()}
    assert read["int8 and int8 tower"] < 0.7 * read["fp32"]
    rows = json.loads((own / "mine.onnxruntime.json").read_text())["rows"]
    formats = {phase: {(row["plan"], row["format"]) for row in rows if row["phase"] == phase} for phase in ("vision", "prefill", "decode")}
    assert formats["prefill"] == {(name.split()[0], name.split()[2]) for name in names} >= formats["decode"]  # an answer may be of one token
    assert formats["vision"] == {(name.split()[0], "fp32") for name in names}  # no format is that of a tower in int8


def test_bundles_that_do_not_stand_beside_each_other_are_refused(bundles: Path, demo: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(bundles / "both").manifest
    shutil.copytree(bundles / "both", tmp_path / "wide")
    wide = dataclasses.replace(manifest, decoder=dataclasses.replace(manifest.decoder, context=4096))
    (tmp_path / "wide" / "edgecomp.json").write_text(wide.to_json())
    first = bundles / "fp32"
    for other, telling in ((demo, f"is of the model {Bundle.open(demo).manifest.source.model}, and {first} of {manifest.source.model} with other "),
                           (tmp_path / "wide", f"makes 25 visual tokens of a picture in a window of 4096, and {first} 25 in 2048: "),
                           (first, f"and {first} are both in fp32: a profile ")):
        ran = CliRunner().invoke(main, ["profile", str(first), str(other)])
        assert ran.exit_code == 1 and ran.stderr.startswith(f"edgecomp: {other} {telling}") and ran.stderr.count("\n") == 1, ran.output


def test_interrupted_it_leaves_nothing(demo: Path, tmp_path: Path) -> None:
    before = sorted(demo.parent.iterdir())
    args = ["profile", demo, "--plan", "stride-64", "--save", "mine", "-o", tmp_path / "r.json"]
    child = subprocess.Popen([sys.executable, "-m", "edgecomp", *map(str, args)], stderr=subprocess.PIPE, text=True,
                             env={**os.environ, "EDGECOMP_PROFILES": str(tmp_path / "own")})
    assert child.stderr is not None
    assert any(line.startswith("measuring full") for line in child.stderr)
    assert len(sorted(demo.parent.iterdir())) == len(before) + 1
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    child.stderr.read()
    assert child.wait(20) != 0
    assert sorted(demo.parent.iterdir()) == before and list(tmp_path.iterdir()) == []
