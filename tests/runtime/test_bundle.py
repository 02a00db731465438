"""Bundles on disk: moved, read-only, hashed once and then trusted, and the manifest's way through JSON."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp_runtime import Bundle, Session
from edgecomp_runtime.bundle import HASH_ALWAYS_BELOW, user_cache
from edgecomp_runtime.errors import BundleError
from edgecomp_runtime.manifest import (
    SCHEMA,
    DecoderInfo,
    FileInfo,
    GraphInfo,
    ImageInfo,
    Manifest,
    PlanInfo,
    QuantizedInfo,
    SourceInfo,
    StepInfo,
    TableInfo,
    TensorInfo,
    TextInfo,
    TileInfo,
    VisionInfo,
)

WEIGHTS = "graphs/weights.bin"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache that has seen nothing yet."""
    monkeypatch.setenv("EDGECOMP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def copy(demo: Path, tmp_path: Path, cache: Path) -> Path:
    """A bundle of one's own, its weights copied so that they can be written into; the rest is linked."""
    shutil.copytree(demo, tmp_path / "copy", copy_function=os.link)
    (tmp_path / "copy" / WEIGHTS).unlink()
    shutil.copyfile(demo / WEIGHTS, tmp_path / "copy" / WEIGHTS)
    assert (tmp_path / "copy" / WEIGHTS).stat().st_size >= HASH_ALWAYS_BELOW, "too small to be trusted by its stamp"
    return tmp_path / "copy"


def flip(path: Path, at: int, *, keep_time: bool) -> None:
    """Changes one byte in place: same size, same inode, and if wished the same time."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert path.stat().st_mtime_ns == status.st_mtime_ns


def test_a_weight_file_is_hashed_once_and_then_trusted(copy: Path, cache: Path) -> None:
    Bundle.open(copy)
    assert len(list((cache / "stamps").iterdir())) == 1, "only the weights are large enough for a stamp"
    flip(copy / WEIGHTS, 12345, keep_time=True)
    Bundle.open(copy)  # size, time and inode are as they were: nobody looks inside
    with pytest.raises(BundleError, match=f"{WEIGHTS} was changed after it was written"):
        Bundle.open(copy, verify_hashes=True)


def test_a_weight_file_never_seen_is_hashed(copy: Path) -> None:
    flip(copy / WEIGHTS, 12345, keep_time=True)
    with pytest.raises(BundleError, match=f"{WEIGHTS} was changed after it was written"):
        Bundle.open(copy)


def test_another_time_makes_a_weight_file_hashed_again(copy: Path) -> None:
    Bundle.open(copy)
    flip(copy / WEIGHTS, 12345, keep_time=False)
    with pytest.raises(BundleError, match=f"{WEIGHTS} was changed after it was written"):
        Bundle.open(copy)


def test_another_inode_makes_a_weight_file_hashed_again(copy: Path) -> None:
    Bundle.open(copy)
    weights = copy / WEIGHTS
    shutil.copy2(weights, other := copy / "other")
    flip(other, 12345, keep_time=True)
    assert other.stat().st_mtime_ns == weights.stat().st_mtime_ns and other.stat().st_ino != weights.stat().st_ino
    other.rename(weights)
    with pytest.raises(BundleError, match=f"{WEIGHTS} was changed after it was written"):
        Bundle.open(copy)


def test_another_size_is_found_without_hashing(copy: Path) -> None:
    Bundle.open(copy)
    weights = copy / WEIGHTS
    status = weights.stat()
    os.truncate(weights, status.st_size - 1)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(BundleError, match=f"{WEIGHTS} has {status.st_size - 1} bytes and should have {status.st_size}: the bundle was cut short"):
        Bundle.open(copy)


def test_a_damaged_file_gets_no_stamp(copy: Path, cache: Path) -> None:
    flip(copy / WEIGHTS, 12345, keep_time=True)
    for _ in range(2):
        with pytest.raises(BundleError, match="was changed"):
            Bundle.open(copy)
    assert not (cache / "stamps").exists()


def test_a_stamp_that_is_rubbish_is_made_anew(copy: Path, cache: Path) -> None:
    Bundle.open(copy)
    stamp, = (cache / "stamps").iterdir()
    good = stamp.read_text()
    stamp.write_text("{half")
    Bundle.open(copy)
    assert stamp.read_text() == good


@pytest.mark.parametrize("name", ["graphs/vision.onnx", "text/tokenizer.json", "text/chat_template.jinja"])
def test_graphs_and_texts_are_hashed_at_every_open(name: str, copy: Path, demo: Path) -> None:
    (copy / name).unlink()
    shutil.copy2(demo / name, copy / name)
    Bundle.open(copy)
    flip(copy / name, 40, keep_time=True)
    with pytest.raises(BundleError, match=f"{name} was changed after it was written"):
        Bundle.open(copy)


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("EDGECOMP_CACHE", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        Bundle.open(copy)
    flip(copy / WEIGHTS, 12345, keep_time=True)
    with pytest.raises(BundleError, match="was changed"):  # without stamps every open hashes
        Bundle.open(copy)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert user_cache() == Path(os.environ["EDGECOMP_CACHE"])
    monkeypatch.delenv("EDGECOMP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_cache() == tmp_path / "xdg" / "edgecomp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert user_cache() == tmp_path / "home" / ".cache" / "edgecomp"


def test_a_bundle_that_was_moved_and_made_read_only_runs_from_anywhere(demo: Path, scenes: Path, tmp_path: Path) -> None:
    picture, question = scenes / "images" / "scene-03.jpg", "what number is written?"
    expected = Session(Bundle.open(demo), plan="cls-64").generate(question, [picture]).finish()
    first = tmp_path / "first"
    shutil.copytree(demo, first)
    Bundle.open(first)
    moved = tmp_path / "elsewhere" / "a name with spaces é"
    moved.parent.mkdir()
    first.rename(moved)
    every = [moved, *moved.rglob("*")]
    for path in every:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_mode) for path in every}
    try:
        ask = ["run", moved.name, "--plan", "cls-64", "--image", str(picture), "--prompt", question]
        result = subprocess.run([sys.executable, "-m", "edgecomp", *ask], cwd=moved.parent, capture_output=True, text=True,
                                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == expected.strip() != ""
        assert {path: (path.stat().st_mtime_ns, path.stat().st_mode) for path in [moved, *moved.rglob("*")]} == before
    finally:
        for path in every:
            path.chmod(0o755)  # so that pytest can clear up


def test_the_embeddings_are_the_weights_rows(demo: Path) -> None:
    bundle = Bundle.open(demo)
    table = bundle.manifest.embeddings
    assert bundle.embeddings().shape == table.shape == (411, 320)
    width = table.shape[1] * 4
    assert bundle.embeddings()[7].tobytes() == (demo / table.file).read_bytes()[table.offset + 7 * width:table.offset + 8 * width]


def test_the_demonstrations_manifest_comes_back_from_json(demo: Path) -> None:
    text = (demo / "edgecomp.json").read_text()
    manifest = Manifest.from_json(text)
    assert manifest.to_json() == text
    assert manifest == Bundle.open(demo).manifest


NAMES = st.text(st.characters(codec="utf-8"), max_size=8)
COUNTS = st.integers(0, 2**63)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
TENSORS = st.builds(TensorInfo, NAMES, NAMES, NAMES, st.lists(COUNTS | NAMES, max_size=4).map(tuple), st.none() | COUNTS)
GRAPHS = st.builds(GraphInfo, st.lists(TENSORS, max_size=2).map(tuple), st.lists(TENSORS, max_size=2).map(tuple))
STEPS = st.builds(StepInfo, NAMES, NAMES, COUNTS, st.dictionaries(NAMES, COUNTS | NUMBERS | NAMES, max_size=2))
SEVERAL = st.lists(COUNTS, max_size=3).map(tuple)
PAIRS = st.tuples(COUNTS, COUNTS)
PLANS = st.builds(PlanInfo, st.lists(STEPS, max_size=2).map(tuple), NAMES, COUNTS, SEVERAL, SEVERAL,
                  st.dictionaries(NAMES, st.dictionaries(NAMES, NAMES, max_size=2), max_size=2))
MANIFESTS = st.builds(
    Manifest, st.just(SCHEMA), NAMES, st.builds(SourceInfo, NAMES, NAMES, NAMES, st.none() | PAIRS, st.none() | COUNTS), NAMES,
    st.builds(ImageInfo, PAIRS, st.none() | COUNTS, COUNTS, NUMBERS, st.tuples(NUMBERS, NUMBERS, NUMBERS), st.tuples(NUMBERS, NUMBERS, NUMBERS),
              PAIRS, NAMES, st.none() | COUNTS, st.none() | PAIRS, st.none() | st.tuples(COUNTS, COUNTS, COUNTS)),
    st.builds(VisionInfo, COUNTS, st.lists(st.builds(TileInfo, COUNTS, COUNTS, COUNTS, COUNTS), max_size=2).map(tuple),
              st.lists(NAMES, max_size=3).map(tuple), COUNTS, COUNTS, COUNTS, st.booleans()),
    st.builds(TextInfo, NAMES, st.none() | NAMES, st.dictionaries(NAMES, NAMES, max_size=2), SEVERAL, NAMES, COUNTS, NAMES),
    st.builds(TableInfo, NAMES, COUNTS, PAIRS, NAMES, NUMBERS),
    st.builds(DecoderInfo, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, NAMES), NAMES,
    st.dictionaries(NAMES, PLANS, max_size=2), st.dictionaries(NAMES, GRAPHS, max_size=2),
    st.dictionaries(NAMES, st.builds(FileInfo, COUNTS, NAMES), max_size=2),
    quantized=st.none() | st.builds(QuantizedInfo, NAMES, COUNTS, st.dictionaries(NAMES, COUNTS, max_size=2)))


@settings(max_examples=60, deadline=None)
@given(MANIFESTS)
def test_any_manifest_comes_back_from_json(manifest: Manifest) -> None:
    assert Manifest.from_json(manifest.to_json()) == manifest


@settings(max_examples=60, deadline=None)
@given(MANIFESTS, st.data())
def test_any_changed_character_shows(manifest: Manifest, data: st.DataObject) -> None:
    """Except where JSON reads the same from it (spaces, 1.0 for 1.00), a manifest that differs is refused."""
    text = manifest.to_json()
    at = data.draw(st.integers(0, len(text) - 1))
    changed = text[:at] + data.draw(st.characters(codec="ascii")) + text[at + 1:]
    try:
        same = json.loads(changed) == json.loads(text)
    except ValueError:
        same = False
    if same:
        assert Manifest.from_json(changed) == manifest
    else:
        with pytest.raises(BundleError):
            Manifest.from_json(changed)
