"""`edgecomp pack`: archives for boards, unpacked and run as far as a machine without the board goes.

build.sh runs for real. What only a board has is stood in for: a `trtexec` that notes its arguments and writes a few bytes, which shows the
script's own work and nothing of TensorRT; and TensorRT for RTX's parser and builder, which take the packed graphs and shapes.
"""
from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result

from edgecomp import devices
from edgecomp.build.order import Order
from edgecomp.cli import main
from edgecomp.compile import compile_model
from edgecomp.compress import Recipe
from edgecomp.dialects.targets import TARGETS, refused
from edgecomp.ir.graphs import load
from edgecomp.methods import make
from edgecomp.pack import archive, orders, trtexec, wheel
from edgecomp.pack.builder import modules
from edgecomp.pack.releases import choose, releases
from edgecomp_runtime import Bundle
from edgecomp_runtime.errors import EdgecompError

ORIN = "jetson-orin-nano-8gb"
PLANS = ("full", "stride-9-decoder1")
# device, JetPack, TensorRT in its lowered form, trtexec's banner, what only this release is told
BOARDS = {
    "8.6": (ORIN, "6.0", "v8602", ["--fp16", "--precisionConstraints=obey"]),
    "10.3": (ORIN, "6.2", "v100300", ["--stronglyTyped"]),
    "10.13": ("jetson-agx-thor", "7.0", "v101303] [b9", ["--stronglyTyped"]),
    "10.16": (ORIN, "7.2", "v101602] [b10", ["--stronglyTyped", "--decomposableAttentions=*"]),
}
# all that build.sh may ask of a board beside python3 and trtexec
TOOLS = ("awk", "basename", "date", "df", "dirname", "flock", "grep", "head", "mkdir", "mv", "rm", "sed", "sh", "sha256sum", "sleep", "sort",
         "stat", "sync", "tail", "tr")
TRTEXEC = """#!/bin/sh
echo "&&&& RUNNING TensorRT.trtexec [TensorRT $STAND_IN] # trtexec $*"
[ "$1" = --help ] && exit
case "$STAND_IN_FAILS" in killed) kill -KILL $$ ;; slow) exec sleep 60 ;; "") ;; *) echo "[E] $STAND_IN_FAILS"; exit 1 ;; esac
for argument; do
    case "$argument" in --saveEngine=*) printf '%s\\n' "$@" > "${argument#*=}" ;; esac
done
"""


@pytest.fixture(scope="module")
def bundle(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in fp16: uncut, and cut in the decoder."""
    out = tmp_path_factory.mktemp("pack") / "bundle"
    compile_model(str(tiny), out, [Recipe.of(make("stride"), "9", "decoder:1")], precision="fp16", context=512)
    return out


@pytest.fixture(scope="module")
def packed(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Result]]:
    """The archive for one of the boards, with both plans, and what packing said. Made once."""
    made: dict[str, tuple[Path, Result]] = {}

    def pack_once(board: str) -> tuple[Path, Result]:
        if board not in made:
            device, jetpack, *_ = BOARDS[board]
            out = tmp_path_factory.mktemp("archive") / "scenes.tar"
            made[board] = out, pack(bundle, "--device", device, "--jetpack", jetpack, *(f"--plan={plan}" for plan in PLANS), "-o", out)
        return made[board]
    return pack_once


@pytest.fixture
def unpacked(packed: Callable[[str], tuple[Path, Result]], tmp_path: Path) -> Callable[[str], Path]:
    """The archive's folder, unpacked."""
    def unpack(board: str) -> Path:
        with tarfile.open(packed(board)[0]) as tar:
            tar.extractall(tmp_path, filter="data")
        return tmp_path / "scenes"
    return unpack


@pytest.fixture
def board(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """The environment of a board: a PATH with the tools that each has, and python3 and trtexec where they are wanted."""
    def environment(python: bool = True, trtexec: bool = True, **more: str) -> dict[str, str]:
        path = tmp_path / "bin"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        for tool in TOOLS:
            (path / tool).symlink_to(str(shutil.which(tool)))
        if python:
            script(path / "python3", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        if trtexec:
            script(path / "trtexec", TRTEXEC)
        return {"PATH": str(path), "STAND_IN": "v100300", "STAND_IN_FAILS": "", **more}
    return environment


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def pack(*args: object) -> Result:
    return CliRunner().invoke(main, ["pack", *map(str, args)])


def sh(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", str(folder / "build.sh")], env=environment, cwd="/", capture_output=True, text=True, timeout=60)


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.glob("bundle/engines/*/*")}


# the archive

@pytest.mark.parametrize("release", BOARDS)
def test_an_archive_is_whole_and_its_graphs_are_the_boards(packed: Callable[[str], tuple[Path, Result]], unpacked: Callable[[str], Path],
                                                           release: str) -> None:
    device, jetpack, _, told = BOARDS[release]
    result = packed(release)[1]
    assert result.exit_code == 0, result.stderr
    assert f"for JetPack {jetpack}, TensorRT {release}" in result.stderr and f"graphs as for tensorrt-{release}" in result.stderr
    folder = unpacked(release)
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder, check=True)
    listed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files - listed == {"SHA256SUMS", "bundle/edgecomp.json"} and listed <= files
    manifest = Bundle.open(folder / "bundle", verify_hashes=True).manifest
    assert set(manifest.plans) == set(PLANS) and not manifest.engines
    names, target = set(), TARGETS[f"tensorrt-{release}"]
    for plan in PLANS:
        assert set(manifest.plans[plan].variants) == {"neutral", target.name}
        for part, file in manifest.plans[plan].variants[target.name].items():
            assert refused(load(folder / "bundle" / file), target) == [], (plan, part)
            onnx.checker.check_model(str(folder / "bundle" / file), full_check=True)
            name = Path(file).stem
            order = Order.read(folder / "jobs" / f"{name}.json")
            assert order.graph == f"bundle/{file}" and order.out == f"bundle/engines/{device}/{name}.engine" and (folder / order.graph).is_file()
            assert (order.package, order.capability, order.precision) == ("tensorrt", None, "fp16")
            assert {t.name for t in manifest.graphs[file].inputs} == set(order.profile)
            arguments = (folder / "jobs" / f"{name}.trtexec").read_text().splitlines()
            assert arguments[:2] == [f"--onnx={order.graph}", "--skipInference"] and arguments[-1] == "--timingCacheFile=timing.cache"
            assert arguments[2:2 + len(told)] == told if release != "8.6" else arguments[2:4] == told
            assert any(a.startswith("--maxShapes=") for a in arguments) == (part != "vision")
            names.add(name)
    assert [line.split("\t")[0] for line in (folder / "jobs" / "list").read_text().splitlines()] == list(json.loads(
        (folder / "jobs" / "engines.json").read_text()))
    assert names == set(json.loads((folder / "jobs" / "engines.json").read_text())) and len(names) == 5, "plans share the vision graph"


def test_shapes_for_trtexec_are_those_of_the_job(unpacked: Callable[[str], Path]) -> None:
    folder = unpacked("10.3")
    arguments = (folder / "jobs" / "decoder.stride-9-decoder1.prefill-512.tensorrt-10.3.trtexec").read_text().splitlines()
    assert "--optShapes=embeddings:1x89x64,positions:1x89,logit_rows:1,visual_rows.1:1x25,row_map.1:73,places:256,places.1:256" in arguments
    assert next(a for a in arguments if a.startswith("--maxShapes")).endswith("places:512,places.1:496")


def test_8_6_is_told_what_stays_in_fp32(unpacked: Callable[[str], Path]) -> None:
    """There the types of a graph are a wish; a square that overflows in fp16 must not be one."""
    folder = unpacked("8.6")
    path = folder / "bundle" / "graphs" / "decoder.decode-512.tensorrt-8.6.onnx"
    layers = trtexec.fp32_layers(path)
    told, = [a for a in (folder / "jobs" / "decoder.decode-512.tensorrt-8.6.trtexec").read_text().splitlines() if a.startswith("--layerPrecisions=")]
    assert told == "--layerPrecisions=" + ",".join(f"{layer}:fp32" for layer in layers)
    kinds = {node.name: node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
    assert {"Softmax", "ReduceMean", "Sqrt", "Div"} <= {kinds[layer] for layer in layers} and not any(c in layer for layer in layers for c in ":,' ")


def test_the_same_bundle_makes_the_same_archive(bundle: Path, packed: Callable[[str], tuple[Path, Result]], tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    (tmp_path / "scenes.tar").write_text("an older one")
    again = pack(bundle, "--device", ORIN, "--jetpack", "JetPack 6.2", *(f"--plan={plan}" for plan in PLANS), "-o", tmp_path / "scenes.tar")
    assert again.exit_code == 0, again.stderr
    assert (tmp_path / "scenes.tar").read_bytes() == packed("10.3")[0].read_bytes()
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["scenes.tar"]


def test_the_newest_jetpack_and_the_default_plan_are_taken(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "board.tar"
    result = pack(bundle, "--device", ORIN, "-o", out, "--workspace", 64, "--optimization-level", 2)
    assert "for JetPack 7.2, TensorRT 10.16.2.10, graphs as for tensorrt-10.16;" in result.stderr
    assert "the board has also JetPack 6.0, 6.1, 6.2, 6.2.1, 6.2.2 (--jetpack)" in result.stderr
    assert f"On the board: tar xf board.tar && sh {out.stem}/build.sh" in result.stderr
    default = Bundle.open(bundle).manifest.default_plan
    assert [line.split("  ")[0] for line in result.stdout.splitlines()[1:]] == [f"{part} of {default}" for part in ("vision", "prefill", "decode")]
    with tarfile.open(out) as tar:
        found, = [m.name for m in tar if m.name.endswith(".trtexec") and "vision" in m.name]
        file = tar.extractfile(found)
        assert file is not None and {"--memPoolSize=workspace:64", "--builderOptimizationLevel=2"} <= set(file.read().decode().splitlines())


# the wheel

def test_pip_takes_the_wheel_and_it_needs_no_compiler_packages(unpacked: Callable[[str], Path], tmp_path: Path) -> None:
    file, = unpacked("10.3").glob("*.whl")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--target",
                    str(tmp_path / "site"), str(file)], check=True)
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import edgecomp_runtime.session, edgecomp_runtime.images; "
            "assert edgecomp_runtime.__file__.startswith(sys.argv[1]), edgecomp_runtime.__file__; "
            "print(*sorted({'torch', 'onnx', 'onnx_ir', 'transformers', 'edgecomp'} & set(sys.modules)))")
    assert subprocess.check_output([sys.executable, "-c", code, str(tmp_path / "site")], cwd=tmp_path, text=True) == "\n"


@pytest.mark.parametrize(("cuda", "needed"), [("12.2", "cuda-python>=12.6,<13"), ("12.6.68", "cuda-python>=12.6,<13"),
                                              ("13.0.48", "cuda-python>=13,<14"), ("13.2.78", "cuda-python>=13,<14")])
def test_the_wheel_asks_for_the_boards_cuda(cuda: str, needed: str) -> None:
    assert wheel.requirements(cuda)[-1] == needed


def test_the_wheel_asks_for_what_the_project_does() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert all(f'"{dependency}",' in project for dependency in wheel.DEPENDENCIES)


# build.sh, with a stand-in for trtexec

@pytest.mark.parametrize("release", BOARDS)
def test_build_sh_builds_each_engine_once_and_enters_it(unpacked: Callable[[str], Path], board: Callable[..., dict[str, str]], release: str) -> None:
    device, _, banner, _ = BOARDS[release]
    folder, environment = unpacked(release), board(STAND_IN=banner)
    first = sh(folder, environment)
    assert first.returncode == 0, first.stderr
    assert "cannot import tensorrt (ModuleNotFoundError: No module named 'tensorrt'): building with" in first.stdout
    assert "engines to build, one after another: 5." in first.stdout and "  memory  about 51" in first.stdout
    assert "warning: packed for a Jetson" in first.stdout, "this is no board"
    manifest = Bundle.open(folder / "bundle", verify_hashes=True).manifest
    version = {"8.6": "8.6.2", "10.3": "10.3.0", "10.13": "10.13.3.9", "10.16": "10.16.2.10"}[release]
    assert {(e.device, e.backend, e.version, e.capability) for e in manifest.engines} == {
        (device, "tensorrt", version, devices.load(device).gpu.compute_capability)}
    assert len(manifest.engines) == 5 and "plans that can run: " + ", ".join(PLANS) in first.stdout
    for engine in manifest.engines:
        name = Path(engine.graph).stem
        given = (folder / "bundle" / engine.file).read_text().splitlines()
        assert given[:-1] == (folder / "jobs" / f"{name}.trtexec").read_text().splitlines()
        assert given[-1] == f"--saveEngine=bundle/{engine.file}.partial"
        assert json.loads(json.dumps(engine.profile)) == json.loads((folder / "jobs" / f"{name}.json").read_text())["profile"]
    before = times(folder)
    second = sh(folder, environment)
    assert second.returncode == 0 and second.stdout.count("built before") == 5 and "building " not in second.stdout.replace("building with", "")
    assert times(folder) == before and "env/bin/pip install ./edgecomp_runtime-" in second.stdout
    assert not list(folder.glob("bundle/engines/*/*.partial"))


def test_build_sh_goes_on_after_ctrl_c_and_after_a_kill(unpacked: Callable[[str], Path], board: Callable[..., dict[str, str]]) -> None:
    folder = unpacked("10.3")
    assert sh(folder, board()).returncode == 0
    before = times(folder)
    lost = folder / "bundle" / "engines" / ORIN / "decoder.decode-512.tensorrt-10.3.engine"
    lost.write_text("another engine")
    slow = board(STAND_IN_FAILS="slow")
    for how, group, code in ((signal.SIGINT, True, 130), (signal.SIGTERM, False, 130), (signal.SIGKILL, True, -9)):
        child = subprocess.Popen(["sh", str(folder / "build.sh")], env={**slow}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                 start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None)
        assert child.stdout is not None
        while not child.stdout.readline().startswith("building decode of full"):
            pass
        time.sleep(0.1)
        (os.killpg if group else os.kill)(child.pid, how)
        said = child.stdout.read()
        assert child.wait(10) == code, said
        if how != signal.SIGKILL:
            assert "lists 4 engines; plans that can run: stride-9-decoder1" in said and "stopped: engines that are done stay" in said
            Bundle.open(folder / "bundle")
        assert not list(folder.glob("bundle/engines/*/*.partial"))
    (folder / "bundle" / "engines" / ORIN / f"{lost.name}.partial").write_text("what a kill left")
    result = sh(folder, board())
    assert result.returncode == 0 and result.stdout.count("built before") == 4 and "lists 5 engines" in result.stdout
    assert {path for path, at in times(folder).items() if before.get(path) != at} == {str(lost)}
    assert len(Bundle.open(folder / "bundle", verify_hashes=True).manifest.engines) == 5


@pytest.mark.parametrize(("banner", "said"), [
    ("v8602", "these graphs are for TensorRT 10.3 and newer, before 10.13 (JetPack 6.2), and this is TensorRT 8.6.2: pack again with: edgecomp pack "
              f"BUNDLE --device {ORIN} --jetpack 6.0 -o OUT.tar"),
    ("v101602] [b10", "this is TensorRT 10.16.2.10: pack again with: edgecomp pack BUNDLE --device jetson-orin-nano-8gb --jetpack 7.2 -o OUT.tar"),
    ("v101303] [b9", "this is TensorRT 10.13.3.9: this board has no JetPack for it that graphs can be packed for: install JetPack 6.2")])
def test_build_sh_refuses_another_tensorrt(unpacked: Callable[[str], Path], board: Callable[..., dict[str, str]], banner: str, said: str) -> None:
    result = sh(unpacked("10.3"), board(STAND_IN=banner))
    assert result.returncode == 1 and result.stderr.startswith("build.sh: ") and said in result.stderr and len(result.stderr.splitlines()) == 1


def test_build_sh_says_what_is_wrong(unpacked: Callable[[str], Path], board: Callable[..., dict[str, str]]) -> None:
    folder = unpacked("10.3")
    none = sh(folder, board(trtexec=False))
    assert none.returncode == 1 and "and there is no trtexec in PATH or /usr/src/tensorrt/bin: sudo apt install python3-libnvinfer" in none.stderr
    failed = sh(folder, board(STAND_IN_FAILS="no such layer"))
    assert failed.returncode == 1 and "trtexec gave no engine (exit code 1): [E] no such layer; all of it is in logs/vision" in failed.stderr
    killed = sh(folder, board(STAND_IN_FAILS="killed"))
    assert killed.returncode == 1 and "trtexec was killed, as the system does when memory is short" in killed.stderr
    names = folder / "jobs" / "list"
    lines = [line.split("\t") for line in names.read_text().splitlines()]
    for column, size, said in ((3, 2**60, "the disk is too full for the engines"), (4, 2**50, "Memory is short. What helps")):
        lines[0][3:5] = ["1", "1"]
        lines[0][column] = str(size)
        names.write_text("".join("\t".join(line) + "\n" for line in lines))
        sums = [f"{hashlib.sha256(names.read_bytes()).hexdigest()}  jobs/list" if line.endswith("  jobs/list") else line
                for line in (folder / "SHA256SUMS").read_text().splitlines()]
        (folder / "SHA256SUMS").write_text("\n".join(sums) + "\n")
        result = sh(folder, board())
        assert said in result.stdout + result.stderr and result.returncode == (column == 3)
    (folder / "bundle" / "text" / "tokenizer.json").write_text("{}")
    damaged = sh(folder, board())
    assert damaged.returncode == 1 and "bundle/text/tokenizer.json: FAILED" in damaged.stdout
    assert "files of the archive are damaged or missing, see above: unpack it again" in damaged.stderr


def test_build_sh_without_python_leaves_engines_and_says_so(unpacked: Callable[[str], Path], board: Callable[..., dict[str, str]]) -> None:
    folder = unpacked("10.3")
    result = sh(folder, board(python=False))
    assert result.returncode == 0, result.stderr
    assert "there is no python3: building with" in result.stdout
    assert f"the engines lie in bundle/engines/{ORIN} without being in the manifest" in result.stdout
    assert len(times(folder)) == 5 and not Bundle.open(folder / "bundle").manifest.engines
    later = sh(folder, board())  # Python came
    assert later.returncode == 0 and later.stdout.count("built before") == 5 and len(Bundle.open(folder / "bundle").manifest.engines) == 5


def test_the_first_question_says_what_is_missing(unpacked: Callable[[str], Path]) -> None:
    said = subprocess.run([sys.executable, "ask.py", "What is this?"], cwd=unpacked("10.3"), capture_output=True, text=True)
    assert said.returncode == 1 and said.stderr.startswith("ask.py: this Python cannot import tensorrt") and len(said.stderr.splitlines()) == 1


# the builder's modules and the packed graphs, with TensorRT for RTX

def test_the_builders_modules_need_nothing_else(unpacked: Callable[[str], Path]) -> None:
    """Without site-packages all of them can be imported but the one that imports TensorRT at once."""
    folder = unpacked("10.3")
    assert {path.relative_to(folder / "builder").as_posix() for path in (folder / "builder").rglob("*.py")} == set(modules())
    names = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in modules() if "network" not in name]
    code = f"import sys; sys.path.insert(0, 'builder'); [__import__(name) for name in {names}]"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=folder, check=True)


rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed")


@rtx
@pytest.mark.parametrize(("release", "job"), [("8.6", "decoder.stride-9-decoder1.prefill-512"), ("10.16", "decoder.stride-9-decoder1.prefill-512")])
def test_a_packed_job_parses_and_builds(unpacked: Callable[[str], Path], release: str, job: str) -> None:
    """RTX's parser for the operators that both know, its builder for the shapes; by the archive's own modules."""
    folder = unpacked(release)
    path = folder / "jobs" / f"{job}.tensorrt-{release}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "package": "tensorrt_rtx", "capability": "8.6"}))
    for made in ("logs", f"bundle/engines/{ORIN}"):
        (folder / made).mkdir(parents=True)
    result = subprocess.run([sys.executable, "builder/build_engine.py", str(path)], cwd=folder, capture_output=True, text=True,
                            env={**os.environ, "PYTHONPATH": "builder"})
    assert result.returncode == 0, result.stderr + result.stdout
    assert (folder / json.loads(path.read_text())["out"]).stat().st_size > 100_000 and "Building engine 100 %" in result.stdout


RTX = '''"""TensorRT for RTX, which builds for one of its own GPUs, under the name that the board's package has."""
import tensorrt_rtx
from tensorrt_rtx import *
__version__ = "10.3.0"
class ComputeCapability:
    CURRENT = tensorrt_rtx.ComputeCapability.SM86
    __members__ = {}
'''


@rtx
def test_build_sh_builds_in_python(bundle: Path, board: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    """The whole of its way through Python, with real engines, though not the board's."""
    assert pack(bundle, "--device", ORIN, "--jetpack", "6.2", "--plan", PLANS[1], "-o", tmp_path / "b.tar").exit_code == 0
    with tarfile.open(tmp_path / "b.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    (tmp_path / "site" / "tensorrt").mkdir(parents=True)
    (tmp_path / "site" / "tensorrt" / "__init__.py").write_text(RTX)
    folder, environment = tmp_path / "b", board(trtexec=False, PYTHONPATH=str(tmp_path / "site"))
    child = subprocess.Popen(["sh", str(folder / "build.sh")], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None)
    assert child.stdout is not None
    while not child.stdout.readline().startswith("building prefill"):
        pass
    time.sleep(0.3)
    os.killpg(child.pid, signal.SIGINT)
    said = child.stdout.read()
    assert child.wait(10) == 130 and "lists 1 engines; plans that can run: none yet" in said and "Traceback" not in said
    assert [Path(path).name for path in times(folder)] == ["vision.tensorrt-10.3.engine"] and not list(folder.glob("bundle/engines/*/.*"))
    result = sh(folder, environment)
    assert result.returncode == 0, result.stderr
    assert "TensorRT 10.3.0, by Python" in result.stdout and "vision of stride-9-decoder1: built before" in result.stdout
    assert "Building engine 100 %" in result.stdout and "of memory at most" in result.stdout
    engines = Bundle.open(folder / "bundle", verify_hashes=True).manifest.engines
    assert [engine.version for engine in engines] == ["10.3.0"] * 3
    assert all((folder / "bundle" / engine.file).stat().st_size > 100_000 for engine in engines)


# refusals

@pytest.mark.parametrize(("args", "said"), [
    (["--device", "rtx-4090"], "rtx-4090 is not a Jetson: `edgecomp build BUNDLE --device rtx-4090` builds its engines"),
    (["--device", "jetson-nano"], "jetson-nano is too old: its newest JetPack, 4.6.x, has TensorRT 8.2.1, and graphs are written for TensorRT 8.6"),
    (["--device", "jetson-orin"], "unknown device 'jetson-orin'; did you mean"),
    (["--device", ORIN, "--jetpack", "6.3"], f"unknown JetPack release of {ORIN} '6.3'"),
    (["--device", ORIN, "--jetpack", "5.1.x"], "JetPack 5.1.x has TensorRT 8.5.2, and graphs are written for 8.6 and newer: flash the board with"),
    (["--device", ORIN, "--plan", "stride-8"], "unknown plan 'stride-8'"),
    (["--device", ORIN, "-o", "scenes.tar.gz"], "scenes.tar.gz has to end in .tar: the archive is not compressed"),
    (["--device", ORIN, "-o", "folder.tar"], "folder.tar is a folder: choose another name"),
    (["--device", ORIN, "-o", "file/scenes.tar"], "file/scenes.tar cannot be written: "),
    (["--device", ORIN, "-o", "/proc/new/scenes.tar"], "/proc/new/scenes.tar cannot be written: No such file or directory")])
def test_what_cannot_be_packed_is_one_line(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "file").touch()
    result = pack(bundle, *args, *([] if "-o" in args else ["-o", "scenes.tar"]))
    assert result.exit_code == 1 and result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("edgecomp: ")]
    assert errors == result.stderr.splitlines()[-1:] and said in errors[0]
    assert {path.name for path in tmp_path.iterdir()} == {"folder.tar", "file"}


def test_a_budget_that_does_not_fit_and_an_end_before_time_leave_nothing(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device, opened, out = devices.load(ORIN), Bundle.open(bundle), tmp_path / "new" / "x.tar"
    small = dataclasses.replace(device, memory=dataclasses.replace(device.memory, usable_gib=1e-5))
    with pytest.raises(EdgecompError, match=f"plan 'full' does not fit {ORIN}"):
        archive.pack(opened, small, choose(small, "6.2"), ["full"], out)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt
    monkeypatch.setattr(archive, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        archive.pack(opened, device, choose(device, "6.2"), ["full"], out)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_leaves_the_older_archive(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_text("older")
    result = subprocess.run([sys.executable, "-m", "edgecomp", "pack", str(bundle), "--device", ORIN, "-o", "x.tar"], cwd=tmp_path, text=True,
                            capture_output=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("edgecomp: x.tar cannot be written: File too large")
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"] and (tmp_path / "x.tar").read_text() == "older"


def test_boards_are_told_by_their_own_names() -> None:
    wanted = {ORIN: "Orin Nano", "jetson-orin-nano-8gb-super": "Orin Nano", "jetson-agx-thor": "AGX Thor", "jetson-orin-nx-16gb-super": "Orin NX",
              "jetson-agx-orin-industrial": "AGX Orin", "jetson-t4000": "T4000"}
    assert {name: orders.board(devices.load(name)) for name in wanted} == wanted
    assert all(orders.board(devices.load(name)) for name in devices.names() if name.startswith("jetson-"))


def test_releases_have_the_ranges_of_the_table() -> None:
    assert [(release.jetpack, *release.versions) for release in releases(devices.load("jetson-agx-thor"))] == [
        ("7.0", "10.13", "10.16"), ("7.1", "10.13", "10.16"), ("7.2", "10.16", "11.4")]


def test_every_board_is_packed_for_releases_that_are_tried_here() -> None:
    tried, too_old = {f"tensorrt-{release}" for release in BOARDS}, []
    for name in (name for name in devices.names() if name.startswith("jetson-")):
        try:
            assert {release.dialect for release in releases(devices.load(name))} <= tried, name
        except EdgecompError as error:
            assert "is too old: its newest JetPack" in str(error)
            too_old.append(name)
    assert too_old == ["jetson-agx-xavier", "jetson-nano", "jetson-tx2", "jetson-xavier-nx"]
