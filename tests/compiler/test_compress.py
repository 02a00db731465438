"""Adding plans to a bundle: what is shared, what is named how, what the manifest says, and that failures leave nothing."""
from __future__ import annotations

import dataclasses
import errno
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from edgecomp import methods
from edgecomp.compress import Recipe, Stage, compress, plan_name, planned
from edgecomp.methods.base import BudgetError
from edgecomp.writer import writing
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.errors import EdgecompError, UnknownNameError

STRIDE = Recipe.of(methods.make("stride"), "64")
TWO = [Recipe.of(methods.make("dart"), "25%"), STRIDE]


@pytest.fixture(scope="module")
def neutral(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle as `export` leaves it: the plan 'full', not lowered for any backend."""
    out = tmp_path_factory.mktemp("neutral") / "bundle"
    manifest = Bundle.open(demo).manifest
    full = manifest.plans["full"]
    with writing(out) as (partial, finish):
        for name in manifest.files:
            if not name.endswith(".onnx") or name in ("graphs/vision.onnx", "graphs/decoder.onnx"):
                (partial / name).parent.mkdir(exist_ok=True)
                os.link(demo / name, partial / name)
        graphs = {name: manifest.graphs[name] for name in full.variants["neutral"].values()}
        finish(dataclasses.replace(manifest, default_plan="full", files={}, graphs=graphs,
                                   plans={"full": dataclasses.replace(full, variants={"neutral": full.variants["neutral"]})}))
    return out


@pytest.fixture
def source(neutral: Path, tmp_path: Path) -> Path:
    """A bundle of the test's own, in a folder where a leftover would be seen; its weights are the same inode."""
    (tmp_path / "source").mkdir()
    shutil.copytree(neutral, tmp_path / "source" / "bundle", copy_function=os.link)
    return tmp_path / "source" / "bundle"


def contents(folder: Path) -> dict[str, str]:
    """Every file below, hidden ones too: relative path -> SHA-256."""
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


# what is written

def test_plans_are_added_and_the_first_one_is_the_default(source: Path, tmp_path: Path) -> None:
    assert compress(source, tmp_path / "out", TWO) == ["dart-144", "stride-64"]
    manifest = Bundle.open(tmp_path / "out").manifest
    assert list(manifest.plans) == ["full", "dart-144", "stride-64"]
    assert manifest.default_plan == "dart-144"
    assert all(set(plan.variants) == {"neutral", "onnxruntime"} for plan in manifest.plans.values())
    more = tmp_path / "more"
    compress(tmp_path / "out", more, [Recipe.of(methods.make("cls"), "64")])
    assert list(Bundle.open(more).manifest.plans) == ["full", "dart-144", "stride-64", "cls-64"]
    assert Bundle.open(more).manifest.default_plan == "cls-64"


def test_weights_are_shared_and_graphs_are_small(source: Path, tmp_path: Path) -> None:
    compress(source, tmp_path / "out", TWO)
    assert (tmp_path / "out/graphs/weights.bin").samefile(source / "graphs/weights.bin")
    graphs = sorted((tmp_path / "out/graphs").iterdir())
    assert [g.name for g in graphs if g.suffix != ".onnx"] == ["weights.bin"]
    assert all(g.stat().st_size < 2**20 for g in graphs if g.suffix == ".onnx")
    for graph in graphs:
        if graph.suffix == ".onnx":
            external = [t for t in onnx.load(graph, load_external_data=False).graph.initializer if t.external_data]
            assert len(external) > 50 and {e.value for t in external for e in t.external_data if e.key == "location"} == {"weights.bin"}


def test_weights_are_copied_where_the_disk_has_no_hard_links(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    monkeypatch.setattr(os, "link", refuse)
    compress(source, tmp_path / "out", [STRIDE])
    copy = tmp_path / "out/graphs/weights.bin"
    assert not copy.samefile(source / "graphs/weights.bin") and copy.read_bytes() == (source / "graphs/weights.bin").read_bytes()
    Bundle.open(tmp_path / "out", verify_hashes=True)


def test_the_source_stays_as_it_was(source: Path, tmp_path: Path) -> None:
    before = contents(source)
    compress(source, tmp_path / "out", TWO)
    assert contents(source) == before
    shutil.rmtree(tmp_path / "out")
    Bundle.open(source, verify_hashes=True)


def test_nothing_but_the_bundle_is_left(source: Path, tmp_path: Path) -> None:
    compress(source, tmp_path / "out", [STRIDE])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    written = set(contents(tmp_path / "out"))
    assert written == set(Bundle.open(tmp_path / "out").manifest.files) | {"edgecomp.json"}
    assert (tmp_path / "out").stat().st_mode & 0o755 == 0o755


def test_the_same_twice_is_the_same_byte_for_byte(source: Path, tmp_path: Path) -> None:
    compress(source, tmp_path / "once", TWO)
    compress(source, tmp_path / "twice", TWO)
    assert contents(tmp_path / "twice") == contents(tmp_path / "once")
    said: list[str] = []
    compress(tmp_path / "once", tmp_path / "again", TWO, say=said.append)
    assert contents(tmp_path / "again") == contents(tmp_path / "once")
    assert said == []


def test_one_budget_in_two_spellings_is_one_plan(source: Path, tmp_path: Path) -> None:
    recipes = [Recipe.of(methods.make("stride"), keep) for keep in ("144", "25%", " 25.0%")]
    assert compress(source, tmp_path / "out", recipes) == ["stride-144"] * 3
    assert list(Bundle.open(tmp_path / "out").manifest.plans) == ["full", "stride-144"]


def test_a_bundle_can_take_its_own_place(source: Path, tmp_path: Path) -> None:
    compress(source, tmp_path / "elsewhere", [STRIDE])
    compress(source, source, [STRIDE])
    assert contents(source) == contents(tmp_path / "elsewhere")
    assert [p.name for p in source.parent.iterdir()] == ["bundle"]


def test_an_older_bundle_at_the_goal_is_replaced(source: Path, tmp_path: Path) -> None:
    compress(source, tmp_path / "out", TWO)
    compress(source, tmp_path / "out", [STRIDE])
    assert list(Bundle.open(tmp_path / "out").manifest.plans) == ["full", "stride-64"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_no_recipes_lower_what_there_is(source: Path, tmp_path: Path) -> None:
    assert compress(source, tmp_path / "out", []) == []
    manifest = Bundle.open(tmp_path / "out").manifest
    assert manifest.default_plan == "full" and set(manifest.plans["full"].variants) == {"neutral", "onnxruntime"}


# what the manifest says

def test_the_manifest_counts_tokens_and_cache_rows(source: Path, tmp_path: Path) -> None:
    context = Bundle.open(source).manifest.decoder.context
    layers = 8
    compress(source, tmp_path / "out", [*TWO, Recipe.of(methods.make("pool"), "576")])
    plans = Bundle.open(tmp_path / "out").manifest.plans
    assert {name: plan.visual_tokens for name, plan in plans.items()} == {"full": 576, "dart-144": 144, "stride-64": 64, "pool-576": 576}
    assert {name: plan.cache_rows for name, plan in plans.items()} == {
        "full": (context,) * layers, "dart-144": (context - 432,) * layers, "stride-64": (context - 512,) * layers, "pool-576": (context,) * layers}
    step, = plans["dart-144"].steps
    assert (step.method, step.site, step.keep, step.parameters) == ("dart", "projector", 144, {"pivots": 8})
    assert plans["stride-64"].steps[0].parameters == {}


def test_the_manifest_describes_what_onnxruntime_finds_in_the_graphs(source: Path, tmp_path: Path) -> None:
    compress(source, tmp_path / "out", [STRIDE])
    bundle = Bundle.open(tmp_path / "out")
    kinds = {"float32": "tensor(float)", "int64": "tensor(int64)", "int32": "tensor(int32)"}
    for plan, part in itertools.product(("full", "stride-64"), ("vision", "prefill", "decode")):
        file = bundle.manifest.plans[plan].variants["onnxruntime"][part]
        graph = bundle.manifest.graphs[file]
        session = ort.InferenceSession(bundle.file(file), providers=["CPUExecutionProvider"])
        for described, found in ((graph.inputs, session.get_inputs()), (graph.outputs, session.get_outputs())):
            assert [(t.name, kinds[t.dtype], list(t.shape)) for t in described] == [(f.name, f.type, list(f.shape)) for f in found]
    parts = bundle.manifest.plans["stride-64"].variants["onnxruntime"]
    assert [t.role for t in bundle.manifest.graphs[parts["vision"]].outputs] == ["visual_tokens", "kept"]
    decoder = bundle.manifest.graphs[parts["decode"]]
    for tensors in (decoder.inputs, decoder.outputs):
        assert {(t.role, t.layer) for t in tensors if t.layer is not None} == set(itertools.product(("cache_key", "cache_value"), range(8)))


@pytest.mark.parametrize(("recipe", "name"), [
    (STRIDE, "stride-64"),
    (Recipe.of(methods.make("random"), "64"), "random-64"),
    (Recipe.of(methods.make("random", seed=1), "64"), "random-64-seed1"),
    (Recipe.of(methods.make("dart", pivots=4), "25%"), "dart-144-pivots4"),
    (Recipe.of(methods.make("cls"), "64", position="compact"), "cls-64-compact"),
    (Recipe.of(methods.make("random", seed=2), "64", position="compact"), "random-64-seed2-compact"),
    (Recipe.of(methods.make("stride"), "64", "decoder:3"), "stride-64-decoder3"),
    (Recipe.of(methods.make("fastv"), "64", windows=(4, 4)), "fastv-64-decoder2-windows4x4"),
    (Recipe.of(methods.make("cdpruner"), "64"), "cdpruner-64"),
    (Recipe((Stage(methods.make("pool"), "25%"), Stage(methods.make("fastv"), "50%", "decoder:4"))), "pool-144+fastv-72-decoder4"),
])
def test_a_plans_name_says_what_differs_from_the_defaults(demo: Path, recipe: Recipe, name: str) -> None:
    assert plan_name(recipe, planned(recipe, Bundle.open(demo).manifest)) == name


def test_plans_of_other_parameters_and_positions_stand_side_by_side(source: Path, tmp_path: Path) -> None:
    recipes = [Recipe.of(methods.make("random"), "64"), Recipe.of(methods.make("random", seed=1), "64"),
               Recipe.of(methods.make("random"), "64", position="compact")]
    assert compress(source, tmp_path / "out", recipes) == ["random-64", "random-64-seed1", "random-64-compact"]
    bundle = Bundle.open(tmp_path / "out")
    assert [bundle.manifest.plans[n].position for n in ("random-64", "random-64-seed1", "random-64-compact")] == ["keep", "keep", "compact"]
    assert bundle.manifest.plans["random-64-seed1"].steps[0].parameters == {"seed": 1}
    kept = [ort.InferenceSession(bundle.file(bundle.manifest.plans[n].variants["onnxruntime"]["vision"])).run(
        ["kept"], {"pixels": np.zeros((1, 3, 336, 336), np.float32)})[0].tolist() for n in ("random-64", "random-64-seed1", "random-64-compact")]
    assert kept[0] == kept[2] != kept[1]


# what is refused, before anything is written

REFUSED: dict[str, tuple[Callable[[], Recipe], type[Exception], str]] = {
    "method": (lambda: Recipe.of(methods.make("drat"), "64"), UnknownNameError, "dart"),
    "parameter": (lambda: Recipe.of(methods.make("dart", seed=1), "64"), EdgecompError, "no parameter 'seed'; it has pivots"),
    "site": (lambda: Recipe.of(methods.make("cls"), "64", site="decoder:2"), EdgecompError,
             "cannot stand at 'decoder:2'; it can at projector, encoder:LAYER"),
    "no site": (lambda: Recipe.of(methods.make("stride"), "64", site="attic"), EdgecompError, "cannot stand at 'attic'"),
    "no layer": (lambda: Recipe.of(methods.make("stride"), "64", site="decoder:8"), EdgecompError, "behind the last place for a cut, decoder:7"),
    "no encoder layer": (lambda: Recipe.of(methods.make("stride"), "64", site="encoder:9"), EdgecompError, "the last place for a cut, encoder:8"),
    "first layer's attention": (lambda: Recipe.of(methods.make("cls"), "64", site="encoder:0"), EdgecompError, "use encoder:1 or later"),
    "order": (lambda: Recipe((Stage(methods.make("fastv"), "64"), Stage(methods.make("stride"), "36", "projector"))), EdgecompError,
              "follow each other"),
    "one layer twice": (lambda: Recipe((Stage(methods.make("fastv"), "64"), Stage(methods.make("stride"), "36", "decoder:2"))), EdgecompError,
                        "follow each other"),
    "more than came": (lambda: Recipe((Stage(methods.make("pool"), "64"), Stage(methods.make("fastv"), "65"))), BudgetError, "choose 1 to 64"),
    "grid after a choice": (lambda: Recipe((Stage(methods.make("cls"), "64"), Stage(methods.make("pool"), "16", "decoder:2"))), BudgetError,
                            "needs tokens that form a grid"),
    "windows after a choice": (lambda: Recipe((Stage(methods.make("cls"), "64"), Stage(methods.make("fastv"), "16", "", (2, 2)))), BudgetError,
                               "windows of 2x2 need tokens that form a grid"),
    "many windows": (lambda: Recipe.of(methods.make("cls"), "64", windows=(25, 1)), BudgetError, "do not fit into a grid of 24x24"),
    "position": (lambda: Recipe.of(methods.make("dart"), "64", position="kept"), EdgecompError, "'kept' is none of keep, compact"),
    "budget": (lambda: Recipe.of(methods.make("dart"), "577"), BudgetError, "choose 1 to 576"),
    "no number": (lambda: Recipe.of(methods.make("dart"), "many"), BudgetError, "'many' is neither a count such as 64"),
    "grid": (lambda: Recipe.of(methods.make("pool"), "577%"), BudgetError, "choose 1 to 576"),
    "cells": (lambda: Recipe.of(methods.make("pool"), "131"), BudgetError, "the nearest budgets are"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_one_clear_line_and_nothing_is_written(source: Path, tmp_path: Path, case: str) -> None:
    make, kind, message = REFUSED[case]
    before = contents(tmp_path)
    said: list[str] = []
    with pytest.raises(kind, match=message) as refused:
        compress(source, tmp_path / "out", [STRIDE, make()], say=said.append)
    assert isinstance(refused.value, EdgecompError) and "\n" not in str(refused.value)
    assert said == [] and contents(tmp_path) == before


def test_an_unknown_dialect_is_one_clear_line_and_nothing_is_left(source: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    with pytest.raises(UnknownNameError, match="onnxruntime") as refused:
        compress(source, tmp_path / "out", [STRIDE], dialects=["onnxruntime", "onnxrunime"])
    assert "\n" not in str(refused.value)
    assert contents(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_goal_that_is_no_bundle_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(EdgecompError, match="is not a bundle"):
        compress(source, tmp_path / "out", [STRIDE])
    assert contents(tmp_path) == before


def test_a_source_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EdgecompError, match="is not a bundle"):
        compress(tmp_path / "nothing", tmp_path / "out", [STRIDE])
    assert list(tmp_path.iterdir()) == []


# failures on the way

@pytest.fixture(params=["no bundle at the goal", "an older one", "the source itself"])
def goal(request: pytest.FixtureRequest, source: Path, tmp_path: Path) -> Path:
    """Where the bundle would have gone."""
    if request.param == "the source itself":
        return source
    if request.param == "an older one":
        shutil.copytree(source, tmp_path / "out", copy_function=os.link)
    return tmp_path / "out"


@pytest.mark.parametrize("step", [0, 1, 4])
def test_an_interruption_leaves_everything_as_it_was(source: Path, goal: Path, tmp_path: Path, step: int) -> None:
    before = contents(tmp_path)
    lines = itertools.count()

    def say(_: str) -> None:
        if next(lines) == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(source, goal, TWO, say=say)
    assert contents(tmp_path) == before
    assert not [p for p in tmp_path.rglob("*") if p.is_dir() and p.name.startswith(".")]


def test_a_full_disk_is_one_clear_line_and_leaves_everything_as_it_was(source: Path, goal: Path, tmp_path: Path) -> None:
    """The disk is full for the second graph: its path is led to /dev/full, where every write meets ENOSPC."""
    before = contents(tmp_path)

    def say(line: str) -> None:
        if "stride-64" in line:
            partial, = (p for p in goal.parent.iterdir() if p.name.startswith("."))
            (partial / "graphs/vision.stride-64.onnx").symlink_to("/dev/full")

    with pytest.raises(EdgecompError, match="No space left on device") as refused:
        compress(source, goal, TWO, say=say)
    assert "\n" not in str(refused.value)
    assert contents(tmp_path) == before
    assert not [p for p in tmp_path.rglob("*") if p.is_dir() and p.name.startswith(".")]


LIMITED = """
import resource, sys
from pathlib import Path
from edgecomp import methods
from edgecomp.compress import Recipe, compress

def say(line):
    print(line, flush=True)
    if line.startswith("lowering"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

compress(Path(sys.argv[1]), Path(sys.argv[2]), [Recipe.of(methods.make("stride"), "64")], say=say)
"""


def test_a_limit_on_file_sizes_leaves_everything_as_it_was(source: Path, goal: Path, tmp_path: Path) -> None:
    """The kernel stops a write half way through a graph, in a process of its own."""
    before = contents(tmp_path)
    paths = os.pathsep.join(str(Path(__file__).parents[2] / part) for part in ("", "runtimes"))
    ended = subprocess.run([sys.executable, "-c", LIMITED, str(source), str(goal)], capture_output=True, text=True, check=False,
                           env={**os.environ, "PYTHONPATH": paths})
    assert ended.stdout.splitlines() == ["compressing to 64 of 576 visual tokens: stride-64", "lowering full for onnxruntime"]
    assert ended.returncode == 1
    assert re.fullmatch(r"edgecomp_runtime.errors.EdgecompError: .* cannot be written: File too large .*", ended.stderr.splitlines()[-1])
    assert contents(tmp_path) == before
    assert not [p for p in tmp_path.rglob("*") if p.is_dir() and p.name.startswith(".")]
