"""`edgecomp fit`: units, and answers against a search over the same candidates written another way, with predictions from `predict`."""
from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import ROOT
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgecomp import devices
from edgecomp.cli import main
from edgecomp.fit.answer import answer
from edgecomp.fit.limits import SIZES, TIMES, Limit, amount, limits
from edgecomp.fit.plans import Choice, Measured, Plan
from edgecomp.predict import predict as predictor
from edgecomp.predict.model import Shape
from edgecomp.predict.predict import Prediction, Request
from edgecomp.predict.work import Work, work
from edgecomp_runtime import Bundle
from edgecomp_runtime.errors import EdgecompError, InputError

LLAVA = json.loads((ROOT / "benchmarks" / "data" / "models.json").read_text(encoding="utf-8"))["LLaVA-1.5-7B"]["config"]
LLAVA["text_config"]["max_position_embeddings"] = 4096
SHAPE = Shape.of_config(LLAVA)
DEVICE = "jetson-agx-orin-64gb"
N, LAYERS = 576, 32
BUDGETS = {"--max-memory": "memory_bytes", "--max-ttft": "ttft_ms", "--max-tpot": "tpot_ms"}

BYTES = {"B": Fraction(1), "kB": Fraction(1000), "MB": Fraction(1000**2), "GB": Fraction(1000**3), "KiB": Fraction(1024), "MiB": Fraction(1024**2),
         "GiB": Fraction(1024**3)}
MILLISECONDS = {"us": Fraction(1, 1000), "ms": Fraction(1), "s": Fraction(1000)}


predict = functools.cache(predictor.predict)


@pytest.fixture(scope="module", autouse=True)
def asked_once() -> Iterator[None]:
    """The same predictions are asked for again and again; fit and the search get them from one cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgecomp.fit.plans.predict", predict)
        yield


# --- words to numbers

@given(st.decimals(min_value="0.001", max_value="9999", places=3), st.sampled_from([*BYTES, *MILLISECONDS]), st.sampled_from(["", " "]))
def test_amounts_are_read_as_they_are_written(number, unit, space):
    table, other = (SIZES, BYTES) if unit in BYTES else (TIMES, MILLISECONDS)
    assert amount("--max", f"{number}{space}{unit}", table, "") == pytest.approx(float(Fraction(number) * other[unit]), rel=1e-12)


@given(st.sampled_from(["memory_bytes", "ttft_ms", "share", "accuracy"]), st.floats(1.0, 1e12))
def test_what_is_suggested_can_be_asked_for_and_is_met(quantity, value):
    assume(quantity not in ("share", "accuracy") or value <= 100)
    text = Limit(quantity, "", "", 1.0).words(value)
    option = {"memory_bytes": "max_memory", "ttft_ms": "max_ttft"}.get(quantity, "min_accuracy")
    back, = limits(**{"max_memory": None, "max_ttft": None, "max_tpot": None, "min_accuracy": None, option: text})
    assert back.quantity == quantity
    assert back.value <= value if back.least else back.value >= value
    assert back.value == pytest.approx(value, rel=0.011)


@pytest.mark.parametrize(("option", "text", "said"), [
    ("--max-memory", "4", "has no unit: write it as 4GiB"), ("--max-ttft", "500", "has no unit: write it as 500ms"),
    ("--max-memory", "4 Gb/s", "unknown unit in --max-memory 4 Gb/s: 'Gb/s'"), ("--max-memory", "4Gib", "did you mean 'GiB'?"),
    ("--max-ttft", "5 sec", "unknown unit"), ("--max-tpot", "50GiB", "unknown unit"), ("--max-memory", "500ms", "unknown unit"),
    ("--max-ttft", "-5ms", "must be more than 0"), ("--max-ttft", "0ms", "must be more than 0"), ("--max-memory", "0.0GiB", "must be more than 0"),
    ("--max-ttft", "nan", "is not an amount such as 500ms"), ("--max-ttft", "nanms", "is not an amount"), ("--max-ttft", "infms", "is not an amount"),
    ("--max-memory", "9" * 400 + "GiB", "must be more than 0 and finite"), ("--max-ttft", "1.2.3ms", "is not an amount"),
    ("--max-ttft", "1,5s", "unknown unit"), ("--max-ttft", "", "is not an amount"), ("--max-memory", "٤GiB", "is not an amount"),
    ("--min-accuracy", "101%", "more than 100"), ("--min-accuracy", "101", "more than 100"), ("--min-accuracy", "0.95", "write 95%"),
    ("--min-accuracy", "-5%", "more than 0"), ("--min-accuracy", "nan%", "is not an amount"), ("--min-accuracy", "95 points", "95% is a share"),
])
def test_wrong_words_are_one_clear_line(option, text, said, config):
    message = refused(config, option, text)
    assert said in message and option in message


# --- a sweep as `edgecomp sweep` writes it, of a model of 7B

def row(method: str, sites: str, keep: int, accuracy: float, **others: Any) -> dict[str, Any]:
    """A row with one cut."""
    before, first = (N, int(sites.rpartition(":")[2])) if sites.startswith("decoder") else (keep, 0)
    mean = (first * before + (LAYERS - first) * keep) / LAYERS
    name = f"{method}-{keep}" + ("" if sites in ("projector", "") else f"-{sites.replace(':', '')}")
    return {"method": method, "parameters": {}, "site": sites, "sites": [sites] if sites else [], "position": "keep", "windows": "", "keep": keep,
            "accuracy": accuracy, "accuracy_low": accuracy, "accuracy_high": accuracy, "metric": "correct", "questions": 422, "pictures": 64,
            "tokens_entering": before, "tokens_after": keep, "tokens_mean": mean, "plans": [name], "loses_to": [], "coverage": 1.0, **others}


def rows(seed: int = 0) -> list[dict[str, Any]]:
    """The full model, and methods at sites and budgets with accuracies by chance, some of them the same."""
    chance = random.Random(seed)
    return [row("none", "", N, 90.0, plans=["full"]),
            *(row(method, site, keep, round(chance.uniform(40, 90)), loses_to=chance.choice([[], ["pool"]]))
              for method in ("random", "pool", "cls", "fastv") for site in ("projector", "decoder:2", "decoder:16", "encoder:4")
              for keep in (288, 192, 64, 32))]


def write(folder: Path, found: list[dict[str, Any]], **about: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    bundle = {"name": "llava", "family": "llava", "precision": "fp32", "tokens": N, "decoder_layers": LAYERS, "hidden": 4096, "context": 9, **about}
    (folder / "sweep.json").write_text(json.dumps({"edgecomp": "0.1.0", "machine": {"cpu": "test", "cores": 2}, "bundle": bundle, "rows": found}))
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAVA))
    return path


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write(tmp_path / "sweep", rows())


def run(*args: object, device: str = DEVICE) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["fit", *map(str, args), "--device", device])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result.exit_code, result.stdout


def asked(*args: object, device: str = DEVICE) -> dict[str, Any]:
    """The answer as JSON; the exit code tells whether something meets the limits."""
    code, said = run(*args, "--json", device=device)
    found: dict[str, Any] = json.loads(said)
    assert code == (0 if found["meets"] else 1)
    return found


def refused(*args: object, device: str = DEVICE) -> str:
    """The one line of an error."""
    result = CliRunner().invoke(main, ["fit", *map(str, args), "--device", device])
    assert result.exit_code == 1 and not result.stdout
    line, = result.stderr.splitlines()
    assert line.startswith("edgecomp: ")
    return line


def known(kept: int, layer: int, precision: str, text: int = 64) -> Prediction:
    return predict(SHAPE, devices.load(DEVICE), Request(N + text, N + text, N, kept, layer), weights=precision)


def place(one: dict[str, Any]) -> tuple[int, int]:
    site = one["sites"][0] if one["sites"] else ""
    return one["keep"], int(site[8:]) if site.startswith("decoder:") else 0


def name(one: dict[str, Any]) -> tuple[Any, ...]:
    return one["method"], *one["sites"], one["keep"]


LIMITS = st.fixed_dictionaries({}, optional={
    "--max-memory": st.integers(15_000, 24_000).map(lambda n: f"{n}MiB"), "--max-ttft": st.integers(150, 700).map(lambda n: f"{n}ms"),
    "--max-tpot": st.integers(60, 160).map(lambda n: f"{n}ms"),
    "--min-accuracy": st.integers(40, 100).flatmap(lambda n: st.sampled_from([f"{n}%", f"{n}"]))}).filter(bool)


@settings(max_examples=25, deadline=None)
@given(LIMITS, st.integers(0, 9))
def test_the_answer_is_that_of_a_search(tmp_path_factory, given_, seed):
    """Every row, its accuracy by hand and its times from `predict`: which meet the limits, in which order, what the least of each is."""
    folder = tmp_path_factory.mktemp("fit")
    (folder / "config.json").write_text(json.dumps(LLAVA))
    table = rows(seed)
    found = asked(folder, "--sweep", write(folder, table), *(part for pair in given_.items() for part in pair))

    units = {"MiB": 2**20, "ms": 1, "%": 0.9, "": 1}  # 90.0 points are all of the full model
    most = {key: float(text.rstrip("MiBms%")) * units[text.lstrip("0123456789")] for key, text in given_.items()}
    seen = []
    for one in table:
        took = known(*place(one), "fp16")
        values = {option: getattr(took, quantity) for option, quantity in BUDGETS.items() if option in most}
        surely = all(value.high <= most[option] for option, value in values.items()) and took.memory_bytes.high <= took.usable_bytes
        off = {option: value.value / most[option] for option, value in values.items()}
        if "--min-accuracy" in most:
            off["--min-accuracy"] = most["--min-accuracy"] / one["accuracy"] - 1e-12
        seen.append((one, took, surely, off))
    good = [entry for entry in seen if all(ratio <= 1 for ratio in entry[3].values())]
    assert sorted(map(name, found["meets"])) == sorted(name(one) for one, *_ in good)
    keys = {name(one): (-one["accuracy"], not surely, took.ttft_ms.value) for one, took, surely, _ in good}
    assert all(keys[name(first)] <= keys[name(second)] for first, second in pairwise(found["meets"]))
    for plan in found["meets"]:
        one, took, surely, _ = next(entry for entry in good if name(entry[0]) == name(plan))
        assert plan["meets"] == ("surely" if surely else "likely")
        assert plan["ttft_ms"]["value"] == pytest.approx(took.ttft_ms.value) and plan["ttft_ms"]["kind"] == "predicted"
        assert plan["accuracy"]["accuracy"] == one["accuracy"] and plan["accuracy"]["kind"] == "measured"
        assert plan["accuracy"]["share"] == pytest.approx(one["accuracy"] / 0.9) and plan["accuracy"]["loses_to"] == one["loses_to"]
    if good:
        assert found["closest"] is None and not found["relax"]
        return
    def distance(off: dict[str, float]) -> float:
        return math.prod(max(ratio, 1) for ratio in off.values())
    assert distance(next(off for one, _, _, off in seen if name(one) == name(found["closest"]))) == pytest.approx(min(distance(e[3]) for e in seen))
    for option in most:
        others = [off[option] for *_, off in seen if all(ratio <= 1 for key, ratio in off.items() if key != option)]
        told = [one for one in found["relax"] if one["limit"] == option]
        if others:
            value = told[0]["value"] * (0.9 if given_[option].endswith("%") else 1)
            assert told[0]["alone"] and (most[option] / value if option == "--min-accuracy" else value / most[option]) == pytest.approx(min(others))
            again = asked(folder, "--sweep", folder, *(part for key, text in given_.items() for part in
                                                       (key, told[0]["needed"] if key == option else text)))
            assert again["meets"], "what was suggested does not help"
        else:
            assert not any(one["alone"] for one in told)
    if not any(one["alone"] for one in found["relax"]):
        together = {one["limit"]: one["needed"] for one in found["relax"]}
        again = asked(folder, "--sweep", folder, *(part for pair in {**given_, **together}.items() for part in pair))
        assert name(found["closest"]) in map(name, again["meets"]), "all that was suggested together does not help"


def test_surely_goes_before_likely_and_accuracy_before_both():
    """Of two that are as accurate, the slower one is surely small enough."""
    took = known(64, 0, "fp16")

    def plan(accuracy: float, ttft: float, most_bytes: float) -> Plan:
        memory = dataclasses.replace(took.memory_bytes, value=1.0, low=1.0, high=most_bytes)
        prediction = dataclasses.replace(took, ttft_ms=dataclasses.replace(took.ttft_ms, value=ttft), memory_bytes=memory)
        return Plan(Choice(64, 64.0, 64), "fp16", prediction, Measured(accuracy, accuracy, accuracy, 100.0, (), ""))
    likely, surely, best = plan(80.0, 10.0, 5.0), plan(80.0, 20.0, 1.0), plan(81.0, 30.0, 5.0)
    assert answer([likely, surely, best], [Limit("memory_bytes", "--max-memory", "2B", 2.0)]).meets == (best, surely, likely)


# --- what is known and what is not

def test_precisions_that_were_not_measured_never_meet_an_accuracy(config, sweep):
    """int4 alone is fast enough a token; it is offered, behind the answer, with no accuracy."""
    best = min(known(32, 0, precision).tpot_ms.value for precision in ("fp16", "int8"))
    limit = f"{(known(N, 0, 'int4').tpot_ms.value + best) / 2:.2f}ms"
    found = asked(config, "--sweep", sweep, "--max-tpot", limit, "--min-accuracy", "50%")
    assert not found["meets"] and {plan["precision"] for plan in found["not_measured"]} == {"int4"}
    assert all(plan["accuracy"] is None and "--min-accuracy" not in plan["limits"] for plan in found["not_measured"])
    assert [one["plan"]["precision"] for one in found["relax"]] == ["fp16"]
    places = [place(plan) for plan in found["not_measured"]]
    assert len(places) == len(set(places)), "one plan of those that take the same time"
    told = {place(one): max(other["accuracy"] for other in rows() if place(other) == place(one)) for one in rows()}
    best_of = {name(one): one["accuracy"] for one in rows()}
    assert all(best_of[name(plan)] == told[place(plan)] for plan in found["not_measured"])
    said = run(config, "--sweep", sweep, "--max-tpot", limit, "--min-accuracy", "50%")[1]
    assert "None of 65 plans meet" in said and "What comes closest" in said and "Whose accuracy was not measured" in said


def test_a_sweep_of_quantized_weights_tells_of_these_alone(config, tmp_path):
    folder = write(tmp_path / "int4", rows(), precision="fp16", weights="int4")
    found = asked(config, "--sweep", folder, "--min-accuracy", "50%")
    assert {plan["precision"] for plan in found["meets"]} == {"int4"} and {plan["precision"] for plan in found["not_measured"]} == {"fp16", "int8"}
    both = asked(config, "--sweep", write(tmp_path / "fp16", rows(1)), "--sweep", folder, "--min-accuracy", "50%")
    assert {plan["precision"] for plan in both["meets"]} == {"fp16", "int4"} and {plan["precision"] for plan in both["not_measured"]} == {"int8"}


def test_of_two_sweeps_what_both_have_is_there_once(config, tmp_path):
    folders = [write(tmp_path / f"{n}", rows(n)[:20]) for n in (0, 1)]
    found = asked(config, "--sweep", folders[0], "--sweep", folders[1], "--min-accuracy", "1%")
    assert len(found["meets"]) == 20 and {plan["accuracy"]["sweep"] for plan in found["meets"]} == {str(folders[0])}
    code, said = run(config, "--sweep", folders[0], "--sweep", folders[0], "--min-accuracy", "1%")
    assert code == 0 and f"The first is the plan 'full' of {folders[0] / 'bundle'}" in said, "one folder given twice"


def test_a_cut_in_the_tower_is_said_to_be_an_upper_bound(config, sweep):
    found = asked(config, "--sweep", sweep, "--max-ttft", "60s")
    assert all(plan["upper_bound"] == (plan["sites"] == ["encoder:4"]) for plan in found["meets"])


def test_without_a_sweep_budgets_by_precision(config):
    found = asked(config, "--max-ttft", "60s", "--visual-tokens", 200)
    keeps = [200, 192, 150, 128, 100, 64, 50]
    assert [(plan["precision"], plan["keep"]) for plan in found["meets"]] == [(p, k) for p in ("fp16", "int8", "int4") for k in keeps]
    assert all(plan["accuracy"] is None and plan["method"] is None for plan in found["meets"])
    said = run(config, "--max-ttft", "60s", "--visual-tokens", 200)[1]
    assert "edgecomp sweep MODEL -o sweep --method NAME --keep 192 --keep 150" in said and "random and pool, the baselines to beat" in said
    text = asked(config, "--max-ttft", "60s", "--visual-tokens", 200, "--prompt-tokens", 300, "--context", 1000)["request"]
    assert (text["prompt_tokens"], text["context"], text["visual_tokens"]) == (300, 1000, 200)


def test_a_language_model_has_precisions_alone(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAVA["text_config"] | {"model_type": "llama"}))
    assert [(plan["precision"], plan["keep"]) for plan in asked(path, "--max-ttft", "60s")["meets"]] == [("fp16", 0), ("int8", 0), ("int4", 0)]


def test_what_does_not_fit_the_device_is_no_answer(config):
    """A 7B in fp16 on 8 GB, whatever else is asked; the device's memory is what would have to give."""
    found = asked(config, "--max-ttft", "60s", "--visual-tokens", N, "--context", 4000, device="jetson-orin-nano-8gb")
    assert not found["meets"] and [one["limit"] for one in found["relax"]] == ["the memory of jetson-orin-nano-8gb"]
    assert found["relax"][0]["plan"]["precision"] == "int4"
    line = refused(config, "--max-memory", "8GiB", "--visual-tokens", N, device="jetson-orin-nano-8gb")
    assert "--max-memory 8GiB is more than the 6.90GiB that jetson-orin-nano-8gb has beside its system" in line


def test_a_power_mode_is_a_device_of_its_own(config):
    slow, fast = (asked(config, "--max-ttft", "60s", "--visual-tokens", N, device=device) for device in (f"{DEVICE}@15W", DEVICE))
    assert (slow["device"], fast["device"]) == (f"{DEVICE}@15W", DEVICE)
    assert slow["meets"][0]["ttft_ms"]["value"] > 1.2 * fast["meets"][0]["ttft_ms"]["value"]


def test_several_pictures_are_whole_ones(config, sweep):
    found = asked(config, "--sweep", sweep, "--max-ttft", "60s", "--visual-tokens", 2 * N)
    plan = next(plan for plan in found["meets"] if name(plan) == ("cls", "projector", 64))
    took = predict(SHAPE, devices.load(DEVICE), Request(2 * N + 64, 2 * N + 64, 2 * N, 128), weights="fp16")
    assert plan["ttft_ms"]["value"] == pytest.approx(took.ttft_ms.value)
    assert "are no whole pictures" in refused(config, "--sweep", sweep, "--max-ttft", "1s", "--visual-tokens", N + 1)


def without_int8(*args: Any, weights: str) -> Prediction:
    """A device that int8 cannot be predicted for."""
    if weights == "int8":
        raise EdgecompError("nobody measured it")
    return predict(*args, weights=weights)


def test_a_sweep_in_a_precision_that_cannot_be_predicted(config, sweep, tmp_path, monkeypatch):
    """What else was measured is ranked as without it; where nothing else was, an accuracy cannot be asked for, and the reason is said."""
    asking = (config, "--sweep", sweep, "--min-accuracy", "50%")
    before = asked(*asking)
    monkeypatch.setattr("edgecomp.fit.plans.predict", without_int8)
    folder = write(tmp_path / "int8", rows(), weights="int8")
    for found in (asked(*asking), asked(*asking, "--sweep", folder)):
        assert found["meets"] == before["meets"] and found["refused"] == {"int8": "nobody measured it"}
        assert {plan["precision"] for plan in found["not_measured"]} == {"int4"}
    code, said = run(config, "--sweep", folder, "--max-ttft", "60s")
    assert code == 0 and "Cannot be predicted:\n  int8: nobody measured it" in said and "accuracy" not in said.partition("\n\n")[2]
    assert refused(config, "--sweep", folder, "--min-accuracy", "50%") == (
        "edgecomp: --min-accuracy 50%: none of the plans was measured in fp16, but in int8, which cannot be predicted (nobody measured it): sweep "
        "the model in fp16, or leave the limit out")


def test_a_precision_that_cannot_be_predicted_is_named_with_the_reason(config, monkeypatch):
    monkeypatch.setattr("edgecomp.fit.plans.predict", without_int8)
    code, said = run(config, "--max-ttft", "60s", "--visual-tokens", N)
    assert code == 0 and "Cannot be predicted:\n  int8: nobody measured it" in said and "int4" in said
    monkeypatch.setattr("edgecomp.fit.plans.predict", lambda *args, weights: without_int8(*args, weights="int8"))
    assert refused(config, "--max-ttft", "60s", "--visual-tokens", N) == "edgecomp: nobody measured it"


@pytest.mark.parametrize("cuts", [[(8, 288), (16, 144), (24, 72)], [(0, 288), (2, 72)], [(0, 64), (16, 32)], [(2, 64)], [(0, 64)]])
def test_several_cuts_as_one(cuts):
    """Their operations and cache as the sum over stretches between cuts."""
    counts = [N] * LAYERS
    for layer, keep in cuts:
        counts[layer:] = [keep] * (LAYERS - layer)

    def stretch(keep: int, layer: int) -> Work:
        return work(SHAPE, "prefill", prompt_tokens=N + 64, context=N + 64, visual_tokens=N, keep=keep, cut_layer=layer)
    flops = stretch(cuts[0][1], cuts[0][0]).flops["fp16"]
    cache = stretch(cuts[0][1], cuts[0][0]).cache_write_bytes
    for (_, before), (layer, keep) in pairwise(cuts):
        flops += stretch(keep, layer).flops["fp16"] - stretch(before, layer).flops["fp16"]
        cache += stretch(keep, layer).cache_write_bytes - stretch(before, layer).cache_write_bytes
    sites = tuple(f"decoder:{layer}" if layer else "projector" for layer, _ in cuts)
    one = stretch(*Choice(counts[-1], sum(counts) / LAYERS, counts[0], sites=sites).as_one_cut(N, LAYERS))
    assert one.flops["fp16"] == pytest.approx(flops, rel=0.005)
    assert one.cache_write_bytes == pytest.approx(cache, rel=0.005)


# --- a bundle, and what cannot be read

@pytest.fixture(scope="module")
def swept(demo: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep by the command, of one question, of the demonstration model with two plans."""
    folder, few = tmp_path_factory.mktemp("swept") / "sweep", tmp_path_factory.mktemp("few") / "bundle"
    shutil.copytree(demo, few, copy_function=os.link)
    manifest = Bundle.open(demo).manifest
    manifest = dataclasses.replace(manifest, plans={name: manifest.plans[name] for name in ("full", "dart-64")}, default_plan="full")
    (few / "edgecomp.json").unlink()  # which is a link to the other's
    (few / "edgecomp.json").write_text(manifest.to_json())
    result = CliRunner().invoke(main, ["sweep", str(few), "-o", str(folder), "--method", "fastv", "--keep", "64", "--seeds", "0", "--data",
                                       str(scenes / "questions.jsonl"), "--limit", "1", "--repeats", "0"])
    assert result.exit_code == 0, result.output
    return folder


def test_a_bundle_is_predicted_by_its_own_graphs_with_accuracies_of_a_real_sweep(swept):
    found = asked(swept / "bundle", "--sweep", swept, "--max-ttft", "60s")
    plans = {plan["plans"][0]: plan for plan in found["meets"]}
    others = {plan["plans"][0]: plan for plan in found["not_measured"]}
    measured = {row["plans"][0]: row for row in json.loads((swept / "sweep.json").read_text())["rows"]}
    assert set(plans) == set(measured) >= {"full", "fastv-64-decoder2", "pool-64"} and all(plan["accuracy"] for plan in plans.values())
    assert set(others) == {"dart-64"} and others["dart-64"]["accuracy"] is None
    for plan in ("full", "fastv-64-decoder2"):
        assert plans[plan]["accuracy"]["accuracy"] == measured[plan]["accuracy"]
        result = CliRunner().invoke(main, ["predict", str(swept / "bundle"), "--plan", plan, "--device", DEVICE, "--prompt-tokens", str(N + 64),
                                           "--json"])
        alone = json.loads(result.stdout)
        assert plans[plan]["ttft_ms"] == alone["ttft_ms"] and plans[plan]["memory_bytes"] == alone["memory_bytes"]
    without = asked(swept / "bundle", "--max-ttft", "60s")
    assert {plan["plans"][0] for plan in without["meets"]} == {*plans, *others} and all(plan["accuracy"] is None for plan in without["meets"])
    assert "--visual-tokens is not for a bundle" in refused(swept / "bundle", "--max-ttft", "60s", "--visual-tokens", N)
    config = asked(ROOT / "examples" / "scenes-llava", "--sweep", swept, "--max-ttft", "60s")
    assert {plan["plans"][0]: plan["accuracy"]["accuracy"] for plan in config["meets"]} == {name: row["accuracy"] for name, row in measured.items()}


@pytest.mark.parametrize(("change", "said"), [
    (lambda table: None, "cannot be read"), (lambda table: "{", "is not JSON"), (lambda table: [], "a table is expected"),
    (lambda table: {**table, "rows": 3}, "rows"), (lambda table: {**table, "rows": [{"method": "cls"}]}, "missing field"),
    (lambda table: {**table, "rows": table["rows"][1:]}, "the full model was not measured"),
    (lambda table: {**table, "rows": [*table["rows"], row("cls", "projector", 64, math.nan)]}, "an accuracy of nan"),
    (lambda table: {**table, "rows": [*table["rows"], row("cls", "projector", 577, 50.0)]}, "of 576"),
    (lambda table: {**table, "rows": [*table["rows"], {**table["rows"][1], "sites": ["decoder:x"]}]}, "'decoder:x', which is no site"),
    (lambda table: {**table, "bundle": {**table["bundle"], "hidden": 320}}, "give a sweep of this model"),
])
def test_a_sweep_that_is_none_is_one_clear_line(config, tmp_path, change, said):
    folder = write(tmp_path / "sweep", rows())
    file = folder / "sweep.json"
    changed = change(json.loads(file.read_text()))
    file.unlink()
    if changed is not None:
        file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    line = refused(config, "--sweep", folder, "--max-ttft", "1s")
    assert said in line and str(folder) in line


def test_what_contradicts_itself_is_one_clear_line(config, sweep, tmp_path):
    assert "nothing is asked for" in refused(config)
    assert "--min-accuracy 95% needs accuracies" in refused(config, "--min-accuracy", "95%", "--visual-tokens", N)
    assert "say with --visual-tokens" in refused(config, "--max-ttft", "1s")
    assert "exceeds --prompt-tokens 100" in refused(config, "--max-ttft", "1s", "--sweep", sweep, "--prompt-tokens", 100)
    assert "--context 9999 exceeds" in refused(config, "--max-ttft", "1s", "--sweep", sweep, "--context", 9999)
    assert "did you mean 'jetson-agx-orin-64gb'" in refused(config, "--max-ttft", "1s", device="jetson-agx-orin-64g")
    other = write(tmp_path / "other", [{**one, "questions": 100} for one in rows()])
    assert "cannot be ranked together" in refused(config, "--max-ttft", "1s", "--sweep", sweep, "--sweep", other)


def test_a_config_needs_no_onnx_and_no_torch(config, sweep):
    code = ("import sys; from edgecomp.cli import main\n"
            f"try: main(['fit', {str(config)!r}, '--sweep', {str(sweep)!r}, '--device', {DEVICE!r}, '--max-ttft', '9s'])\n"
            "except SystemExit: pass\n"
            "print({'onnx', 'onnx_ir', 'onnxruntime', 'torch', 'transformers'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()" and "65 plans meet" in done.stdout.splitlines()[0]


def test_an_amount_has_a_unit_of_its_kind():
    with pytest.raises(InputError, match="has no unit"):
        limits("4", None, None, None)
