"""`edgecomp build`: real engines of TensorRT for RTX, built here without a GPU and never run; and what is refused."""
from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

from edgecomp import devices
from edgecomp.build import bundles
from edgecomp.build.jobs import check_fits, engine_weights, profile, sizes
from edgecomp.build.toolchain import dialect_of, toolchain
from edgecomp.cli import main
from edgecomp.compile import compile_model
from edgecomp.compress import Recipe
from edgecomp.footprint import weight_bytes
from edgecomp.methods import make
from edgecomp_runtime import Bundle, Session
from edgecomp_runtime.errors import EdgecompError

rtx = pytest.importorskip("tensorrt_rtx")
PLANS = ("full", "divprune-9", "fastv-9-decoder1")


@pytest.fixture(scope="module")
def bundle(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in fp16: uncut, cut at the projector and in the decoder."""
    out = tmp_path_factory.mktemp("build") / "bundle"
    compile_model(str(tiny), out, [Recipe.of(make("divprune"), "9"), Recipe.of(make("fastv"), "9", "decoder:1")], precision="fp16", context=512)
    return out


@pytest.fixture
def own(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def build(*args: object) -> Result:
    return CliRunner().invoke(main, ["build", *map(str, args)])


def refusal(result: Result) -> str:
    assert result.exit_code == 1
    line, = [line for line in result.stderr.splitlines() if line.startswith("edgecomp: ")]
    assert result.stderr.splitlines()[-1] == line
    return line.removeprefix("edgecomp: ")


@pytest.mark.parametrize(("device", "capability"), [("rtx-3060", "8.6"), ("rtx-4090", "8.9"), ("rtx-5090", "12.0")])
def test_engines_of_each_plan(own: Path, device: str, capability: str) -> None:
    plans = PLANS if device == "rtx-4090" else PLANS[2:]
    result = build(own, "--device", device, *(f"--plan={plan}" for plan in plans))
    assert result.exit_code == 0, result.stderr
    assert "They were built, not run" in result.stderr
    manifest = Bundle.open(own, verify_hashes=True).manifest
    for plan in plans:
        for part, graph in manifest.plans[plan].variants["tensorrt-rtx-1.7"].items():
            engine, = [engine for engine in manifest.engines if engine.graph == graph]
            assert (engine.backend, engine.version, engine.capability) == ("tensorrt-rtx", rtx.__version__, capability)
            data = (own / engine.file).read_bytes()
            assert rtx.Runtime(rtx.Logger(rtx.Logger.ERROR)).get_engine_validity(data[:4096])[0] is not None
            assert (own / engine.file).with_suffix(".log").is_file()
            assert all(len(shape) == 3 for shape in engine.profile.values()), part
    before = {path: path.stat().st_mtime_ns for path in own.rglob("*")}
    again = build(own, "--device", device, *(f"--plan={plan}" for plan in plans))
    assert again.exit_code == 0 and "nothing was built" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in own.rglob("*")} == before
    assert [path.name for path in own.parent.iterdir()] == ["bundle"]
    listed = CliRunner().invoke(main, ["inspect", str(own)]).output
    assert all(engine.file in listed for engine in manifest.engines)


def test_another_flag_or_a_lost_engine_is_built_anew(own: Path) -> None:
    assert build(own, "--device", "rtx-4090").exit_code == 0
    first = Bundle.open(own).manifest.engines
    assert build(own, "--device", "rtx-4090", "--workspace", 64).exit_code == 0
    second = Bundle.open(own).manifest.engines
    assert [engine.file for engine in first] == [engine.file for engine in second]
    assert all(engine.flags == {"workspace_mib": 64} for engine in second)


def test_shapes_are_those_that_a_session_feeds(bundle: Path) -> None:
    """Every input's shape of a whole conversation lies between the smallest and the largest of the profile."""
    opened = Bundle.open(bundle)
    for name in PLANS:
        plan = opened.manifest.plans[name]
        every = {**sizes(opened.manifest, plan), "batch": (1, 1, 1)}
        shapes = profile(opened.manifest.graphs[plan.variants["neutral"]["prefill"]], {**every, "capacity": (1, 1, 1), "capacity.1": (1, 1, 1)})
        for key, (least, usual, most) in shapes.items():
            assert all(a <= b <= c for a, b, c in zip(least, usual, most)), key
        rows = plan.visual_tokens + 64
        assert shapes["embeddings"][1][1] == min(rows, 512) and shapes["embeddings"][0][1] == 1
    cut = opened.manifest.plans["fastv-9-decoder1"]
    every = sizes(opened.manifest, cut)
    assert every["rows.1"] == (1, 9 + 64, cut.cache_rows[1]) and every["rows"][2] == max(cut.cache_rows) == 512, "a prompt that is cut comes whole"
    assert every["bucket"] == (256, 256, 512) and every["images"] == (1, 1, opened.manifest.vision.max_images)


# refusals

@pytest.mark.parametrize(("args", "said"), [
    (["--device", "jetson-orin-nano-8gb"], "are built on the board itself, by JetPack's TensorRT, and not on x86_64: `edgecomp pack BUNDLE"),
    (["--device", "h100-80gb-sxm"], "needs tensorrt, which is not installed"),
    (["--device", "h100-80gb-sxm", "--backend", "tensorrt-rtx"], "TensorRT for RTX builds for compute capability 7.5, 8.0, 8.6, 8.9, 12.0, 12.1, and "
                                                                "h100-80gb-sxm has 9.0"),
    (["--device", "rtx-409"], "did you mean 'rtx-4090'?"), (["--device", "rtx-4090", "--plan", "divprune-8"], "did you mean 'divprune-9'?")])
def test_what_cannot_be_built_is_one_line(own: Path, args: list[str], said: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in own.rglob("*")}
    assert said in refusal(build(own, *args))
    assert {path: path.stat().st_mtime_ns for path in own.rglob("*")} == before


def test_a_budget_that_does_not_fit_is_refused(bundle: Path) -> None:
    opened, device = Bundle.open(bundle), devices.load("rtx-4090")
    plan = opened.manifest.plans["full"]
    # the tower once, the decoder twice; what both share is the table of embeddings, which is in neither
    weights = engine_weights(opened, plan)
    by_file = {part: sum(v.const_value.nbytes for v in ir.load(opened.file(plan.variants["neutral"][part])).graph.initializers.values())
               for part in ("vision", "decode")}
    assert weights == by_file["vision"] + 2 * by_file["decode"] > weight_bytes(opened.manifest)
    for more, way_out in ((1000, "compile with a smaller --context, or a smaller budget"), (-1000, "choose a smaller model, or --precision fp16")):
        small = dataclasses.replace(device, memory=dataclasses.replace(device.memory, usable_gib=(weights + more) / 2**30))
        with pytest.raises(EdgecompError, match=rf"plan 'full' does not fit rtx-4090: its engines' weights .* GiB .* \(512 rows\): {way_out}"):
            check_fits(opened, "full", small)
    check_fits(opened, "full", device)


def test_engines_of_another_tensorrt_or_gpu_are_refused(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings")
    from edgecomp_runtime.backends import tensorrt
    assert build(own, "--device", "rtx-4090").exit_code == 0
    opened = Bundle.open(own)
    monkeypatch.setattr(tensorrt, "capability", lambda: "8.6")
    with pytest.raises(EdgecompError, match=rf"no engines of tensorrt-rtx {rtx.__version__} for compute capability 8.6; there are tensorrt-rtx "
                                            rf"{rtx.__version__} for 8.9 \(rtx-4090\): run `edgecomp build`"):
        Session(opened, backend="tensorrt-rtx")
    monkeypatch.setattr(tensorrt, "capability", lambda: "8.9")
    older = dataclasses.replace(opened.manifest, engines=tuple(dataclasses.replace(e, version="1.6.0.1") for e in opened.manifest.engines))
    with pytest.raises(EdgecompError, match=r"there are tensorrt-rtx 1\.6\.0\.1 for 8\.9"):
        Session(Bundle(own, older), backend="tensorrt-rtx")
    assert set(tensorrt.TensorRTBackend("tensorrt-rtx").files(opened, opened.manifest.default_plan)) == {"vision", "prefill", "decode"}


def test_without_a_gpu_a_session_says_so(own: Path) -> None:
    pytest.importorskip("cuda.bindings")
    assert build(own, "--device", "rtx-4090").exit_code == 0
    result = CliRunner().invoke(main, ["run", str(own), "--backend", "tensorrt-rtx", "--prompt", "hello"])
    assert refusal(result).startswith("CUDA: ")


def command(path: Path, *args: str) -> list[str]:
    return [sys.executable, "-m", "edgecomp", "build", str(path), "--device", "rtx-4090", *args]


def test_a_disk_that_fills(own: Path) -> None:
    """A file cannot grow beyond what the graphs take, so that the first engine does not fit."""
    result = subprocess.run(command(own), capture_output=True, text=True,
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert result.returncode == 1
    assert "cannot be written" in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
    assert not Bundle.open(own).manifest.engines and [path.name for path in own.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_build_that_is_ended_goes_on_where_it_was(own: Path, how: signal.Signals) -> None:
    child = subprocess.Popen(command(own, "--plan", "full"), stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    while "building prefill" not in child.stderr.readline():
        pass
    time.sleep(0.3)
    child.send_signal(how)
    said = child.stderr.read()
    assert child.wait() in (1, 130, -how) and "Traceback" not in said
    done = Bundle.open(own).manifest.engines
    assert [Path(engine.file).name.partition(".")[0] for engine in done] == ["vision"]
    stamp = (own / done[0].file).stat().st_mtime_ns
    for _ in range(100):  # the builder's own process sees that its parent has gone
        result = build(own, "--device", "rtx-4090", "--plan", "full")
        if "another build" not in result.stderr:
            break
        time.sleep(0.1)
    assert result.exit_code == 0 and "building vision" not in result.stderr
    assert len(Bundle.open(own).manifest.engines) == 3 and (own / done[0].file).stat().st_mtime_ns == stamp
    assert [path.name for path in own.parent.iterdir()] == ["bundle"]


def test_two_builds_of_a_bundle_do_not_meet(own: Path) -> None:
    with bundles._alone(own):
        assert "another build of" in refusal(build(own, "--device", "rtx-4090"))


# what is needed

def test_doctor_says_what_a_device_needs() -> None:
    def needs(device: str) -> dict[str, tuple[bool, str]]:
        found = json.loads(CliRunner().invoke(main, ["doctor", "--device", device, "--json"]).output)["device"]["needs"]
        return {need["what"]: (need["ok"], need["found"]) for need in found}
    desktop, board = needs("rtx-4090"), needs("jetson-orin-nano-8gb")
    assert desktop["build its engines here"] == (True, f"tensorrt-rtx {rtx.__version__} for compute capability 8.9, graphs as for tensorrt-rtx-1.7")
    assert not board["build its engines here"][0] and "edgecomp pack" in board["build its engines here"][1]
    assert board["pack for JetPack 6.2"] == (True, "TensorRT 10.3.0.30, CUDA 12.6.68: graphs as for tensorrt-10.3")
    assert not board["pack for JetPack 5.1.x"][0]
    shown = CliRunner().invoke(main, ["doctor", "--device", "jetson-orin-nano-8gb"]).output
    assert "no   pack for JetPack 5.1.x: tensorrt 8.5.2 is older than tensorrt-8.6" in shown


@pytest.mark.parametrize(("backend", "version", "row"), [
    ("tensorrt", "10.3.0.30", "10.3"), ("tensorrt", "10.12.1", "10.3"), ("tensorrt", "10.13.3", "10.13"), ("tensorrt", "10.15.1", "10.13"),
    ("tensorrt", "10.16.2.10", "10.16"), ("tensorrt", "8.6.2", "8.6"), ("tensorrt-rtx", "1.7.1.116", "1.7"), ("tensorrt-rtx", "1.9", "1.7")])
def test_a_version_is_lowered_for_as_the_newest_row_that_is_not_newer(backend: str, version: str, row: str) -> None:
    assert dialect_of(backend, version) == f"{backend}-{row}"


def test_what_builds_follows_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [toolchain(devices.load(name)) for name in ("t4", "a30", "rtx-3090", "l4", "rtx-5090", "dgx-spark-gb10")]
    assert [tools.capability for tools in found] == ["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"]
    assert {tools.backend for tools in found} == {"tensorrt-rtx"}
    from edgecomp.build import toolchain as module
    monkeypatch.setattr(module, "installed", lambda package: True)
    with pytest.raises(EdgecompError, match=r"for the GPU at hand, and there is none here; h100-80gb-sxm has compute capability 9\.0"):
        toolchain(devices.load("h100-80gb-sxm"))
