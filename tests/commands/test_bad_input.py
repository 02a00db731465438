"""Every bad input to a command: no traceback, one line that says what and the way out, nothing lost and nothing left behind."""
from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from edgecomp.cli import main
from edgecomp_runtime.bundle import Bundle

SCENE = Path(__file__).parents[2] / "examples" / "scenes" / "images" / "scene-03.jpg"
GRAPH, WEIGHTS, TOKENIZER, TEMPLATE = "graphs/vision.onnx", "graphs/weights.bin", "text/tokenizer.json", "text/chat_template.jinja"
DAMAGEABLE = {"manifest": "edgecomp.json", "graph": "graphs/vision.dart-64.onnxruntime.onnx", "weights": WEIGHTS, "tokenizer": TOKENIZER,
              "chat template": TEMPLATE}


def tree(folder: Path) -> dict[str, Any]:
    """Everything below a folder by name: what it is, and where it is small what is in it."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) and status.st_size < 2**20 else status.st_mtime_ns
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_ino, None if stat.S_ISDIR(status.st_mode) else content)
    return found


def message(lines: list[str], code: int) -> str:
    """The one line of an error. Before it stands click's usage (code 2), or what was being done; never a second error or a traceback."""
    assert lines, "nothing was said"
    start = "Error: " if code == 2 else "edgecomp: "
    assert [line for line in lines if line.startswith(("Error", "edgecomp: ", "Traceback", "  File ", "Exception ignored"))] == lines[-1:], lines
    assert lines[-1].startswith(start), lines
    if code == 2:
        assert lines[0].startswith("Usage: ") and len(lines) == 4, lines
    return lines[-1].removeprefix(start)


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must fail, and gives its message. `tmp_path` has to look as before."""
    def run(*args: object, code: int = 1, busy: bool = False) -> str:
        before = tree(tmp_path)
        result = CliRunner().invoke(main, [str(a) for a in args])
        assert isinstance(result.exception, SystemExit), repr(result.exception)
        assert result.exit_code == code
        assert result.stdout == ""
        assert tree(tmp_path) == before
        lines = result.stderr.splitlines()
        assert busy or code == 2 or len(lines) == 1, lines  # busy: it tells what it does before it fails
        return message(lines, code)
    return run


@pytest.fixture
def copy(demo: Path, tmp_path: Path) -> Path:
    """A bundle of one's own to damage. Its files are links to the demonstration's: replace them, never write into them."""
    shutil.copytree(demo, tmp_path / "copy", copy_function=os.link)
    return tmp_path / "copy"


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def digest(data: dict[str, Any]) -> str:
    """As the manifest's own rule has it; written anew here, so that a change of the rule shows."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def rewrite(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the manifest and gives it the digest that fits, as somebody with bad intentions would."""
    data = json.loads((bundle / "edgecomp.json").read_text())
    data.pop("digest")
    change(data)
    replace(bundle / "edgecomp.json", json.dumps({**data, "digest": digest(data)}).encode())


def test_a_rewritten_manifest_opens_so_that_the_tests_below_reach_the_checks_behind_the_digest(copy: Path) -> None:
    def rename(data: dict[str, Any]) -> None:
        data["source"]["model"] = "somebody/else"
    rewrite(copy, rename)
    assert Bundle.open(copy).manifest.source.model == "somebody/else"


# ---- checkpoints ----

@pytest.fixture
def model(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own to damage, its weights linked."""
    shutil.copytree(checkpoint, tmp_path / "model", copy_function=lambda a, b: (os.symlink if a.endswith(".safetensors") else shutil.copy)(a, b))
    return tmp_path / "model"


def reconfigure(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((model / "config.json").read_text())
    change(data)
    (model / "config.json").write_text(json.dumps(data))


def reweigh(model: Path, change: Callable[[str, Any], dict[str, Any]]) -> tuple[str, tuple[int, ...]]:
    """Puts other tensors in the place of the first down_proj.weight. Returns its name and shape."""
    from safetensors.torch import load_file, save_file
    weights = sorted(model.glob("*.safetensors"))[0]
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensor = tensors.pop(name)
    made = change(name, tensor)
    weights.unlink()
    save_file(tensors | {new: value.clone() for new, value in made.items()}, weights, metadata={"format": "pt"})
    index = json.loads((model / "model.safetensors.index.json").read_text())
    del index["weight_map"][name]
    index["weight_map"] |= dict.fromkeys(made, weights.name)
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return name, tuple(tensor.shape)


@pytest.mark.parametrize("command", ["compile", "export"])
def test_a_model_that_does_not_exist(command: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    said = refused(command, tmp_path / "nothing", "-o", tmp_path / "a" / "b" / "out")
    assert said == f"{tmp_path}/nothing is not a folder, and not the name of a model on the Hugging Face hub (org/name)"


@pytest.mark.parametrize("command", ["compile", "export"])
def test_a_folder_that_is_no_checkpoint(command: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "notes.txt").write_text("nothing to see")
    assert refused(command, tmp_path, "-o", tmp_path / "out") == f"{tmp_path} is not a Hugging Face checkpoint: it has no config.json"


def test_a_config_without_weights(model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    for path in model.glob("*.safetensors"):
        path.unlink()
    assert refused("compile", model, "-o", tmp_path / "out") == (
        f"{model} has no safetensors weights; convert it with transformers' save_pretrained first")


def test_a_file_instead_of_a_folder(model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    said = refused("compile", model / "config.json", "-o", tmp_path / "out")
    assert said == f"{model}/config.json is a file: give the checkpoint's folder, which holds config.json and the weights"


@pytest.mark.parametrize(("config", "telling"), [
    ('{"model_type": "llavaa"}', "unknown model family 'llavaa'; did you mean 'llava'? (known: "),
    ('{"model_type": "llava",', "config.json cannot be read (Expecting property name"),
    ("[1, 2]", "config.json is not a JSON object but [1, 2]: download the checkpoint again"),
    ('{"architectures": []}', "config.json names no model_type: save the model with transformers' save_pretrained"),
    ("[" * 100_000, "config.json cannot be read (maximum recursion depth"),
])
def test_a_config_that_cannot_be_used(config: str, telling: str, model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (model / "config.json").write_text(config)
    assert telling in refused("compile", model, "-o", tmp_path / "out")


def test_a_checkpoint_cut_short(model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    weights = next(model.glob("*.safetensors"))
    content = weights.read_bytes()
    replace(weights, content[:len(content) // 2])
    said = refused("compile", model, "-o", tmp_path / "out")
    assert said == f"{weights} has {len(content) // 2} bytes and should have {len(content)}: download the checkpoint again"


@pytest.mark.parametrize("length", [0, 5, 8, 100])
def test_a_checkpoint_cut_short_in_its_head(length: int, model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    weights = next(model.glob("*.safetensors"))
    replace(weights, weights.read_bytes()[:length])
    said = refused("export", model, "-o", tmp_path / "out")
    assert said.startswith(f"{weights} is not a safetensors file (") and said.endswith("): download the checkpoint again")


HEADS_THAT_ARE_NONE = {
    "list": b"[]", "number for a tensor": b'{"a": 1}', "tensor without offsets": b'{"a": {"dtype": "F32"}}', "not JSON": b"{a}",
    "not UTF-8": b'{"\xff": 1}', "nested too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("kind", [*HEADS_THAT_ARE_NONE, "length of everything", "pointer to git-lfs"])
def test_weights_that_are_none(kind: str, model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    weights = next(model.glob("*.safetensors"))
    if kind in HEADS_THAT_ARE_NONE:
        head = HEADS_THAT_ARE_NONE[kind]
        replace(weights, len(head).to_bytes(8, "little") + head)
    else:
        replace(weights, b"\xff" * 8 + b"{}" if kind == "length of everything" else b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    assert refused("export", model, "-o", tmp_path / "out").startswith(f"{weights} is not a safetensors file (")


def test_a_checkpoint_that_lacks_a_file(model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    weights = sorted(model.glob("*.safetensors"))[1]
    weights.unlink()
    said = refused("export", model, "-o", tmp_path / "out", busy=True)
    assert said.startswith(f"transformers cannot load {model} (") and weights.name in said and said.endswith("download the checkpoint again")


def test_a_checkpoint_that_lacks_a_weight_is_not_filled_up_with_random_numbers(model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    lost, _ = reweigh(model, lambda name, tensor: {})
    said = refused("compile", model, "-o", tmp_path / "out", busy=True)
    assert f"{model} lacks 1 of the model's weights" in said and lost.rpartition("layers.")[2] in said


def test_a_weight_that_the_model_has_no_use_for(model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    reweigh(model, lambda name, tensor: {name: tensor, "model.vision_tower.gate.weight": tensor})
    said = refused("export", model, "-o", tmp_path / "out", busy=True)
    assert said == (f"{model} has 1 weights that a llava model does not, model.vision_tower.gate.weight among them: "
                    "its config.json is of another model")


def test_a_weight_of_another_shape(model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    changed, shape = reweigh(model, lambda name, tensor: {name: tensor[:-1].contiguous()})
    said = refused("export", model, "-o", tmp_path / "out", busy=True)
    stored, wanted = [shape[0] - 1, *shape[1:]], list(shape)
    assert said.startswith(f"{model} has weights of another shape than its config.json says, 1 in all: ")
    assert changed.rpartition("layers.")[2] in said and said.endswith(f" is {stored} and should be {wanted}; download the checkpoint again")


def test_what_transformers_thinks_of_the_weights_is_not_shown(model: Path, tmp_path: Path) -> None:
    """Its table goes to the real stderr, which click's runner does not see."""
    reweigh(model, lambda name, tensor: {name: tensor, "model.vision_tower.gate.weight": tensor})
    result = subprocess.run([sys.executable, "-m", "edgecomp", "export", str(model), "-o", str(tmp_path / "out")], capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert [line.partition(":")[0] for line in result.stderr.splitlines()] == ["a picture", "weights", "edgecomp"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


KINDS_OF_WEIGHTS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I8": "int8", "U8": "uint8"}


@pytest.mark.parametrize("kind", KINDS_OF_WEIGHTS)
def test_weights_that_mean_nothing_without_their_scales(kind: str, model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    import torch
    changed, _ = reweigh(model, lambda name, tensor: {name: tensor.to(getattr(torch, KINDS_OF_WEIGHTS[kind]))})
    assert refused("export", model, "-o", tmp_path / "out") == (
        f"{model} is quantised ({changed} is {kind}): give the checkpoint in bf16, fp16 or fp32 that it was made from")


@pytest.mark.parametrize(("where", "settings", "method"), [
    ("", {"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"), ("", {"load_in_8bit": True}, "method unknown"),
    ("", {"quant_method": "fp8"}, "fp8"), ("", "int4", "int4"), ("text_config", {"quant_method": "hqq", "bits": 4}, "hqq"),
])
def test_a_quantised_checkpoint(where: str, settings: object, method: str, model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    reconfigure(model, lambda config: (config[where] if where else config).update(quantization_config=settings))
    assert refused("compile", model, "-o", tmp_path / "out") == (
        f"{model} is quantised ({method}): give the checkpoint in bf16, fp16 or fp32 that it was made from, or one of gptq or awq")


@pytest.mark.parametrize("model_type", ["mllama", "idefics2", "blip-2", "qwen2_audio", "clip"])
def test_a_family_that_transformers_has_and_edgecomp_has_not(model_type: str, model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    reconfigure(model, lambda config: config.update(model_type=model_type))
    said = refused("compile", model, "-o", tmp_path / "out")
    start, _, known = said.partition(": it can ")
    assert start == f"{model} is a {model_type} model, which edgecomp cannot export"
    assert {"llava", "qwen2_vl"} <= set(known.split(", ")) and known.split(", ") == sorted(known.split(", "))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text"])
def test_a_text_only_model(model_type: str, model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    reconfigure(model, lambda config: config.update(model_type=model_type))
    said = refused("export", model, "-o", tmp_path / "out")
    assert said == f"{model} ({model_type}) is a text-only model: edgecomp compiles models that take pictures"


def test_code_that_comes_with_a_checkpoint_is_not_run(model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    names = {"AutoConfig": "configuration_x.XConfig", "AutoModel": "modeling_x.X"}
    reconfigure(model, lambda config: config.update(model_type="internvl_chat", auto_map=names))
    for name in ("configuration_x", "modeling_x"):
        (model / f"{name}.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\nclass X: pass\nclass XConfig: pass\n")
    said = refused("export", model, "-o", tmp_path / "out")
    assert said == (f"{model} (internvl_chat) brings its own model code, which edgecomp does not run: "
                    "look for a conversion to transformers' own classes, whose names often end in -hf")


def test_code_beside_a_known_family_is_not_run_either(model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    reconfigure(model, lambda config: config.update(auto_map={"AutoModelForImageTextToText": "modeling_x.X", "AutoConfig": "modeling_x.X"}))
    (model / "modeling_x.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\nclass X: pass\n")
    reweigh(model, lambda name, tensor: {})  # so that it ends before it traces
    refused("export", model, "-o", tmp_path / "out", busy=True)


def test_a_config_that_transformers_refuses(model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    reconfigure(model, lambda config: config["text_config"].update(num_attention_heads="many"))
    said = refused("export", model, "-o", tmp_path / "out")
    assert said.startswith(f"transformers cannot read {model}/config.json (") and said.endswith("): download the checkpoint again")
    assert "num_attention_heads" in said


@pytest.mark.parametrize("choice", [["--image-size", "224x224"], ["--tiles", 2], ["--no-tiles"]])
def test_a_choice_without_effect(choice: list[object], model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    said = refused("compile", model, "-o", tmp_path / "out", *choice)
    name, reason = ("--image-size", "have one size") if choice[0] == "--image-size" else ("--tiles", "are not cut up")
    assert said == f"{name} has no effect on a llava model, whose pictures {reason}: leave it out"


def test_more_pictures_than_the_window_holds(model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    said = refused("export", model, "-o", tmp_path / "out", "--max-images", 4, "--context", 2304)
    assert said == ("a window of 2304 rows does not hold 4 x 576 visual tokens: "
                    "choose a larger --context, smaller pictures or fewer --max-images")


@pytest.mark.parametrize(("change", "telling"), [
    ({"image_mean": None}, "the image processor has no image_mean of 3 channels"),
    ({"image_std": [1, 2]}, "the image processor has no image_std of 3 channels"),
    ({"crop_size": 224}, "makes pictures of (224, 224), the vision tower takes (336, 336)"),
])
def test_an_image_processor_that_does_not_fit(change: dict[str, Any], telling: str, model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    settings = json.loads((model / "processor_config.json").read_text())
    settings["image_processor"] |= change
    (model / "processor_config.json").write_text(json.dumps(settings))
    assert telling in refused("export", model, "-o", tmp_path / "out", busy=True)


def test_a_window_larger_than_the_model_was_trained_for(checkpoint: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    said = refused("export", checkpoint, "--context", 5000, "-o", tmp_path / "out", busy=True)
    assert said == "--context 5000 exceeds the 4096 positions that this model was trained for"


# ---- budgets and methods ----

@pytest.mark.parametrize(("keep", "telling"), [
    ("0", "a budget of 0 is outside what this model has there: choose 1 to 576 visual tokens"),
    ("577", "a budget of 577 is outside what this model has there: choose 1 to 576 visual tokens"),
    ("-3", "a budget of -3 is outside what this model has there: choose 1 to 576 visual tokens"),
    ("abc", "a budget of 'abc' is neither a count such as 64 nor a part such as 25%"),
    ("6.5", "a budget of '6.5' is neither a count such as 64 nor a part such as 25%"),
    ("", "a budget of '' is neither a count such as 64 nor a part such as 25%"),
    ("0%", "a budget of 0% is outside what this model has there: choose 1 to 576 visual tokens, or a part up to 100%"),
    ("-1%", "a budget of -1% is outside what this model has"),
    ("101%", "a budget of 101% is outside what this model has"),
    ("nan%", "a budget of 'nan%' is neither a count such as 64 nor a part such as 25%"),
    ("inf%", "a budget of 'inf%' is neither a count such as 64 nor a part such as 25%"),
])
def test_a_budget_that_no_picture_has(keep: str, telling: str, demo: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert telling in refused("compress", demo, "-o", tmp_path / "out", "--method", "dart", "--keep", keep)


def test_pooling_to_a_prime_names_the_nearest_budgets(demo: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    said = refused("compress", demo, "-o", tmp_path / "out", "--method", "pool", "--keep", 127)
    assert said.startswith("pool cannot make 127 tokens of a 24x24 grid") and said.endswith("the nearest budgets are 126 and 128")


@pytest.mark.parametrize("command", ["compile", "compress"])
@pytest.mark.parametrize(("options", "telling"), [
    (["--keep", 64], "--method and --keep go together"),
    (["--method", "dart"], "--method and --keep go together"),
    (["--position", "compact"], "--position is of the tokens that a method keeps, and there is no --method"),
    (["--method", "random:seed=x", "--keep", 64], "--method random:seed=x: 'seed=x' is not PARAMETER=NUMBER"),
    (["--method", "random:seed", "--keep", 64], "--method random:seed: 'seed' is not PARAMETER=NUMBER"),
])
def test_options_that_do_not_go_together(command: str, options: list[object], telling: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert telling in refused(command, tmp_path, "-o", tmp_path / "out", *options, code=2)


@pytest.mark.parametrize(("method", "telling"), [
    ("dartt", "unknown method 'dartt'; did you mean 'dart'? (known: cdpruner, cls, dart, divprune, fastv, grid, hiprune, pool, pyramiddrop, random, "
     "sparsevlm, stride, tome, visionzip, vispruner)"),
    ("", "unknown method '' (known: cdpruner, cls, dart, divprune, fastv, grid, hiprune, pool, pyramiddrop, random, "
     "sparsevlm, stride, tome, visionzip, vispruner)"),
    ("dart:pivot=3", "method 'dart' has no parameter 'pivot'; it has pivots"),
    ("pool:seed=1", "method 'pool' has no parameter 'seed' (it has none)"),
    ("dart:pivots=0", "dart needs at least one pivot, not 0"),
])
def test_a_method_that_there_is_not(method: str, telling: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert refused("compress", tmp_path, "-o", tmp_path / "out", "--method", method, "--keep", 64) == telling


# ---- names and usage ----

@pytest.mark.parametrize(("args", "telling"), [
    (["run", "BUNDLE", "--prompt", "x", "--plan", "dart-65"], "unknown plan 'dart-65'; did you mean 'dart-64'? (known: cls-128"),
    (["run", "BUNDLE", "--prompt", "x", "--plan", ""], "unknown plan '' (known: cls-128"),
    (["eval", "BUNDLE", "--data", "QUESTIONS", "--plan", "ful"], "unknown plan 'ful'; did you mean 'full'?"),
    (["profile", "BUNDLE", "--plan", "pool-65"], "unknown plan 'pool-65'; did you mean 'pool-64'?"),
    (["run", "BUNDLE", "--prompt", "x", "--backend", "onnxruntim"],
     "unknown backend 'onnxruntim'; did you mean 'onnxruntime'? (known: auto, null, onnxruntime, onnxruntime-cuda, tensorrt, tensorrt-rtx)"),
    (["devices", "rtx-409"], "did you mean 'rtx-4090'?"),
])
def test_a_name_that_is_in_no_table(args: list[str], telling: str, demo: Path, scenes: Path, refused: Callable[..., str]) -> None:
    places = {"BUNDLE": demo, "QUESTIONS": scenes / "questions.jsonl"}
    assert telling in refused(*(places.get(a, a) for a in args))


@pytest.mark.parametrize(("args", "telling"), [
    (["comple"], "unknown command 'comple'; did you mean 'compile'? (known: build, compile, compress, "),
    (["run"], "Missing argument 'BUNDLE'."),
    (["run", "b"], "Missing option '--prompt'."),
    (["compile", "m"], "Missing option '-o' / '--output'."),
    (["run", "b", "--promt", "x"], "No such option '--promt'"),
    (["run", "b", "--prompt", "x", "--max-new-tokens", "0"], "Invalid value for '--max-new-tokens': 0 is not in the range x>=1."),
    (["run", "b", "--prompt", "x", "--threads", "0"], "Invalid value for '--threads': 0 is not in the range 1<=x<=1024."),
    (["run", "b", "--prompt", "x", "--threads", "100000"], "Invalid value for '--threads': 100000 is not in the range 1<=x<=1024."),
    (["run", "b", "--prompt", "x", "--stop", ""], "--stop is empty"),
    (["run", "b", "--raw", "--prompt", "x", "--prompt", "y"], "--raw takes one prompt: further turns need the chat template"),
    (["eval", "b"], "Missing option '--data'."),
    (["eval", "b", "--data", "d", "--limit", "0"], "Invalid value for '--limit': 0 is not in the range x>=1."),
    (["verify", "b", "--whole", "--data", "d", "--image", "i"], "--data has its own pictures and questions: leave out --image and --prompt"),
    (["verify", "b", "--whole", "--data", "d", "--prompt", "p"], "--data has its own pictures and questions: leave out --image and --prompt"),
    (["verify", "b", "--data", "d"], "--data goes with --whole: layer by layer, all plans are compared on the same pictures"),
    (["verify", "b", "--limit", "2"], "--limit goes with --whole"),
    (["verify", "b", "--plan", "full"], "--plan goes with --whole"),
    (["verify", "b", "--threads", "2"], "--threads goes with --whole"),
    (["verify", "b", "--prompt", "x", "--prompt", "y"], "several --prompt go with --whole"),
    (["export", "m", "-o", "b", "--image-size", "0x5"], "Invalid value for '--image-size': '0x5' is not HEIGHTxWIDTH in pixels, such as 480x640"),
    (["export", "m", "-o", "b", "--image-size", "abc"], "Invalid value for '--image-size': 'abc' is not HEIGHTxWIDTH in pixels"),
    (["compile", "m", "-o", "b", "--image-size", "336"], "Invalid value for '--image-size': '336' is not HEIGHTxWIDTH in pixels"),
    (["compile", "m", "-o", "b", "--image-size", "-5x5"], "Invalid value for '--image-size': '-5x5' is not HEIGHTxWIDTH in pixels"),
    (["compile", "m", "-o", "b", "--image-size", "3x4x5"], "Invalid value for '--image-size': '3x4x5' is not HEIGHTxWIDTH in pixels"),
    (["export", "m", "-o", "b", "--tiles", "0"], "Invalid value for '--tiles': 0 is not in the range x>=1."),
    (["export", "m", "-o", "b", "--tiles", "two"], "Invalid value for '--tiles': 'two' is not a valid integer range."),
    (["compile", "m", "-o", "b", "--max-images", "0"], "Invalid value for '--max-images': 0 is not in the range x>=1."),
    (["profile", "b", "--images", "2"], "--images limits the questions of --data, and there is no --data"),
    (["profile", "b", "-o", "no/such/report.html"], "no/such is not a folder"),
    (["profile", "b", "-o", "/"], "/ is a folder, and the report is one file: name it, such as /report.html"),
    (["compile", "m", "-o", "b", "--precision", "int3"], "Invalid value for '--precision': 'int3' is not one of 'fp32', 'fp16'."),
])
def test_usage(args: list[str], telling: str, refused: Callable[..., str]) -> None:
    assert telling in refused(*args, code=2)


# ---- pictures ----

def picture(kind: str, folder: Path) -> Path:
    whole = Image.open(SCENE)
    path = folder / f"{kind.replace(' ', '-')}.png"
    if kind == "1x1":
        whole.resize((1, 1)).save(path)
    elif kind == "20000 wide":
        whole.resize((20000, 30)).save(path)
    elif kind == "CMYK":
        whole.convert("CMYK").save(path := path.with_suffix(".jpg"))
    elif kind == "16-bit":
        Image.fromarray(np.asarray(whole.convert("L")).astype(np.uint16) << 8).save(path)
    elif kind == "animated":
        whole.save(path := path.with_suffix(".gif"), save_all=True, append_images=[whole.rotate(90)])
    elif kind == "clear and rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        rgba = whole.convert("RGBA")
        rgba.putalpha(120)
        rgba.save(path, exif=exif)
    return path


@pytest.mark.parametrize("kind", ["1x1", "20000 wide", "CMYK", "16-bit", "animated", "clear and rotated"])
def test_an_odd_picture_works(kind: str, demo: Path, tmp_path: Path) -> None:
    path = picture(kind, tmp_path)
    with Image.open(path) as made:  # the picture is as odd as it says
        odd = {"1x1": made.size == (1, 1), "20000 wide": made.size == (20000, 30), "CMYK": made.mode == "CMYK", "16-bit": made.mode.startswith("I"),
               "animated": getattr(made, "n_frames", 1) == 2, "clear and rotated": made.mode == "RGBA" and made.getexif()[0x0112] == 6}
        assert odd[kind]
    result = CliRunner().invoke(main, ["run", str(demo), "--plan", "dart-64", "--image", str(path), "--prompt", "describe the image.",
                                       "--max-new-tokens", "2", "--json"])
    assert result.exit_code == 0, result.output
    assert (answer := json.loads(result.stdout)[0])["new_tokens"] == 2 and answer["answer"]


@pytest.mark.parametrize(("kind", "telling"), [
    ("missing", "no such file; give the path of a picture on this device"),
    ("cut short", "is damaged or cut short"),
    ("text", "is not a picture of a known format: convert it to PNG or JPEG"),
    ("empty", "is not a picture of a known format: convert it to PNG or JPEG"),
    ("folder", "cannot be read (Is a directory)"),
])
def test_a_picture_that_cannot_be_used(kind: str, telling: str, demo: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    path = tmp_path / "picture.jpg"
    content = SCENE.read_bytes()
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes({"cut short": content[:len(content) // 2], "text": b"not a picture at all", "empty": b""}[kind])
    said = refused("run", demo, "--plan", "dart-64", "--image", path, "--prompt", "describe the image.")
    assert said.startswith(str(path)) and telling in said


# ---- prompts and sampling ----

@pytest.mark.parametrize(("options", "telling"), [
    (["--prompt", ""], "the prompt is empty: ask something"),
    (["--prompt", " \n\t"], "the prompt is empty: ask something"),
    (["--prompt", "what is it? " * 2000], "rows, 0 of them visual tokens, which leaves no room for an answer in the window of 1536 rows"),
    (["--prompt", "x", "--temperature", "-1"], "temperature -1.0 is out of range: 0 is greedy, 0.2 to 1 is usual"),
    (["--prompt", "x", "--temperature", "nan"], "temperature nan is out of range"),
    (["--prompt", "x", "--temperature", "1", "--top-p", "0"], "top_p 0.0 is out of range: give one above 0 and up to 1"),
    (["--prompt", "x", "--top-p", "0.5"], "no effect at temperature 0, which is greedy: top_p 0.5; leave it out or give a temperature above 0"),
    (["--prompt", "x", "--seed", "7"], "no effect at temperature 0, which is greedy: seed 7; leave it out or give a temperature above 0"),
    (["--prompt", "x", "--temperature", "1", "--seed", "-7"], "seed -7 is negative: give 0 or more"),
    (["--prompt", "x <image>"], "the prompt has 1 places for images and 0 images were given: give one for each <image>"),
    (["--raw", "--prompt", "USER: what is it? ASSISTANT:", "--image", str(SCENE)], "the prompt has 0 places for images and 1 images were given"),
    (["--raw", "--prompt", "<image><image> x", "--image", str(SCENE)], "the prompt has 2 places for images and 1 images were given"),
    (["--raw", "--prompt", "<image> x", "--image", str(SCENE), "--image", str(SCENE)], "the prompt has 1 places for images and 2 images were given"),
])
def test_a_prompt_or_sampling_that_cannot_be(options: list[str], telling: str, demo: Path, refused: Callable[..., str]) -> None:
    assert telling in refused("run", demo, "--plan", "stride-64", "--backend", "null", *options)


def test_an_empty_further_turn(demo: Path) -> None:
    result = CliRunner().invoke(main, ["run", str(demo), "--backend", "null", "--max-new-tokens", "2", "--prompt", "x", "--prompt", ""])
    assert result.exit_code == 1 and message(result.stderr.splitlines(), 1) == "the prompt is empty: ask something"


# ---- bundles ----

READERS = {"run": ["--prompt", "x"], "inspect": [], "compress": ["--method", "dart", "--keep", "9", "-o", "OUT"], "profile": [],
           "eval": ["--data", "QUESTIONS"], "verify": []}


@pytest.mark.parametrize("command", READERS)
def test_a_bundle_that_does_not_exist(command: str, scenes: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    places = {"OUT": tmp_path / "out", "QUESTIONS": scenes / "questions.jsonl"}
    said = refused(command, tmp_path / "nothing", *(places.get(o, o) for o in READERS[command]))
    assert said == (f"{tmp_path}/nothing is not a bundle: edgecomp.json cannot be read (No such file or directory); "
                    "make one with `edgecomp compile MODEL -o BUNDLE`")


@pytest.mark.parametrize("kind", DAMAGEABLE)
def test_a_bundle_cut_short(kind: str, copy: Path, refused: Callable[..., str]) -> None:
    name = DAMAGEABLE[kind]
    content = (copy / name).read_bytes()
    replace(copy / name, content[:-100])
    said = refused("run", copy, "--prompt", "x")
    assert said.startswith("edgecomp.json is not JSON (" if kind == "manifest" else
                           f"{name} has {len(content) - 100} bytes and should have {len(content)}: the bundle was cut short")
    assert "compile it again" in said


@pytest.mark.parametrize("kind", DAMAGEABLE)
def test_a_bundle_with_one_changed_byte(kind: str, copy: Path, refused: Callable[..., str]) -> None:
    name = DAMAGEABLE[kind]
    content = bytearray((copy / name).read_bytes())
    at = content.index(b"scenes-llava") if kind == "manifest" else len(content) // 2
    content[at] ^= 1
    replace(copy / name, bytes(content))
    said = refused("run", copy, "--prompt", "x")
    assert f"{'edgecomp.json' if kind == 'manifest' else name} was changed after it was written" in said and "compile the bundle again" in said


@pytest.mark.parametrize("kind", ["graph", "weights", "tokenizer", "chat template"])
def test_a_bundle_that_lacks_a_file(kind: str, copy: Path, refused: Callable[..., str]) -> None:
    (copy / DAMAGEABLE[kind]).unlink()
    said = refused("run", copy, "--prompt", "x")
    assert said == f"{DAMAGEABLE[kind]} of the bundle cannot be read (No such file or directory): copy or compile the bundle again"


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data["files"][new] = data["files"].pop(old)
    return change


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "text/../../x", "..", "", "text\\..\\..\\x", "text/\0x", "text/\ud800", "text/a\nb"])
def test_a_manifest_with_a_path_that_leaves_the_bundle(name: str, copy: Path, refused: Callable[..., str]) -> None:
    rewrite(copy, renamed(TOKENIZER, name))
    assert refused("inspect", copy) == f"the bundle names the file {name!r}, which is not inside it: do not use this bundle"


@pytest.mark.parametrize("target", ["outside", "circle"])
def test_a_link_that_leaves_the_bundle(target: str, copy: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    outside = tmp_path / "tokenizer.json"
    shutil.copy(copy / TOKENIZER, outside)  # the very same content: only the place is wrong
    (copy / TOKENIZER).unlink()
    (copy / TOKENIZER).symlink_to(outside if target == "outside" else copy / TOKENIZER)
    assert refused("inspect", copy) == f"'{TOKENIZER}' is a link that leaves the bundle: do not use this bundle"


def test_a_folder_that_is_a_link_out_of_the_bundle(copy: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (copy / "text").rename(tmp_path / "elsewhere")
    (copy / "text").symlink_to(tmp_path / "elsewhere")
    assert refused("inspect", copy) == f"'{TEMPLATE}' is a link that leaves the bundle: do not use this bundle"


def test_a_pipe_in_the_bundle_does_not_hang(copy: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (copy / TOKENIZER).unlink()
    os.mkfifo(copy / TOKENIZER)
    assert refused("inspect", copy) == f"{TOKENIZER} of the bundle is not a file: copy or compile the bundle again"


def test_a_used_file_without_a_hash(copy: Path, refused: Callable[..., str]) -> None:
    rewrite(copy, lambda data: data["files"].pop(GRAPH))
    assert refused("inspect", copy) == f"{copy}: {GRAPH} is used but has no hash in edgecomp.json: compile the bundle again"


def deleted(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for name in path[:-1]:
            data = data[name]
        del data[path[-1]]
    return change


def put(value: Any, *path: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for name in path[:-1]:
            data = data[name]
        data[path[-1]] = value
    return change


@pytest.mark.parametrize(("change", "telling"), [
    (put(6, "schema"), "the bundle has schema 6, made by edgecomp 0.1.0; this reader knows up to 5: install edgecomp 0.1.0 or later"),
    (put(0, "schema"), "edgecomp.json has no schema number: this is not an edgecomp bundle"),
    (put("1", "schema"), "edgecomp.json has no schema number: this is not an edgecomp bundle"),
    (deleted("schema"), "edgecomp.json has no schema number: this is not an edgecomp bundle"),
    (deleted("plans"), "edgecomp.json: missing field plans: compile the bundle again"),
    (deleted("vision", "tokens"), "edgecomp.json: vision: missing field tokens: compile the bundle again"),
    (put(1, "extra"), "edgecomp.json: unknown field extra: compile the bundle again"),
    (put("576", "vision", "tokens"), "edgecomp.json: vision: tokens: '576' is not of the expected kind, a whole number: compile the bundle again"),
    (put(True, "vision", "tokens"), "edgecomp.json: vision: tokens: True is not of the expected kind, a whole number"),
    (put([1, 2], "image", "mean"), "edgecomp.json: image: mean: [1, 2] is not of the expected kind, a list of 3"),
    (put("x", "image", "shortest_edge"), "edgecomp.json: image: shortest_edge: 'x' is not of the expected kind, a whole number or null"),
    (put(list(range(10_000)), "files"), "edgecomp.json: files: [0, 1, 2, 3, "),
    (put([], "text"), "edgecomp.json: text: a table is expected, not []: compile the bundle again"),
    (deleted("plans", "full"), "edgecomp.json makes no sense: it has no plan 'full'; compile the bundle again"),
    (put("dart-9", "default_plan"), "edgecomp.json makes no sense: it has no plan 'dart-9', its default; compile the bundle again"),
    (put("bfloat17", "embeddings", "dtype"), "edgecomp.json makes no sense: it has embeddings of type 'bfloat17'; compile the bundle again"),
    (put(2**40, "embeddings", "offset"), "edgecomp.json makes no sense: it has embeddings [411, 320] in the -"),
    (put([2**40, 320], "embeddings", "shape"), f"edgecomp.json makes no sense: it has embeddings [{2**40}, 320] in the "),
    (put(2**40, "vision", "tokens"), f"edgecomp.json makes no sense: it has {2**40} visual tokens in a window of 2048 rows; compile"),
    (put(0, "vision", "tokens"), "edgecomp.json makes no sense: it has 0 visual tokens in a window of 2048 rows"),
    (put([], "vision", "tiles"), "edgecomp.json makes no sense: it has 1 runs of visual tokens for 0 tiles"),
    (put([{"start": 1, "rows": 24, "columns": 24, "stride": 24}], "vision", "tiles"),
     "edgecomp.json makes no sense: it has a tile of 24 x 24 tokens from 1, 24 apart, of 576; compile the bundle again"),
    (put([{"start": 0, "rows": 2**40, "columns": 24, "stride": 0}], "vision", "tiles"), "it has a tile of 1099511627776 x 24 tokens from 0, 0 apart"),
    (put([{"start": -1, "rows": 24, "columns": 24, "stride": 24}], "vision", "tiles"), "it has a tile of 24 x 24 tokens from -1, 24 apart, of 576"),
    (put(["a", "b", "c"], "vision", "texts"), "edgecomp.json makes no sense: it has 2 runs of visual tokens for 1 tiles"),
    (put([], "vision", "texts"), "edgecomp.json makes no sense: it has -1 runs of visual tokens for 1 tiles"),
    (put(2, "decoder", "position_axes"), "edgecomp.json makes no sense: it has 2 axes of positions for 1 tiles"),
    (put(577, "plans", "full", "visual_tokens"), "it has plan 'full' with 577 visual tokens of 576, [576] of the tiles; compile the bundle again"),
    (put([64, 512], "plans", "full", "tile_tokens"), "edgecomp.json makes no sense: it has plan 'full' with 2 parts for 1 tiles"),
    (put([], "plans", "full", "tile_tokens"), "edgecomp.json makes no sense: it has plan 'full' with "),
    (put([65], "plans", "dart-64", "tile_tokens"), "it has plan 'dart-64' with 64 visual tokens of 576, [65] of the tiles; compile the bundle again"),
    (put([], "plans", "full", "cache_rows"), "edgecomp.json makes no sense: it has plan 'full' with cache rows [], for 8 layers"),
    (put([2**60] * 8, "plans", "full", "cache_rows"), "edgecomp.json makes no sense: it has plan 'full' with cache rows [1152921504606846976, "),
    (put([{"layer": 8, "tile_tokens": [64]}], "plans", "full", "cuts"), "a cut before layer 8 of 8 to [64] of 576 visual tokens"),
    (put([{"layer": 2, "tile_tokens": [577]}], "plans", "full", "cuts"), "a cut before layer 2 of 8 to [577] of 576 visual tokens; compile"),
    (put([{"layer": 2, "tile_tokens": []}], "plans", "full", "cuts"), "a cut before layer 2 of 8 to [] of 576 visual tokens; compile"),
    (deleted("plans", "full", "variants", "onnxruntime", "vision"),
     "edgecomp.json makes no sense: it has plan 'full' with the onnxruntime graphs prefill, decode; compile the bundle again"),
])
def test_a_manifest_that_cannot_be(change: Callable[[dict[str, Any]], None], telling: str, copy: Path, refused: Callable[..., str]) -> None:
    rewrite(copy, change)
    said = refused("inspect", copy)
    assert telling in said and len(said) < 300


@pytest.mark.parametrize(("text", "telling"), [
    (b"", "edgecomp.json is not JSON (Expecting value"),
    (b"not JSON", "edgecomp.json is not JSON (Expecting value"),
    (b"[1]", "edgecomp.json has no schema number: this is not an edgecomp bundle"),
    (b"[" * 100_000, "edgecomp.json is not JSON (maximum recursion depth"),
    (b"\xff\xfe", "edgecomp.json cannot be read ('utf-8' codec"),
    (b'{"schema": 1}', "edgecomp.json was changed after it was written (its digest differs): compile the bundle again"),
    (b'{"schema": 9}', "the bundle has schema 9, made by a newer edgecomp; this reader knows up to 5: install a newer edgecomp or later"),
])
def test_a_manifest_that_is_none(text: bytes, telling: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "edgecomp.json").write_bytes(text)
    assert telling in refused("inspect", tmp_path)


@pytest.mark.parametrize(("template", "telling"), [
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "the chat template fails (access to attribute '__class__' of 'str' object is unsafe)"),
    ("{{ cycler.__init__.__globals__ }}", "the chat template fails (access to attribute '__init__' of 'type' object is unsafe)"),
    ("{% for n in range(10 ** 9) %}{% endfor %}", "the chat template fails (Range too big"),
    ("{% if %}", "the chat template has an error in line 1"),
    ("{{ raise_exception('no') }}", "the chat template refuses the messages: no"),
])
def test_a_chat_template_that_is_up_to_no_good(template: str, telling: str, copy: Path, refused: Callable[..., str]) -> None:
    replace(copy / TEMPLATE, template.encode())
    rewrite(copy, put({"bytes": len(template), "sha256": hashlib.sha256(template.encode()).hexdigest()}, "files", TEMPLATE))
    assert telling in refused("run", copy, "--prompt", "x", "--backend", "null")


def test_a_tokenizer_that_is_none(copy: Path, refused: Callable[..., str]) -> None:
    replace(copy / TOKENIZER, b"{}")
    rewrite(copy, put({"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}, "files", TOKENIZER))
    assert refused("run", copy, "--prompt", "x").startswith("the tokenizer tokenizer.json cannot be read (")


def test_a_graph_that_is_none(copy: Path, refused: Callable[..., str]) -> None:
    name = "graphs/vision.dart-64.onnxruntime.onnx"
    replace(copy / name, b"no graph")
    rewrite(copy, put({"bytes": 8, "sha256": hashlib.sha256(b"no graph").hexdigest()}, "files", name))
    said = refused("run", copy, "--plan", "dart-64", "--prompt", "x")
    assert said.startswith("onnxruntime 1.") and f"cannot load {Path(name).name}" in said


# ---- questions ----

@pytest.mark.parametrize(("lines", "telling"), [
    (None, "cannot be read (No such file or directory): give a JSONL of questions"),
    ([], "questions.jsonl has no questions"),
    (["", "  "], "questions.jsonl has no questions"),
    (["GOOD", "GOOD", "{bad"], "questions.jsonl, line 3: not an object with image, question and answer (JSONDecodeError"),
    (["GOOD", "", '{"image": "a.jpg", "question": "x"}'], "questions.jsonl, line 3: not an object with image, question and answer "
                                                           "(KeyError: 'answer')"),
    (["GOOD", "[1]"], "questions.jsonl, line 2: not an object"),
    (["GOOD", '{"image": 3, "question": "x", "answer": "y"}'], "questions.jsonl, line 2: not an object"),
    (['{"image": "a.jpg", "question": " ", "answer": "y"}'], "questions.jsonl, line 1: not an object with image, question and answer "
                                                             "(ValueError: the question is empty)"),
    (["GOOD", '{"image": "gone.jpg", "question": "x", "answer": "y"}'], "gone.jpg: no such file; the questions name it relative to their own file"),
])
def test_questions_that_cannot_be_asked(lines: list[str] | None, telling: str, demo: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    data = tmp_path / "questions.jsonl"
    if lines is not None:
        shutil.copy(SCENE, tmp_path / "scene.jpg")
        good = json.dumps({"image": "scene.jpg", "question": "is there a red ring?", "answer": "no"})
        data.write_text("\n".join(good if line == "GOOD" else line for line in lines))
    assert telling in refused("eval", demo, "--plan", "stride-64", "--data", data, busy="gone.jpg" in telling)


@pytest.mark.parametrize("command", ["verify", "profile"])
def test_other_commands_read_questions_too(command: str, demo: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "questions.jsonl").write_text("{bad")
    whole = ["--whole"] if command == "verify" else []
    assert "questions.jsonl, line 1: not an object" in refused(command, demo, *whole, "--plan", "full", "--data", tmp_path / "questions.jsonl")


def test_questions_with_unicode_line_separators_are_one_line(demo: Path, tmp_path: Path) -> None:
    shutil.copy(SCENE, tmp_path / "scene.jpg")
    row = {"image": "scene.jpg", "question": "what number is written?", "answer": "74", "task": "a\u2028b\x85c"}
    data = tmp_path / "questions.jsonl"
    data.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    result = CliRunner().invoke(main, ["eval", str(demo), "--plan", "stride-64", "--data", str(data), "--backend", "null", "--json"])
    assert result.exit_code == 0, result.output
    assert list(json.loads(result.stdout)["by_task"]) == ["a\u2028b\x85c"]


# ---- the goal ----

@pytest.fixture
def writers(demo: Path, tiny: Path) -> dict[str, list[object]]:
    """The commands that write bundles, less where to."""
    return {"compress": ["compress", demo, "--method", "stride", "--keep", 9], "compile": ["compile", tiny, "--method", "stride", "--keep", 9],
            "export": ["export", tiny]}


@pytest.mark.parametrize("command", ["compress", "compile", "export"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_goal_that_exists_and_is_no_bundle(command: str, kind: str, writers: dict[str, list[object]], tmp_path: Path,
                                             refused: Callable[..., str]) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("letters of a lifetime")
    else:
        (out / "letters").mkdir(parents=True)
    said = refused(*writers[command], "-o", out)
    assert said == f"{out} exists and is not a bundle: choose another name, or remove it first"


@pytest.mark.parametrize("command", ["compress", "compile", "export"])
@pytest.mark.parametrize(("place", "telling"), [
    ("file/out", "File exists"), ("file/below/out", "Not a directory"), ("/proc/out", "No such file or directory"), ("n" * 300, "File name too long"),
])
def test_a_goal_that_cannot_be_written(command: str, place: str, telling: str, writers: dict[str, list[object]], tmp_path: Path,
                                       refused: Callable[..., str]) -> None:
    (tmp_path / "file").write_text("a file, no folder")
    said = refused(*writers[command], "-o", tmp_path / place, busy=command == "export" and place == "/proc/out")  # all others before any work
    assert said.startswith(f"{tmp_path / place} cannot be written: {telling}") and said.endswith("make room, or choose another place")


def test_folders_made_for_a_goal_go_again(demo: Path, tmp_path: Path) -> None:
    """Every command checks before it makes folders, so the failure here is in the middle of writing."""
    result = limited(50_000, "compress", demo, "-o", tmp_path / "a" / "b" / "out", "--method", "dart", "--keep", 9)
    assert result.returncode == 1 and "cannot be written: File too large" in message(result.stderr.splitlines(), 1)
    assert tree(tmp_path) == {}


def limited(most: int, *args: object) -> subprocess.CompletedProcess[str]:
    """A command whose files cannot grow beyond so many bytes: the nearest to a full disk that needs no mount."""
    return subprocess.run([sys.executable, "-m", "edgecomp", *map(str, args)], capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)))


# a file stops growing in the first graph, or in the weights; `test_folders_made_for_a_goal_go_again` has the manifest, the largest file of compress
@pytest.mark.parametrize(("command", "most"), [("compress", 50_000), ("export", 100_000)])
def test_a_full_disk(command: str, most: int, writers: dict[str, list[object]], demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(demo, out, copy_function=os.link)
    before = tree(tmp_path)
    result = limited(most, *writers[command], "-o", out)
    assert result.returncode == 1
    said = message(result.stderr.splitlines(), 1)
    assert said.startswith(f"{out} cannot be written: {os.strerror(errno.EFBIG)} (") and "MiB free there); nothing was left behind" in said
    assert tree(tmp_path) == before
    Bundle.open(out)


# ---- Ctrl-C ----

@pytest.fixture
def older(demo: Path, tmp_path: Path) -> Iterator[Path]:
    """A bundle where the command wants to write. After the test it has to be there as it was, with nothing beside it."""
    out = tmp_path / "out"
    shutil.copytree(demo, out, copy_function=os.link)
    before = tree(tmp_path)
    yield out
    assert tree(tmp_path) == before
    Bundle.open(out)


def interrupt_at(line: str, *args: object) -> tuple[int, list[str]]:
    """Sends SIGINT once a line on stderr starts so. Returns the exit code and the lines of stderr."""
    child = subprocess.Popen([sys.executable, "-m", "edgecomp", *map(str, args)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert child.stderr is not None
    lines = []
    for each in child.stderr:
        lines.append(each.rstrip("\n"))
        if each.startswith(line):
            child.send_signal(signal.SIGINT)
            break
    else:
        pytest.fail(f"never said {line!r}: {lines}")
    lines += child.stderr.read().splitlines()
    return child.wait(), lines


@pytest.mark.parametrize("line", ["compressing to 9", "lowering pool-16"])
def test_ctrl_c_while_compressing(line: str, demo: Path, older: Path) -> None:
    code, lines = interrupt_at(line, "compress", demo, "-o", older, "--method", "stride", "--method", "pool", "--keep", 9, "--keep", 16)
    assert code in (1, 130) and lines[-1] == "Aborted!"
    assert not any(word in text for text in lines for word in ("Traceback", "File ", "Exception")), lines


def test_ctrl_c_while_compiling(tiny: Path, older: Path) -> None:
    """There is the folder of the neutral bundle then, and in it the one that is being filled."""
    code, lines = interrupt_at("tracing the decoder", "compile", tiny, "-o", older, "--method", "stride", "--keep", 9)
    assert code in (1, 130) and lines[-1] == "Aborted!"
    assert not any(word in text for text in lines for word in ("Traceback", "File ", "Exception")), lines


AT_RENAME = """
import os, signal, sys
out, seen = sys.argv[sys.argv.index("-o") + 1], []
def hook(event, args):
    if event == "os.rename" and str(args[{argument}]) == out:
        {happens}
sys.addaudithook(hook)
from edgecomp.cli import main
main()
"""


def at_rename(argument: int, happens: str, demo: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Compresses to `out` where a bundle is; something happens as it is renamed away (argument 0) or the new one to its place (1)."""
    shutil.copytree(demo, out, copy_function=os.link)
    program = AT_RENAME.format(argument=argument, happens=happens)
    return subprocess.run([sys.executable, "-c", program, "compress", str(demo), "-o", str(out), "--method", "stride", "--keep", "9"],
                          capture_output=True, text=True)


@pytest.mark.parametrize("argument", [0, 1])
def test_ctrl_c_while_one_bundle_takes_the_place_of_another(argument: int, demo: Path, tmp_path: Path) -> None:
    """Between the two renames no bundle is in place: the signal has to wait for both."""
    result = at_rename(argument, "os.kill(os.getpid(), signal.SIGINT)", demo, tmp_path / "out")
    assert result.returncode in (1, 130) and result.stderr.splitlines()[-1] == "Aborted!" and "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert Bundle.open(tmp_path / "out").manifest.default_plan == "stride-9"


def test_a_disk_that_fails_while_one_bundle_takes_the_place_of_another(demo: Path, tmp_path: Path) -> None:
    once = f"seen.append(event)\n        if len(seen) == 1: raise OSError({errno.EIO}, 'the disk is gone')"
    result = at_rename(1, once, demo, tmp_path / "out")
    assert result.returncode == 1
    assert message(result.stderr.splitlines(), 1).startswith(f"{tmp_path / 'out'} cannot be written: the disk is gone (")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert Bundle.open(tmp_path / "out").manifest == Bundle.open(demo).manifest


def endless(demo: Path) -> list[str]:
    """A run that is far from its end: at this temperature every token is as likely as any other, and the seed is one without an early end."""
    end = Bundle.open(demo).manifest.text.end_ids[0]
    size = Bundle.open(demo).manifest.embeddings.shape[0]
    seed = next(s for s in range(1000) if end not in (np.random.default_rng(s).random(900) * size).astype(int))
    return [sys.executable, "-m", "edgecomp", "run", str(demo), "--plan", "dart-64", "--prompt", "go on", "--temperature", "1e9", "--seed", str(seed),
            "--max-new-tokens", "1500"]


def test_ctrl_c_while_an_answer_streams(demo: Path) -> None:
    child = subprocess.Popen(endless(demo), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None and child.stderr is not None
    assert child.stdout.read(3)  # it streams
    child.send_signal(signal.SIGINT)
    rest, errors = child.communicate()
    assert child.returncode == 130 and errors.strip() == b""
    assert len(rest) < 1500  # far from the whole answer


def test_a_reader_that_has_enough(demo: Path) -> None:
    child = subprocess.Popen(endless(demo), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None and child.stderr is not None
    assert child.stdout.read(3)
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait() == 1
