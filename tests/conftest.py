"""What many tests need: the demonstration checkpoint, its bundle compiled once a run, its pictures, and tolerances."""
from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

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

ROOT = Path(__file__).parents[1]
METHODS = ("random", "stride", "pool", "cls", "dart")
BUDGETS = (64, 128, 192, 576)

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
    """Stamps of seen weight files go to a folder of the test run, never to the user's."""
    monkeypatch.setenv("EDGECOMP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The demonstration model in the Hugging Face layout."""
    return ROOT / "examples" / "scenes-llava"


@pytest.fixture(scope="session")
def scenes() -> Path:
    """The folder of the evaluation set: images/ and questions.jsonl."""
    return ROOT / "examples" / "scenes"


@pytest.fixture(scope="session")
def demo(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration model compiled with every method at every budget. Tests do not change it."""
    from edgecomp import methods
    from edgecomp.compile import compile_model
    from edgecomp.compress import Recipe
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    out = tmp_path_factory.mktemp("demo") / "bundle"
    compile_model(str(checkpoint), out, [Recipe.of(methods.make(m), str(k)) for m in METHODS for k in BUDGETS])
    return out
