"""Verification layer by layer: it passes what is right, and names the graph, layer and tensor where something is wrong."""
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from transformers import LlavaForConditionalGeneration

from edgecomp import methods
from edgecomp.cli import main
from edgecomp.compile import compile_model
from edgecomp.compress import Recipe, compress
from edgecomp_export import layerwise
from edgecomp_export.layerwise import Check, VerificationError, verify_layers
from edgecomp_runtime import Bundle

PICTURES = [np.random.default_rng(n).integers(0, 256, (90, 120, 3), np.uint8) for n in range(2)]
QUESTION = "what is this?"


@pytest.fixture(scope="module")
def source(compiled: Callable[..., tuple[Path, Path]]) -> Path:
    return compiled(tiny, "mistral-window")[0]


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def bundle(request: pytest.FixtureRequest, compiled: Callable[..., tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    _, neutral = compiled(tiny, "mistral-window", request.param)
    out = tmp_path_factory.mktemp(request.param) / "bundle"
    compress(neutral, out, [Recipe.of(methods.make("dart"), "7"), Recipe.of(methods.make("cls"), "5"), Recipe.of(methods.make("pool"), "4")])
    return Bundle.open(out)


@pytest.fixture
def exported(compiled: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The export is the one that was made before: what is tried comes behind it."""
    _, neutral = compiled(tiny, "mistral-window")
    monkeypatch.setattr("edgecomp_export.export.export", lambda model, out, **_: Path(shutil.copytree(neutral, out)))


def first_bad(checks: list[Check]) -> Check:
    return next(check for check in checks if not check.good)


def test_a_right_bundle_is_good_everywhere(bundle: Bundle) -> None:
    checks = verify_layers(bundle, PICTURES, QUESTION)
    assert all(check.good for check in checks)
    assert [c.layer for c in checks if c.graph == "decoder"] == [0, 1, 2], "the window is 9 rows, so a wrong mask would show"
    assert {c.layer for c in checks if c.graph == "vision"} == {0, 1, 2, None}, "the fourth layer's output is not used"
    plans = {check.tensor for check in checks if check.graph == "vision" and check.layer is None}
    assert plans == {f"visual_tokens of plan {name}" for name in ("dart-7", "cls-5", "pool-4")}


def change(weight: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        model = LlavaForConditionalGeneration.from_pretrained(folder)
        with torch.no_grad():
            dict(model.named_parameters())[weight].view(-1)[5] += 0.5
        model.save_pretrained(folder)
    return edit


def other_mean(folder: Path) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_mean": [0.5, 0.5, 0.5]}))


def narrower_window(folder: Path) -> None:
    """A change of the config alone, which no weight shows."""
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    settings["text_config"]["sliding_window"] = 4
    path.write_text(json.dumps(settings))


def other_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("{%", "please {%", 1))


@pytest.mark.parametrize("bundle", ["fp32"], indirect=True)
@pytest.mark.parametrize(("edit", "expected"), [
    (change("model.vision_tower.encoder.layers.1.mlp.fc1.weight"), ("vision", 1, "the hidden state behind it")),
    (change("model.vision_tower.embeddings.patch_embedding.weight"), ("vision", 0, "the first hidden state")),
    (change("model.multi_modal_projector.linear_2.weight"), ("vision", 2, "visual_tokens")),
    (change("model.language_model.layers.1.self_attn.k_proj.weight"), ("decoder", 1, "the hidden state behind it")),
    (change("model.language_model.norm.weight"), ("decoder", 2, "logits")),
    (other_mean, ("pixels", None, "pixels")),
    (narrower_window, ("decoder", 0, "the hidden state behind it")),
    (other_template, ("prompt", None, "ids")),
])
def test_the_first_place_where_they_part_is_named(bundle: Bundle, source: Path, tmp_path: Path, edit: Callable[[Path], None],
                                                  expected: tuple[str, int | None, str]) -> None:
    folder = shutil.copytree(source, tmp_path / "changed")
    edit(folder)
    bad = first_bad(verify_layers(bundle, PICTURES, QUESTION, model=str(folder)))
    assert (bad.graph, bad.layer, bad.tensor) == expected
    assert bad.difference > 2 * bad.tolerance


def test_compile_refuses_what_differs_and_writes_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgecomp_export.families import llava
    honest = llava.project
    monkeypatch.setattr(llava, "project", lambda model, pixels: honest(model, pixels) * 1.001)
    with pytest.raises(VerificationError, match="vision graph, layer 2: visual_tokens differs by"):
        compile_model(str(source), tmp_path / "bundle", [], verify=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("exported")
def test_a_plan_that_mixes_up_its_rows_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgecomp.methods import base
    honest = base.gather
    monkeypatch.setattr(base, "gather", lambda op, features, indices: honest(op, features, op.Sub(op.Add(indices, [1]), [0])))
    with pytest.raises(VerificationError, match="visual_tokens of plan stride-4 differs by"):
        compile_model(str(source), tmp_path / "bundle", [Recipe.of(methods.make("stride"), "4")], verify=True)


def test_a_chat_template_without_a_place_for_pictures_is_refused(source: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(source, tmp_path / "changed")
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<image>", "<picture>"))
    with pytest.raises(VerificationError, match="has <image> 0 times for 2 pictures: the checkpoint's template is not its model's"):
        compile_model(str(folder), tmp_path / "bundle", [], verify=True)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.usefixtures("exported")
def test_compile_verifies_from_the_command_line(source: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["compile", str(source), "-o", str(tmp_path / "bundle"), "--method", "dart", "--keep", "7"])
    assert done.exit_code == 0, done.output
    assert "verified against Hugging Face" in done.stderr
    checked = CliRunner().invoke(main, ["verify", str(tmp_path / "bundle"), "--json"])
    assert checked.exit_code == 0 and json.loads(checked.stdout)["good"]
    change("model.language_model.layers.0.mlp.up_proj.weight")(changed := shutil.copytree(source, tmp_path / "changed"))
    other = CliRunner().invoke(main, ["verify", str(tmp_path / "bundle"), "--model", str(changed)])
    assert other.exit_code == 1
    assert "NOT GOOD" in other.stdout and "they part at the decoder graph, layer 0" in other.stdout


@pytest.mark.parametrize("bundle", ["fp32"], indirect=True)
def test_made_up_pictures_have_the_expected_shape(bundle: Bundle) -> None:
    assert [p.shape for p in layerwise.pictures(bundle.manifest)] == [(70, 70, 3)] * 2
