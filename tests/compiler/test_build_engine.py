"""Engines built by TensorRT for RTX, without a GPU: whole or not at all, told as they come along, refused in one line."""
from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgecomp.build.building import build_engine
from edgecomp_runtime.errors import EdgecompError

pytest.importorskip("tensorrt_rtx")

WIDTH = 256
SHAPES = {"x": ((1, 1, WIDTH), (1, 16, WIDTH), (1, 64, WIDTH))}


def quiet(phase: str, step: int, steps: int) -> None:
    pass


def save(folder: Path, nodes: list[onnx.NodeProto], inputs: dict[str, list[int | str]], dtype: int, weights: dict[str, Any], out: str = "y") -> Path:
    """Writes a graph whose weights lie in a file beside it."""
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    values = [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()]
    graph = helper.make_graph(nodes, "g", values, [helper.make_tensor_value_info(out, dtype, None)], tensors)
    path = folder / "graph.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path, save_as_external_data=True,
              location="weights.bin", size_threshold=1024)
    return path


@pytest.fixture
def chain(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The order for an engine of some layers, each an fp16 matrix product as an exporter writes it."""
    def made(layers: int = 2, width: int = WIDTH, **order: Any) -> dict[str, Any]:
        random, nodes, weights, x = np.random.default_rng(0), [], {}, "x"
        for n in range(layers):
            weights[f"w{n}"] = (random.standard_normal((width, width)) / 16).astype(np.float16)
            nodes += [helper.make_node("Transpose", [f"w{n}"], [f"t{n}"], perm=[1, 0]), helper.make_node("MatMul", [x, f"t{n}"], [f"m{n}"]),
                      helper.make_node("Sigmoid", [f"m{n}"], [f"s{n}"])]
            x = f"s{n}"
        nodes[-1].output[0] = "y"
        path = save(tmp_path, nodes, {"x": [1, "rows", width]}, TensorProto.FLOAT16, weights)
        shapes = {"x": [[1, rows, width] for rows in (1, 16, 64)]}
        return {**order_of(path), "profile": shapes, **order}
    return made


def order_of(graph: Path, **order: Any) -> dict[str, Any]:
    return {"graph": str(graph), "out": str(graph.parent / "out.engine"), "package": "tensorrt_rtx", "capability": "8.9", "profile": SHAPES,
            "log": str(graph.parent / "log"), **order}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("capability", ["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"])
def test_an_engine_for_each_gpu_that_rtx_knows(capability: str, tmp_path: Path, chain: Callable[..., dict[str, Any]]) -> None:
    told: list[tuple[str, int, int]] = []
    result = build_engine(chain(capability=capability), lambda *done: told.append(done))
    assert (tmp_path / "out.engine").stat().st_size == result.engine_bytes > 2 * WIDTH * WIDTH * 2
    assert names(tmp_path) == {"graph.onnx", "weights.bin", "out.engine", "log"}
    assert 0 < result.peak_anonymous_bytes < result.peak_resident_bytes and result.layers >= 6 and result.version.startswith("1.")
    phases = list(dict.fromkeys(phase for phase, _, _ in told))
    assert phases[0] == "parsing" and phases[-1] == "writing" and len(phases) >= 3
    for phase in phases:
        steps = [step for name, step, _ in told if name == phase]
        assert steps == sorted(steps) and all(step <= most or not most for name, step, most in told if name == phase)
    assert [(step, steps) for phase, step, steps in told if phase == phases[1]][-1] == (1000, 1000)


def test_fp32_attention_falls_apart_where_it_has_no_kernel(tmp_path: Path) -> None:
    shape: list[int | str] = [1, 2, "rows", 64]
    path = save(tmp_path, [helper.make_node("Attention", ["q", "k", "v"], ["y"])], dict.fromkeys("qkv", shape), TensorProto.FLOAT, {})
    profile = dict.fromkeys("qkv", ((1, 2, 1, 64), (1, 2, 16, 64), (1, 2, 64, 64)))
    assert build_engine(order_of(path, profile=profile, precision="fp32"), quiet).engine_bytes


def test_a_refused_operator_is_named(tmp_path: Path) -> None:
    nodes = [helper.make_node("NonZero", ["x"], ["where"], name="find_them"), helper.make_node("Cast", ["where"], ["y"], to=TensorProto.FLOAT16)]
    path = save(tmp_path, nodes, {"x": [1, "rows", WIDTH]}, TensorProto.FLOAT16, {})
    with pytest.raises(EdgecompError, match=r"^tensorrt_rtx 1\.\S+ does not take \S+graph.onnx: NonZero node 'find_them': [^\n]+$"):
        build_engine(order_of(path), quiet)
    assert names(tmp_path) == {"graph.onnx", "log"}


def test_what_the_builder_refuses_is_told(tmp_path: Path) -> None:
    node = helper.make_node("TopK", ["x", "k"], ["y", "which"])
    path = save(tmp_path, [node], {"x": [1, 5000]}, TensorProto.FLOAT16, {"k": np.array([3841])})
    with pytest.raises(EdgecompError, match=r"^tensorrt_rtx 1\.\S+ gave no engine of \S+: [^\n]*3840[^\n]*$"):
        build_engine(order_of(path, profile={}), quiet)
    assert names(tmp_path) == {"graph.onnx", "log"} and "ERROR: " in (tmp_path / "log").read_text()


@pytest.mark.parametrize("order, said", [
    ({"capability": "8.7"}, r"tensorrt_rtx \S+ does not build for compute capability 8\.7, only for 7\.5, 8\.0, 8\.6, 8\.9, 12\.0, 12\.1: .*"),
    ({"package": "tensorrt_tx"}, "tensorrt_tx is not installed: known packages are tensorrt and tensorrt_rtx"),
    ({"profile": {}}, r"input x of \S+ has the shape \[1, \?, 256\], which \[1, \?, 256\] .* does not fit"),
    ({"profile": {"x": [[1, 9, WIDTH], [1, 1, WIDTH], [1, 64, WIDTH]]}}, r"input x of .* which \[1, 9, 256\] to \[1, 1, 256\] .* does not fit"),
    ({"profile": {**SHAPES, "z": SHAPES["x"]}}, r"unknown input 'z' \(known: x\)"),
    ({"graph": "/nowhere/graph.onnx"}, r"tensorrt_rtx \S+ does not take /nowhere/graph.onnx: .*"),
    ({"log": "/nowhere/log"}, "/nowhere/log cannot be written: No such file or directory")])
def test_bad_orders_are_refused_in_one_line(order: dict[str, Any], said: str, tmp_path: Path, chain: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(EdgecompError, match=f"^{said}$"):
        build_engine(chain(**order), quiet)
    assert names(tmp_path) <= {"graph.onnx", "weights.bin", "log"}


def test_a_full_disk(tmp_path: Path, chain: Callable[..., dict[str, Any]]) -> None:
    order = tmp_path / "order.json"
    order.write_text(json.dumps(chain(layers=8, width=512)))
    (tmp_path / "out.engine").write_bytes(b"the last one")
    done = subprocess.run([sys.executable, "-m", "edgecomp.build.engine", str(order)], capture_output=True, text=True, check=False,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)))
    assert done.returncode == 1 and done.stderr == ""
    assert json.loads(done.stdout.splitlines()[-1])["error"] == (
        f"{tmp_path / 'out.engine'} cannot be written: File too large; nothing was left behind: make room, or choose another place")
    assert names(tmp_path) == {"graph.onnx", "weights.bin", "log", "order.json", "out.engine"}
    assert (tmp_path / "out.engine").read_bytes() == b"the last one"


def test_a_release_that_has_neither_a_stream_nor_progress(tmp_path: Path, chain: Callable[..., dict[str, Any]]) -> None:
    """TensorRT 8.6, as far as the one at hand can play it."""
    order = tmp_path / "order.json"
    order.write_text(json.dumps(chain()))
    older = "import sys, tensorrt_rtx as t; del t.IStreamWriter, t.IProgressMonitor; from edgecomp.build import engine; sys.exit(engine.main())"
    done = subprocess.run([sys.executable, "-c", older, str(order)], capture_output=True, text=True, check=True)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert (tmp_path / "out.engine").stat().st_size == said[-1]["engine_bytes"] > 2 * WIDTH * WIDTH * 2
    assert {line["phase"] for line in said if "phase" in line} == {"parsing"}


def builder_of(folder: Path) -> int | None:
    """The process that writes the engine there."""
    return next((int(path.name.split(".")[-2]) for path in folder.glob(".out.engine.*.partial")), None)


def test_a_killed_builder_leaves_nothing_and_is_told(tmp_path: Path, chain: Callable[..., dict[str, Any]]) -> None:
    def kill(*done: object) -> None:
        if builder := builder_of(tmp_path):
            os.kill(builder, signal.SIGKILL)
    with pytest.raises(EdgecompError, match=r"was killed, as the system does when memory is short; it had taken \d+ MiB by then: .* add swap"):
        build_engine(chain(layers=8, width=512), kill)
    assert names(tmp_path) == {"graph.onnx", "weights.bin", "log"}


def test_ctrl_c_ends_the_builder(tmp_path: Path, chain: Callable[..., dict[str, Any]]) -> None:
    seen: list[int] = []

    def interrupt(*done: object) -> None:
        if builder := builder_of(tmp_path):
            seen.append(builder)
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        build_engine(chain(layers=8, width=512), interrupt)
    assert names(tmp_path) == {"graph.onnx", "weights.bin", "log"}
    with pytest.raises(ProcessLookupError):
        os.kill(seen[0], 0)


@pytest.mark.parametrize("ending", ["the builder interrupted", "its parent killed"])
def test_a_builder_that_has_to_end_removes_what_it_wrote(ending: str, tmp_path: Path, chain: Callable[..., dict[str, Any]]) -> None:
    order = tmp_path / "order.json"
    order.write_text(json.dumps(chain(layers=32, width=512)))
    alone = ending == "the builder interrupted"
    command = ["-m", "edgecomp.build.engine", str(order)] if alone else [
        "-c", f"import json; from edgecomp.build.building import build_engine; build_engine(json.load(open({str(order)!r})), print)"]
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    while (builder := builder_of(tmp_path)) is None:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT if alone else signal.SIGKILL)
    assert process.wait() == (130 if alone else -signal.SIGKILL)
    until = time.monotonic() + 10
    while builder_of(tmp_path) and time.monotonic() < until:
        time.sleep(0.01)
    assert names(tmp_path) == {"graph.onnx", "weights.bin", "log", "order.json"}
    assert alone == (builder == process.pid)


def test_what_was_timed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT for RTX times nothing, so a stand-in plays the part of TensorRT's configuration."""
    monkeypatch.setitem(sys.modules, "tensorrt", importlib.import_module("tensorrt_rtx"))
    network: Any = importlib.import_module("edgecomp.build.network")
    monkeypatch.delitem(sys.modules, "edgecomp.build.network")
    given: list[bytes] = []

    class Config:
        fits = True

        def create_timing_cache(self, stored: bytes) -> bytes:
            given.append(stored)
            return stored

        def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
            return self.fits or not cache

        def get_timing_cache(self) -> Any:
            return SimpleNamespace(serialize=lambda: given[-1] + b"timed")
    from edgecomp.build.order import Order
    path, config = tmp_path / "cache", Config()
    order, log = Order("", "", "tensorrt", None, {}, timing_cache=str(path)), SimpleNamespace(errors=[], warnings=[])
    assert network.use_timing_cache(config, order, log) == ()
    network.keep_timing_cache(config, order)
    assert network.use_timing_cache(config, order, log) == () and given == [b"", b"timed"]
    config.fits = False
    note, = network.use_timing_cache(config, order, log)
    assert "is of another TensorRT, driver or GPU: it was ignored" in note and given[-1] == b""
    network.keep_timing_cache(config, order)
    assert names(tmp_path) == {"cache"} and path.read_bytes() == b"timed"
