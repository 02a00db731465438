"""Every command at work on the demonstration model: what it prints is what the bundle and the library say."""
from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgecomp import __version__, devices, methods
from edgecomp.cli import COMMANDS, main
from edgecomp_runtime.bundle import Bundle, sha256_of


def stdout(*args: object) -> str:
    """What a command prints. It must succeed."""
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    return result.stdout


def told(*args: object) -> Any:
    return json.loads(stdout(*args, "--json"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    text = stdout(command, "--help")
    assert text.startswith(f"Usage: main {command} ") and text == stdout(command, "-h")
    assert f"{command} {COMMANDS[command][1]}" in " ".join(stdout("--help").split())  # long lines wrap


def test_help_lists_the_commands_in_the_order_of_the_table() -> None:
    text = stdout("--help")
    listed = [line.split()[0] for line in text[text.index("Commands:"):].splitlines()[1:] if line.startswith("  ") and not line.startswith("   ")]
    assert listed == list(COMMANDS)


def test_version() -> None:
    assert stdout("--version") == f"edgecomp {__version__}\n"


def test_methods() -> None:
    rows = told("methods")
    assert [row["name"] for row in rows] == list(methods.METHODS)
    assert {row["name"]: row["parameters"] for row in rows} == {
        **{name: {} for name in methods.METHODS}, "random": {"seed": 0}, "dart": {"pivots": 8}, "cdpruner": {"sign": 1}, "pyramiddrop": {"cuts": 3},
        "hiprune": {"alpha": 0.1, "layer": -1}, "vispruner": {"important": 50, "step": 64}, "visionzip": {"share": 84.375, "mean": 0, "columns": 0}}
    assert {row["name"] for row in rows if row["needs_prompt"]} == {"dart", "cdpruner", "fastv", "pyramiddrop", "sparsevlm"}
    lines = stdout("methods").splitlines()
    assert lines[0].split() == ["method", "kind", "sites", "reads", "the", "prompt", "parameters", "keeps", "paper"]
    assert [line.split()[0] for line in lines[1:]] == list(methods.METHODS)


def test_inspect(demo: Path) -> None:
    manifest = Bundle.open(demo).manifest
    assert told("inspect", demo) == json.loads(json.dumps(dataclasses.asdict(manifest)))
    text = stdout("inspect", demo)
    assert "576 visual tokens a picture, 336x336 pixels; other shapes are cropped; 9 layers" in text
    assert "8 layers, 5 heads (1 of keys and values)" in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.split()[:1] and line.split()[0] in manifest.plans}
    assert list(rows) == list(manifest.plans)
    for name, row in rows.items():
        plan, row = manifest.plans[name], [cell for cell in row if cell != "*"]
        # keys and values of 8 layers, one head of 64, 4 bytes a number
        mebibytes = f"{2 * 8 * 64 * 4 * plan.cache_rows[0] / 2**20:.1f}"
        assert row[1:] == [str(plan.visual_tokens), str(2048 - 576 + plan.visual_tokens), mebibytes, "keep", "onnxruntime"]
    assert [name for name, row in rows.items() if "*" in row] == [manifest.default_plan]


def test_doctor() -> None:
    found = told("doctor")
    ability = found["abilities"]["run bundles on ONNX Runtime"]
    assert ability == {"ok": True, "packages": {"onnxruntime": importlib.metadata.version("onnxruntime")}, "advice": ""}
    assert found["machine"]["memory_bytes"] > 2**28 and found["machine"]["cores"] >= 1
    lines = stdout("doctor").splitlines()
    for name, ability in found["abilities"].items():
        line, = [line for line in lines if f" {name}: " in line]
        assert line.startswith("yes " if ability["ok"] else "no  ")
        assert ability["ok"] or f"     {ability['advice']}" == lines[lines.index(line) + 1]


def test_devices() -> None:
    assert [device["id"] for device in told("devices")] == list(devices.names())
    assert told("devices", "rtx-4090") == json.loads(json.dumps(dataclasses.asdict(devices.load("rtx-4090"))))
    assert stdout("devices", "rtx-4090").startswith(devices.load("rtx-4090").name)


def test_run_streams_the_text_that_its_json_has(demo: Path, scenes: Path) -> None:
    ask = ("run", demo, "--plan", "dart-64", "--image", scenes / "images" / "scene-03.jpg", "--prompt", "what number is written?")
    answer, = told(*ask)
    assert stdout(*ask) == answer["answer"] + "\n"
    assert answer["plan"] == "dart-64" and answer["backend"] == "onnxruntime" and answer["stopped_by"] == "end"
    assert (answer["visual_tokens_in"], answer["visual_tokens_kept"], answer["reused_rows"]) == (576, 64, 0)
    assert answer["vision_ms"] > 0 and answer["prefill_ms"] > 0 and answer["first_token_ms"] > answer["prefill_ms"]


def test_run_stops_and_shows_statistics(demo: Path, scenes: Path) -> None:
    ask = ["run", str(demo), "--plan", "cls-64", "--image", str(scenes / "images" / "scene-03.jpg"), "--prompt", "describe the image."]
    whole = CliRunner().invoke(main, [*ask, "--stats"])
    word = whole.stdout.split()[3]
    short = CliRunner().invoke(main, [*ask, "--stop", word])
    assert short.stdout.strip() == whole.stdout[:whole.stdout.index(word)].strip() != ""
    assert "cls-64 on onnxruntime: 576 visual tokens, 64 kept; " in whole.stderr and "stopped by end" in whole.stderr and short.stderr == ""


def test_a_second_turn_reuses_the_rows_and_the_picture_of_the_first(demo: Path, scenes: Path) -> None:
    first, second = told("run", demo, "--plan", "cls-64", "--image", scenes / "images" / "scene-03.jpg",
                         "--prompt", "what number is written?", "--prompt", "what color is the star?")
    assert first["reused_rows"] == 0 and second["prompt_rows"] > first["prompt_rows"]
    assert second["reused_rows"] >= first["prompt_rows"]  # with the first turn's answer, too
    assert second["vision_ms"] < first["vision_ms"] / 5
    assert second["answer"]


def test_eval_is_what_run_answers(demo: Path, scenes: Path) -> None:
    questions = [json.loads(line) for line in (scenes / "questions.jsonl").read_text().splitlines()[:5]]
    found = told("eval", demo, "--plan", "dart-64", "--data", scenes / "questions.jsonl", "--limit", 5)
    said = [told("run", demo, "--plan", "dart-64", "--image", scenes / q["image"], "--prompt", q["question"])[0]["answer"] for q in questions]

    def same(a: str, b: str) -> bool:
        return " ".join(a.lower().split()).rstrip(".") == " ".join(b.lower().split()).rstrip(".")
    right = [same(answer, q["answer"]) for answer, q in zip(said, questions)]
    assert 0 < sum(right) < len(right), "choose questions of which some are answered right and some wrong"
    assert found["plan"] == "dart-64" and found["questions"] == 5
    assert found["accuracy"] == pytest.approx(100 * sum(right) / 5)
    tasks = Counter(q["task"] for q in questions)
    assert found["by_task"] == pytest.approx({t: 100 * sum(r for r, q in zip(right, questions) if q["task"] == t) / n for t, n in tasks.items()})
    assert found["wrong"] == [{"image": str(scenes / q["image"]), "question": q["question"], "answer": q["answer"], "said": answer}
                              for q, answer, r in zip(questions, said, right) if not r]


@pytest.mark.parametrize("plan", ["full", "dart-64"])
def test_verify_finds_the_bundle_equal_to_the_model(plan: str, demo: Path, checkpoint: Path, scenes: Path) -> None:
    found = told("verify", demo, "--whole", "--plan", plan, "--model", checkpoint, "--data", scenes / "questions.jsonl", "--limit", 2)
    assert found["plan"] == plan and found["good"] is True and found["differ"] == []
    assert found["questions"] == found["same_text"] == 2
    assert 0 < found["logits"] <= found["tolerance"] == 1e-4  # nothing compared with itself is this far from zero


def test_verify_finds_another_model_different(demo: Path, checkpoint: Path, scenes: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    for path in other.glob("*.safetensors"):
        save_file({name: tensor * 0.5 if "multi_modal_projector" in name else tensor for name, tensor in load_file(path).items()}, path,
                  metadata={"format": "pt"})
    result = CliRunner().invoke(main, ["verify", str(demo), "--whole", "--plan", "full", "--model", str(other),
                                       "--data", str(scenes / "questions.jsonl"), "--limit", "1", "--json"])
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["good"] is False and found["logits"] > found["tolerance"]


def test_export_then_compress_is_compile(demo: Path, checkpoint: Path, tmp_path: Path) -> None:
    exported = CliRunner().invoke(main, ["export", str(checkpoint), "-o", str(tmp_path / "neutral")])
    assert exported.exit_code == 0 and exported.stdout == ""
    # keys and values of 8 layers, one head of 64, 4 bytes a number, for 576 rows
    assert exported.stderr.splitlines()[0] == (f"a picture: 336x336 pixels, 576 visual tokens of the window's 2048 rows, "
                                               f"{2 * 8 * 64 * 4 * 576 / 2**20:.1f} MiB of KV cache (3 pictures a prompt at most)")
    stored = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert re.search(r"^weights: ([\d.]+) GiB in fp32, as much disk; the checkpoint's ([\d.]+) GiB are mapped, ", exported.stderr.splitlines()[1])
    assert f"the checkpoint's {stored / 2**30:.2f} GiB" in exported.stderr
    neutral = Bundle.open(tmp_path / "neutral").manifest
    assert list(neutral.plans) == ["full"] and list(neutral.plans["full"].variants) == ["neutral"]
    stdout("compress", tmp_path / "neutral", "-o", tmp_path / "out", "--method", "cls", "--method", "dart", "--keep", "64")
    made, compiled = Bundle.open(tmp_path / "out"), Bundle.open(demo)
    assert list(made.manifest.plans) == ["full", "cls-64", "dart-64"] and made.manifest.default_plan == "cls-64"
    assert {name: info for name, info in compiled.manifest.files.items() if name in made.manifest.files} == made.manifest.files
    for name, info in made.manifest.files.items():
        assert info.sha256 == sha256_of(tmp_path / "out" / name) == sha256_of(demo / name), name
    assert {name: plan for name, plan in compiled.manifest.plans.items() if name in made.manifest.plans} == made.manifest.plans


def test_compress_in_place(demo: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(demo, bundle, copy_function=os.link)
    weights = (bundle / "graphs" / "weights.bin").stat().st_ino
    stdout("compress", bundle, "-o", bundle, "--method", "random:seed=5", "--keep", "1%", "--position", "compact")
    plan = Bundle.open(bundle).manifest.plans["random-6-seed5-compact"]
    assert (plan.visual_tokens, plan.position, plan.steps[0].parameters) == (6, "compact", {"seed": 5})
    assert (bundle / "graphs" / "weights.bin").stat().st_ino == weights, "weights are shared, not copied"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    answer, = told("run", bundle, "--prompt", "x", "--max-new-tokens", 2)
    assert answer["plan"] == "random-6-seed5-compact"
