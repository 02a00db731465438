"""`--activations int8` of `edgecomp quantize` and `compile`: what they write and say, and how they refuse."""
from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import test_quantize_command

from edgecomp_runtime import Bundle, Session

refused, run = test_quantize_command.refused, test_quantize_command.run


@pytest.fixture(scope="module")
def pictures(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    for n in range(5):
        shutil.copy(scenes / "images" / f"scene-{n:02d}.jpg", folder)
    return folder


@pytest.fixture(scope="module")
def made(tiny: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle with one plan in `fp32`, and the same compiled with a tower in int8 and weights in int4 to `both`."""
    folder = tmp_path_factory.mktemp("calibrated")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    compiled = ["compile", tiny, "--no-verify", "--method", "stride", "--keep", "9"]
    run(*compiled, "-o", folder / "fp32")
    run(*compiled, "-o", folder / "both", *asked(pictures, "--calibration-images", "3"), "--weights", "int4", "--block", "16")
    return folder


def asked(pictures: Path, *more: str) -> list[object]:
    return ["--activations", "int8", "--calibration", pictures, *more]


def test_compile_does_what_quantize_does(made: Path, pictures: Path, tmp_path: Path) -> None:
    options = ["--weights", "int4", "--block", "16", *asked(pictures, "--calibration-images", "3")]
    result = run("quantize", made / "fp32", "-o", tmp_path / "out", *options)
    assert "14 weights in int4 and 1 weights in int8, in blocks of 16, and the 8 products of the vision graph in int8; the other " in result.stderr
    assert Bundle.open(tmp_path / "out").manifest == Bundle.open(made / "both").manifest


def test_the_manifest_says_what_was_looked_at(made: Path, pictures: Path, tmp_path: Path) -> None:
    """The pictures by their hashes, which the seed draws, and nothing of the decoder."""
    everything = {hashlib.sha256(path.read_bytes()).hexdigest() for path in pictures.iterdir()}
    found = []
    for seed in ("0", "1"):
        run("quantize", made / "fp32", "-o", tmp_path / seed, *asked(pictures, "--calibration-images", "2", "--calibration-seed", seed))
        manifest = Bundle.open(tmp_path / seed).manifest
        assert manifest.calibrated is not None and manifest.quantized is None and manifest.weights == "fp32"
        assert (manifest.calibrated.activations, manifest.calibrated.choice, manifest.calibrated.seed) == ("int8", "random", int(seed))
        assert len(set(manifest.calibrated.images)) == 2 and everything.issuperset(manifest.calibrated.images)
        found.append(manifest.calibrated.images)
    assert found[0] != found[1]
    run("quantize", made / "fp32", "-o", tmp_path / "all", *asked(pictures, "--calibration-images", "5", "--calibration-choice", "cover"))
    cover = Bundle.open(tmp_path / "all").manifest.calibrated
    assert cover is not None and cover.choice == "cover" and set(cover.images) == everything


def test_inspect_says_it(made: Path) -> None:
    assert "; 14 in int4 and 1 in int8, in blocks of 16; the vision graph's products in int8, calibrated on 3 pictures\n" in run(
        "inspect", made / "both").stdout
    assert len(json.loads(run("inspect", made / "both", "--json").stdout)["calibrated"]["images"]) == 3
    assert "pictures\n" not in run("inspect", made / "fp32").stdout


def test_it_answers(made: Path, scenes: Path) -> None:
    picture = scenes / "images" / "scene-13.jpg"
    exact, mine = (Session(Bundle.open(made / name), plan="stride-9").visual_tokens(picture).tokens for name in ("fp32", "both"))
    assert 0 < abs(exact - mine).max() < 0.05 * abs(exact).max()
    printed = run("run", made / "both", "--image", picture, "--prompt", "what is this?", "--max-new-tokens", "4").stdout
    said = Session(Bundle.open(made / "both")).generate("what is this?", [picture], max_new_tokens=4)
    assert printed.strip() == said.finish().strip()


PREFIX = "model.vision_tower.encoder.layers.0.self_attn."


@pytest.mark.parametrize(("options", "message", "code"), [
    (["--activations", "int8"], "--activations int8 needs --calibration, a folder of pictures such as the model will see", 2),
    (["--weights", "int8", "--calibration", "{pictures}"], "--calibration and its choices go with --activations int8", 2),
    (["--weights", "int8", "--calibration-seed", "1"], "--calibration and its choices go with --activations int8", 2),
    ([], "nothing is asked for: --weights int8 or int4, --activations int8, or both", 2),
    (["--activations", "int8", "--calibration", "{pictures}", "--block", "32"], "--block goes with --weights", 2),
    (["--activations", "int4", "--calibration", "{pictures}"], "unknown precision of activations 'int4'; did you mean 'int8'? (known: int8)", 1),
    (["--activations", "int8", "--calibration", "{pictures}", "--calibration-choice", "rando"],
     "unknown choice of calibration pictures 'rando'; did you mean 'random'? (known: cover, random)", 1),
    (["--activations", "int8", "--calibration", "{pictures}", "--unquantized", "lm_head.*"],
     f"--unquantized 'lm_head.*' is the name of none of the 8 weights that int8 is for, such as {PREFIX}q_proj.weight, {PREFIX}k_proj.weight", 1),
    (["--weights", "int8", "--activations", "int8", "--calibration", "{pictures}", "--unquantized", "model.language_model.*", "--unquantized",
      "lm_head.*"], "--unquantized leaves none of the 15 weights that --weights is for: leave out --weights, or one --unquantized", 1),
    (["--weights", "int8", "--activations", "int8", "--calibration", "{pictures}", "--unquantized", "model.vision_tower.*", "--unquantized",
      "*projector*"], "--unquantized leaves none of the 8 weights that --activations is for: leave out --activations, or one --unquantized", 1),
    (["--activations", "int8", "--calibration", "{tmp}/away"], "{tmp}/away: no such folder of pictures to calibrate on", 1),
    (["--activations", "int8", "--calibration", "{tmp}/empty"], "{tmp}/empty has no pictures to calibrate on (.jpg, .jpeg, .png, .webp, .bmp, .gif, "
     ".tif, .tiff): give some of what the model will see", 1),
    (["--activations", "int8", "--calibration", "{pictures}"], "{pictures} has 5 pictures, and 32 are asked for: give more, or ask for 5 with "
     "--calibration-images 5", 1),
])
def test_what_cannot_be_done_is_said_in_one_line(made: Path, pictures: Path, tmp_path: Path, refused: Any, options: list[str], message: str,
                                                 code: int) -> None:
    (tmp_path / "empty").mkdir()
    given = [option.format(pictures=pictures, tmp=tmp_path) for option in options]
    assert refused("quantize", made / "fp32", "-o", tmp_path / "out", *given, code=code, busy=True) == message.format(pictures=pictures, tmp=tmp_path)


@pytest.mark.parametrize("choice", ["random", "cover"])
def test_a_broken_picture_is_named(made: Path, pictures: Path, tmp_path: Path, refused: Any, choice: str) -> None:
    shutil.copytree(pictures, tmp_path / "pictures")
    (tmp_path / "pictures" / "scene-02.jpg").write_bytes((pictures / "scene-02.jpg").read_bytes()[:2000])
    options = asked(tmp_path / "pictures", "--calibration-images", "5", "--calibration-choice", choice)
    said = refused("quantize", made / "fp32", "-o", tmp_path / "out", *options, busy=True)
    assert str(tmp_path / "pictures" / "scene-02.jpg") in said


def test_a_folder_without_pictures_is_refused_before_the_export(tmp_path: Path, refused: Any) -> None:
    (tmp_path / "empty").mkdir()
    said = refused("compile", tmp_path, "-o", tmp_path / "out", *asked(tmp_path / "empty"))
    assert said.startswith(f"{tmp_path / 'empty'} has no pictures to calibrate on")
