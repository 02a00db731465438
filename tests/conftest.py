"""What many tests need: the demonstration checkpoint, its pictures, bundles compiled once a run, and tolerances."""
from __future__ import annotations

import fcntl
import gc
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgecomp_runtime.manifest import (
    SCHEMA,
    DecoderInfo,
    ImageInfo,
    Manifest,
    SourceInfo,
    TableInfo,
    TextInfo,
    TileInfo,
    VisionInfo,
)

# A run started in the background of a script ignores Ctrl-C, and hands that on to the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tracing makes millions of objects that live on, and looking for cycles among them as often as usual takes a twentieth of the time.
gc.set_threshold(100_000)

ROOT = Path(__file__).parents[1]
METHODS = ("random", "stride", "pool", "cls", "dart")
BUDGETS = (64, 128, 576)

# absolute differences, measured on the demonstration model with a margin of about three
TOLERANCE = {
    "fp32 logits": 1e-4,
    "fp16 logits": 1e-1,
}


def manifest_of(tiles: Sequence[TileInfo], tokens: int | None = None, *, cut: tuple[int, int] | None = None, overview: str = "",
                context: int = 4096) -> Manifest:
    """A manifest without files about pictures of such tiles, `cut` (rows, columns) of them beside the overview; one row by default."""
    side = cut or (1, len(tiles) - bool(overview))
    vision = VisionInfo(tokens or sum(t.rows * t.columns for t in tiles), tuple(tiles), ("", ""), 8, 2, 1, False)
    return Manifest(SCHEMA, "edgecomp test", SourceInfo("model", "family", ""), "fp32",
                    ImageInfo((4, 4), None, 3, 1 / 255, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), side, overview), vision,
                    TextInfo("tokenizer", None, {}, (2,), "<image>", 3, "<image>"), TableInfo("weights", 0, (5, 8), "float32"),
                    DecoderInfo(2, 2, 1, 4, 8, context), "full", {}, {}, {})


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stamps of seen weight files go to a folder of the test run, never to the user's, whose devices and calibrations do not count here."""
    monkeypatch.setenv("EDGECOMP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("EDGECOMP_PROFILES", str(tmp_path_factory.getbasetemp() / "profiles"))


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The demonstration model in the Hugging Face layout."""
    return ROOT / "examples" / "scenes-llava"


@pytest.fixture(scope="session")
def scenes() -> Path:
    """The folder of the evaluation set: images/ and questions.jsonl."""
    return ROOT / "examples" / "scenes"


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the run that all of its workers see."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def once(path: Path, make: Callable[[Path], Any]) -> Path:
    """What the first worker to ask makes, while others wait for it. Where `make` fails, it leaves nothing at `path`."""
    path.parent.mkdir(exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            make(path)
    return path


@pytest.fixture(scope="session")
def demo(checkpoint: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration model compiled with every method at every budget. Tests do not change it."""
    from edgecomp import methods
    from edgecomp.compile import compile_model
    from edgecomp.compress import Recipe
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    recipes = [Recipe.of(methods.make(m), str(k)) for m in METHODS for k in BUDGETS]
    made = once(shared / "demo" / "bundle", lambda out: compile_model(str(checkpoint), out, recipes))
    # in a folder of the worker's own, where no other writes beside it
    return Path(shutil.copytree(made, tmp_path_factory.mktemp("demo") / "bundle", copy_function=os.link))


@pytest.fixture(scope="session")
def tiny(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights of some hundred kilobytes, which is exported in little more time than torch takes to load."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    folder = tmp_path_factory.mktemp("tiny")
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14)
    text = LlamaConfig(vocab_size=411, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(checkpoint / name, folder)
    settings = json.loads((checkpoint / "processor_config.json").read_text())
    settings["image_processor"] |= {"size": {"shortest_edge": 70}, "crop_size": 70}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def compiled(checkpoint: Path, shared: Path) -> Callable[..., tuple[Path, Path]]:
    """Makes a tiny checkpoint, `maker.make(variant)`, and its bundle without plans, once a run for all who choose the same. Tests change copies
    of them only: `compress` into a folder of one's own shares the weights."""
    from edgecomp.compile import compile_model

    def make(maker: ModuleType, variant: Any, precision: str = "fp32", **choices: Any) -> tuple[Path, Path]:
        key = repr((variant, precision, sorted((name, choice) for name, choice in choices.items() if choice is not None)))
        folder = shared / f"{maker.__name__}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

        def write(out: Path) -> None:
            maker.make(variant, folder / "checkpoint", checkpoint)
            compile_model(str(folder / "checkpoint"), out, [], precision=precision, **choices)
        return folder / "checkpoint", once(folder / "bundle", write)
    return make
