"""`edgecomp quantize` and `compile --weights`: what they write and say, and how they refuse."""
from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import test_bad_input
from click.testing import CliRunner, Result

from edgecomp.cli import main
from edgecomp_runtime import Bundle, Session

refused = test_bad_input.refused


def run(*args: object) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def compiled(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle with one plan in fp32, and beside it `int4`, the same compiled to int4."""
    folder = tmp_path_factory.mktemp("quantize")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    run("compile", tiny, "-o", folder / "fp32", "--no-verify", "--method", "stride", "--keep", "9")
    run("compile", tiny, "-o", folder / "int4", "--no-verify", "--method", "stride", "--keep", "9", "--weights", "int4", "--block", "16")
    return folder


def test_compile_quantizes_what_quantize_does(compiled: Path, tmp_path: Path) -> None:
    result = run("quantize", compiled / "fp32", "-o", tmp_path / "out", "--weights", "int4", "--block", "16")
    assert result.stderr.startswith("quantizing 14 weights in int4 and 1 weights in int8, in blocks of 16; the other ")
    assert result.stderr.endswith(f"{tmp_path / 'out'} is ready\n") and not result.stdout
    mine, theirs = Bundle.open(tmp_path / "out").manifest, Bundle.open(compiled / "int4").manifest
    assert mine == theirs and mine.default_plan == "stride-9" and set(mine.plans) == {"full", "stride-9"}


def test_compile_lowers_what_it_quantized_and_nothing_before(tiny: Path, tmp_path: Path) -> None:
    said = run("compile", tiny, "-o", tmp_path / "out", "--method", "stride", "--keep", "9", "--weights", "int8").stderr.splitlines()
    lowered = [line for line in said if line.startswith("lowering ")]
    assert lowered == ["lowering full for onnxruntime", "lowering stride-9 for onnxruntime"]
    assert said.index(lowered[0]) > next(n for n, line in enumerate(said) if line.startswith("quantizing "))


def test_inspect_says_it(compiled: Path) -> None:
    assert "; 14 in int4 and 1 in int8, in blocks of 16\n" in run("inspect", compiled / "int4").stdout
    told = json.loads(run("inspect", compiled / "int4", "--json").stdout)["quantized"]
    assert (told["precision"], told["block"]) == ("int4", 16) and told["bits"]["lm_head.weight"] == 8
    assert " in int" not in run("inspect", compiled / "fp32").stdout


def test_a_quantized_bundle_answers_and_compresses_further(compiled: Path, tmp_path: Path, scenes: Path) -> None:
    picture = scenes / "images" / "scene-03.jpg"
    answers = [Session(Bundle.open(compiled / name)).generate("what is this?", [picture], max_new_tokens=4) for name in ("fp32", "int4")]
    for answer in answers:
        answer.finish()
    printed = run("run", compiled / "int4", "--image", picture, "--prompt", "what is this?", "--max-new-tokens", "4").stdout
    assert printed.strip() == answers[1].text.strip()
    run("compress", compiled / "int4", "-o", tmp_path / "more", "--method", "random", "--keep", "4", "--site", "decoder:1")
    said = Session(Bundle.open(tmp_path / "more")).generate("what is this?", [picture], max_new_tokens=4)
    said.finish()
    assert Bundle.open(tmp_path / "more").manifest.quantized == Bundle.open(compiled / "int4").manifest.quantized and said.token_ids


@pytest.mark.parametrize(("options", "message"), [
    (["--weights", "int-4"], "unknown precision of weights 'int-4'; did you mean 'int4'? (known: int4, int8)"),
    (["--weights", "int4", "--block", "64"], "model.language_model.layers.0.mlp.down_proj.weight is 96 wide, which blocks of 64 do not divide: "
     "choose --block 16 or 32, or --unquantized 'model.language_model.layers.0.mlp.down_proj.weight'"),
    (["--weights", "int8", "--block", "0"], "blocks of 0 are none that there are kernels for: choose --block 16, 32, 64, 128, 256"),
    (["--weights", "int8", "--unquantized", "*norm*"], "--unquantized '*norm*' is the name of none of the 15 weights that int8 is for, such as "
     "model.language_model.layers.0.self_attn.q_proj.weight, model.language_model.layers.0.self_attn.k_proj.weight"),
])
def test_what_cannot_be_quantized_is_refused_in_one_line(compiled: Path, tmp_path: Path, refused: Any, options: list[str], message: str) -> None:
    shutil.copytree(compiled / "fp32", tmp_path / "bundle")
    assert refused("quantize", tmp_path / "bundle", "-o", tmp_path / "bundle", *options) == message


def test_a_quantized_bundle_is_refused(compiled: Path, tmp_path: Path, refused: Any) -> None:
    assert refused("quantize", compiled / "int4", "-o", tmp_path / "out", "--weights", "int8") == (
        f"{compiled / 'int4'} has weights in int4 already: quantize the bundle that it was made from")


@pytest.mark.parametrize("command", ["compile", "quantize"])
@pytest.mark.parametrize(("options", "message"), [
    (["--block", "32"], "--block goes with --weights"),
    (["--block", "32", "--activations", "int8", "--calibration", "."], "--block goes with --weights"),
    (["--unquantized", "lm_head.*"], "--unquantized goes with --weights or --activations"),
])
def test_options_without_weights_are_refused(tmp_path: Path, refused: Any, command: str, options: list[str], message: str) -> None:
    assert refused(command, tmp_path, "-o", tmp_path / "out", *options, code=2) == message


def test_bits_that_there_are_not_are_refused_before_the_export(tmp_path: Path, refused: Any) -> None:
    assert refused("compile", tmp_path, "-o", tmp_path / "out", "--weights", "nf4") == "unknown precision of weights 'nf4' (known: int4, int8)"


def test_a_release_that_lacks_the_bits_says_so(compiled: Path, tmp_path: Path, refused: Any) -> None:
    said = refused("pack", compiled / "int4", "--device", "jetson-orin-nano-8gb", "--jetpack", "6.2", "-o", tmp_path / "out.tar", busy=True)
    assert said.startswith("tensorrt-10.3 does not take the prefill graph of this plan: DequantizeLinear: lm_head.weight is in blocks of int8, and "
                           "tensorrt-10.3 takes blocks of int4 alone: quantize with --weights int4 --unquantized 'lm_head.*'")
