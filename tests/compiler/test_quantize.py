"""Weights in blocks of whole numbers: the arithmetic by loops, which weights, what the bundle holds, and what each backend is given."""
from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import numpy_helper

from edgecomp import methods
from edgecomp.compress import Recipe, compress
from edgecomp.dialects import quantized as dialect
from edgecomp.dialects.targets import TARGETS, refused
from edgecomp.dialects.tensorrt import lower
from edgecomp.ir import int4
from edgecomp.ir.graphs import load, read
from edgecomp.lowering import lowered
from edgecomp.predict.graph import counted
from edgecomp.quantize.apply import quantize
from edgecomp.quantize.blocks import FACTORS, quantized
from edgecomp.writer import copy_files, writing
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.errors import EdgecompError, UnknownNameError
from edgecomp_runtime.manifest import EngineInfo

WEIGHTS = {dtype: arrays.arrays(dtype, st.tuples(st.integers(1, 5), st.sampled_from([32, 64])),
                                elements=st.floats(-1000, 1000, width=16 if dtype == np.float16 else 32)) for dtype in (np.float16, np.float32)}


def by_loops(row: list[float], most: int) -> tuple[list[int], float, float]:
    """One block's numbers, scale and sum of squared errors: of all scales that may be tried, the first that is best, in double precision."""
    largest = max(abs(x) for x in row)
    found: tuple[list[int], float, float] | None = None
    for factor in FACTORS[8 if most == 127 else 4]:
        scale = float(np.float16(largest / most * factor)) or 2.0**-24
        numbers = [max(-most - 1, min(most, round(x / scale))) for x in row]
        error = sum((n * scale - x) ** 2 for n, x in zip(numbers, row))
        if found is None or error < found[2]:
            found = numbers, scale, error
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_numbers_and_scales_are_those_of_a_plain_loop(bits: int, dtype: type) -> None:
    weight = (np.random.default_rng(bits).standard_t(3, (9, 96)) / 20).astype(dtype)
    weight[2, :32] = 0
    weight[3, 40] = 6.5  # one that stands out, for whose sake its block is coarse, or which is cut off
    numbers, scales = quantized(weight, bits, 32)
    assert numbers.dtype == np.int8 and scales.dtype == np.float16 and scales.shape == (9, 3)
    for row, block in np.ndindex(9, 3):
        expected, scale, _ = by_loops([float(x) for x in weight[row, 32 * block:32 * block + 32]], 2 ** (bits - 1) - 1)
        assert scales[row, block] == scale
        assert numbers[row, 32 * block:32 * block + 32].tolist() == expected


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([np.float16, np.float32]), st.sampled_from([4, 8]), st.sampled_from([16, 32]))
def test_any_weight_is_met_as_well_as_by_its_largest(data: st.DataObject, dtype: type, bits: int, block: int) -> None:
    """No scale is zero, which TensorRT refuses; no error is larger than with the block's largest weight at the largest number."""
    weight = data.draw(WEIGHTS[dtype])
    numbers, scales = quantized(weight, bits, block)
    most = 2 ** (bits - 1) - 1
    assert (scales > 0).all() and np.isfinite(scales).all() and numbers.min() >= -most - 1 and numbers.max() <= most
    wide, blocks = weight.astype(np.float64).reshape(-1, block), scales.astype(np.float64).reshape(-1, 1)
    error = np.square(numbers.reshape(-1, block) * blocks - wide).sum(1)
    plain = np.maximum((np.abs(wide).max(1, keepdims=True) / most).astype(np.float16), np.float16(2.0**-24)).astype(np.float64)
    of_plain = np.square(np.clip(np.rint(wide / plain), -most - 1, most) * plain - wide).sum(1)
    assert (error <= of_plain * (1 + 1e-4) + 1e-12).all()


def test_four_bits_are_stored_as_onnx_stores_them() -> None:
    values = np.random.default_rng(0).integers(-8, 8, (5, 32)).astype(np.int8)
    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.INT4, values.shape, values.reshape(-1).tolist())
    assert numpy_helper.to_array(tensor).astype(np.int8).tolist() == values.tolist()
    stored = bytes(byte & 255 for byte in tensor.int32_data) if tensor.int32_data else tensor.raw_data
    assert int4.packed(values).tobytes() == stored
    assert int4.unpacked(int4.packed(values)).tolist() == values.tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_named(value: float) -> None:
    weight = np.ones((4, 32), np.float32)
    weight[3, 7] = value
    with pytest.raises(EdgecompError, match=r"^model\.up\.weight has values that are infinite or no numbers: it cannot be quantized"):
        quantized(weight, 4, 32, "model.up.weight")


def test_a_weight_beyond_its_scales_is_named() -> None:
    with pytest.raises(EdgecompError, match=r"^head reaches 7e\+04, and scales are in fp16, .* leave it as it is with --unquantized 'head'$"):
        quantized(np.full((1, 16), 7e4, np.float32), 8, 16, "head")


@pytest.fixture(scope="module")
def full(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration model's bundle with the plan 'full' alone."""
    out, bundle = tmp_path_factory.mktemp("full") / "bundle", Bundle.open(demo)
    plan = bundle.manifest.plans["full"]
    graphs = {name: bundle.manifest.graphs[name] for files in plan.variants.values() for name in files.values()}
    with writing(out) as (partial, finish):
        copy_files(bundle, partial, [name for name in bundle.manifest.files if name in graphs or not name.endswith(".onnx")])
        finish(dataclasses.replace(bundle.manifest, plans={"full": plan}, graphs=graphs, default_plan="full"))
    return out


@pytest.fixture(scope="module")
def made(full: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """That in int8 and in int4."""
    found = {}
    for precision in ("int8", "int4"):
        found[precision] = tmp_path_factory.mktemp(precision) / "bundle"
        quantize(full, found[precision], precision)
    return found


def parameters(checkpoint: Path) -> dict[str, list[int]]:
    """Shapes of a checkpoint's tensors by name, from the headers of its files."""
    found = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        found |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    return found


def last(name: str) -> str:
    return ".".join(name.split(".")[-3:])


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_decoders_products_and_the_head_are_quantized_and_nothing_else(made: dict[str, Path], checkpoint: Path, precision: str) -> None:
    info = Bundle.open(made[precision]).manifest.quantized
    assert info is not None and (info.precision, info.block) == (precision, 32)
    pattern = re.compile(r"language_model\.(model\.)?layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight$")
    products = {name for name in parameters(checkpoint) if pattern.search(name)}
    assert len(products) == 8 * 7
    in_layers = {name: bits for name, bits in info.bits.items() if name != "lm_head.weight"}
    assert sorted(map(last, in_layers)) == sorted(map(last, products))
    assert set(in_layers.values()) == {8 if precision == "int8" else 4} and info.bits["lm_head.weight"] == 8


def stored_bytes(graph: Path) -> int:
    """Of a graph's weights, each once."""
    tensors = [value.const_value for value in load(graph).graph.initializers.values()]
    return sum({(getattr(t, "offset", None), t.name if not isinstance(t, ir.ExternalTensor) else ""): t.nbytes for t in tensors if t}.values())


def test_the_decoder_in_int4_takes_at_most_035_of_fp16(made: dict[str, Path], full: Path) -> None:
    """Of a bundle in fp32 too, as here."""
    in_fp16 = stored_bytes(full / "graphs/decoder.onnx") / 2
    assert 0.25 < stored_bytes(made["int4"] / "graphs/decoder.onnx") / in_fp16 < 0.35
    assert 0.5 < stored_bytes(made["int8"] / "graphs/decoder.onnx") / in_fp16 < 0.6


def test_what_stays_is_stored_as_it_was_and_once(made: dict[str, Path], full: Path) -> None:
    before, after = Bundle.open(full), Bundle.open(made["int4"])
    assert after.manifest.quantized is not None
    for name in ("vision", "decoder"):
        old, new = (load(bundle.path / f"graphs/{name}.onnx").graph.initializers for bundle in (before, after))
        for key in old.keys() - after.manifest.quantized.bits.keys():
            np.testing.assert_array_equal(read(old[key].const_value), read(new[key].const_value))  # type: ignore[arg-type]
    table = [np.memmap(bundle.file(info.file), info.dtype, "r", info.offset, info.shape)
             for bundle in (before, after) for info in [bundle.manifest.embeddings]]
    np.testing.assert_array_equal(*table)
    tensors = {}
    for graph in (made["int4"] / "graphs").glob("*.onnx"):
        for value in load(graph).graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                tensors[value.const_value.offset] = value.const_value.nbytes
    size = (made["int4"] / "graphs/weights.bin").stat().st_size
    assert sum(tensors.values()) + table[1].nbytes <= size <= sum(tensors.values()) + table[1].nbytes + 4096 * (len(tensors) + 1)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_onnxruntime_computes_every_product_from_the_stored_bytes(made: dict[str, Path], full: Path, precision: str, tmp_path: Path) -> None:
    """What onnxruntime makes of the graph at load: no product is done on weights that were made floats, and nothing is left to be flipped."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(made[precision] / "graphs/decoder.onnxruntime.onnx", options, providers=["CPUExecutionProvider"])
    optimized = load(tmp_path / "optimized.onnx").graph
    operators = [node.op_type for node in optimized]
    assert all(value.is_initializer() for node in optimized if node.op_type == "MatMulNBits" for value in node.inputs[1:] if value is not None)
    info = Bundle.open(made[precision]).manifest.quantized
    products = [node for node in optimized if node.op_type == "MatMulNBits"]  # one may be of several weights, side by side
    before = load(full / "graphs/decoder.onnx").graph.initializers
    assert info is not None
    multiplied = sum(node.attributes["N"].as_int() * node.attributes["K"].as_int() for node in products)
    assert multiplied == sum(before[name].const_value.size for name in info.bits)  # type: ignore[union-attr]
    assert not {"MatMul", "FusedMatMul", "Gemm", "BitwiseXor", "DequantizeLinear", "Transpose"} & set(operators)


@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 64), (4, 128), (8, 16), (8, 32), (8, 256)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_product_is_that_of_the_numbers_times_their_scales(bits: int, block: int, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """DequantizeLinear by numpy, whole numbers and all; one weight for two products, rows of every kind of bytes."""
    monkeypatch.setattr(dialect, "ACCURACY_LEVEL", 0)
    rng = np.random.default_rng(block)
    width, rows = 512, 24
    numbers = rng.integers(-2 ** (bits - 1), 2 ** (bits - 1), (rows, width)).astype(np.int8)
    scales = (rng.uniform(0.5, 2, (rows, width // block)) / 2 ** (bits + 2)).astype(dtype)
    kind = "float" if dtype == np.float32 else "float16"
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["": 23]>
        g ({kind}[b, s, {width}] x, int{bits}[{rows}, {width}] w, {kind}[{rows}, {width // block}] scale) => ({kind}[b, s, {rows}] y) {{
            d = DequantizeLinear <axis = 1, block_size = {block}> (w, scale)
            t = Transpose <perm = [1, 0]> (d)
            one = MatMul (x, t)
            other = MatMul (one, d)
            y = MatMul (other, t)
        }}""")
    for name, array in (("w", numbers.astype(ir.DataType.INT4.numpy()) if bits == 4 else numbers), ("scale", scales)):
        value = next(value for value in model.graph.inputs if value.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        model.graph.register_initializer(value)
    dialect.quantized_products(model)
    model.opset_imports["com.microsoft"] = 1
    assert [node.op_type for node in model.graph].count("MatMulNBits") == 2
    x = rng.normal(size=(2, 3, width)).astype(dtype)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    found, = session.run(None, {"x": x})
    weight = np.einsum("rbk,rb->rbk", numbers.reshape(rows, -1, block).astype(np.float64), scales.astype(np.float64)).reshape(rows, width)
    expected = x.astype(np.float64) @ weight.T @ weight @ weight.T
    assert np.abs(found - expected).max() / np.abs(expected).max() < (1e-5 if dtype == np.float32 else 4e-3)


def structure(graph: Path) -> tuple[Counter[str], list[str]]:
    """What a graph computes, whatever its inner names and the order of its nodes: the nodes, and the outputs, each by all that it rests on."""
    model = load(graph)
    made: dict[ir.Value | None, str] = {None: "none", **{value: f"input {value.name}" for value in model.graph.inputs}}
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        made[value] = f"{name} {value.dtype} {hashlib.sha256(np.ascontiguousarray(read(value.const_value)).tobytes()).hexdigest()}"
    found: Counter[str] = Counter()
    for node in model.graph:
        attributes = sorted((key, str(attribute.value)) for key, attribute in node.attributes.items())
        whole = str((node.domain, node.op_type, attributes, [made[value] for value in node.inputs]))
        digest = hashlib.sha256(whole.encode()).hexdigest()
        found[digest] += 1
        made |= {value: f"{digest}:{n}" for n, value in enumerate(node.outputs)}
    return found, [f"{value.name} {made[value]}" for value in model.graph.outputs]


def test_compressing_before_or_behind_quantizing_gives_the_same(full: Path, tmp_path: Path) -> None:
    """A cut inside the decoder, whose graph is a second one over the same weights: the same plans, weights, and what is computed."""
    recipes = [Recipe.of(methods.make("fastv"), "64", "decoder:2"), Recipe.of(methods.make("dart"), "100")]
    compress(full, tmp_path / "c", recipes)
    quantize(tmp_path / "c", tmp_path / "cq", "int4")
    quantize(full, tmp_path / "q", "int4")
    names = compress(tmp_path / "q", tmp_path / "qc", recipes)
    one, other = Bundle.open(tmp_path / "cq"), Bundle.open(tmp_path / "qc")
    assert one.manifest.plans == other.manifest.plans and one.manifest.graphs == other.manifest.graphs
    assert one.manifest.quantized == other.manifest.quantized
    assert one.manifest.files["graphs/weights.bin"] == other.manifest.files["graphs/weights.bin"]
    for name in names:
        for part, file in one.manifest.plans[name].variants["neutral"].items():
            assert structure(one.file(file)) == structure(other.file(file)), (name, part)
    feeds = _feeds(one.file(one.manifest.plans[names[0]].variants["onnxruntime"]["prefill"]))
    mine, theirs = (ort.InferenceSession(bundle.file(bundle.manifest.plans[names[0]].variants["onnxruntime"]["prefill"]),
                                         providers=["CPUExecutionProvider"]).run(["logits"], feeds)[0] for bundle in (one, other))
    np.testing.assert_array_equal(mine, theirs)


def _feeds(graph: Path) -> dict[str, np.ndarray]:
    """A prompt of 600 random rows, one picture's 576 among them, of which 64 go on."""
    rng, rows, after = np.random.default_rng(0), 600, 600 - 512
    sizes = {"batch": 1, "rows": rows, "rows.2": after, "images": 1, "logit_rows": 1, "capacity": 640, "capacity.2": 640}
    given: dict[str, Any] = {"visual_rows.2": np.arange(5, 581)[None], "logit_rows": np.array([after - 1]), "positions": np.arange(rows)[None],
                             "row_map.2": np.concatenate([np.arange(5), rows + np.arange(64), np.arange(581, rows)]),
                             "last_row": np.array([rows - 1]), "last_row.2": np.array([after - 1]), "total_rows": np.array(rows),
                             "total_rows.2": np.array(after), "length": np.array([0]), "length.2": np.array([0])}
    found = {}
    for value in load(graph).graph.inputs:
        assert value.name and value.shape is not None and value.dtype is not None
        dtype = value.dtype.numpy()
        if value.name in given:
            found[value.name] = given[value.name].astype(dtype)
        else:
            shape = [d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape]
            found[value.name] = (rng.normal(size=shape) if value.name == "embeddings" else np.zeros(shape)).astype(dtype)
    return found


REFUSALS = {("tensorrt-8.6", "int4"): r"takes none: use the bundle that was quantized", ("tensorrt-8.6", "int8"): r"takes none",
            **{(f"tensorrt-{release}", precision): r"is in blocks of int8, and .* takes blocks of int4 alone: quantize with --weights int4 "
               r"--unquantized 'lm_head\.\*'" for release in ("10.3", "10.13", "10.16") for precision in ("int4", "int8")}}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_tensorrt_release_takes_the_blocks_that_it_knows(made: dict[str, Path], target: str, precision: str) -> None:
    bundle = Bundle.open(made[precision])
    plan = bundle.manifest.plans["full"]
    model = load(bundle.file(plan.variants["neutral"]["decode"]))
    lower(model, "decode", TARGETS[target], plan.cache_rows)
    assert sum(node.op_type == "DequantizeLinear" for node in model.graph) == 57
    assert model.graph.opset_imports[""] == max(21, TARGETS[target].opset)
    problems = refused(model, TARGETS[target])
    if (target, precision) in REFUSALS:
        in_blocks = [problem for problem in problems if re.search(REFUSALS[target, precision], problem)]
        assert len(in_blocks) == (1 if precision == "int4" and target != "tensorrt-8.6" else 57)
    else:
        assert not problems


def test_what_a_release_does_not_take_is_left_out_as_its_refusal_says(full: Path, tmp_path: Path) -> None:
    quantize(full, tmp_path / "bundle", "int4", unquantized=["lm_head.*"])
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest.quantized is not None and len(bundle.manifest.quantized.bits) == 56
    with writing(tmp_path / "lowered") as (partial, finish):
        copy_files(bundle, partial)
        files = lowered(bundle.manifest.plans["full"], "tensorrt-10.3", dict(bundle.manifest.graphs), partial)
        assert load(partial / files["decode"]).graph.opset_imports[""] == 21
        finish(bundle.manifest)


@pytest.mark.parametrize("dialect", ["onnxruntime", "neutral"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_token_is_predicted_to_read_the_stored_bytes(made: dict[str, Path], full: Path, precision: str, dialect: str) -> None:
    """Numbers and scales; and to compute what it computed before."""
    run = {"text_rows": 20, "context": 600, "dialect": dialect}
    before, after = (counted(Bundle.open(bundle), "full", "decode", **run) for bundle in (full, made[precision]))  # type: ignore[arg-type]
    assert after.weight_bytes == pytest.approx(stored_bytes(made[precision] / "graphs/decoder.onnx"), rel=0.005)
    assert after.flops == before.flops and after.activation_bytes == before.activation_bytes


@pytest.mark.parametrize(("precision", "more", "error", "message"), [
    ("int3", {}, UnknownNameError, "unknown precision of weights 'int3'; did you mean 'int8'? (known: int4, int8)"),
    ("int4", {"block": 48}, EdgecompError, "blocks of 48 are none that there are kernels for: choose --block 16, 32, 64, 128, 256"),
    ("int4", {"block": 64}, EdgecompError, "model.language_model.layers.0.mlp.down_proj.weight is 864 wide, which blocks of 64 do not divide: choose "
                                           "--block 16 or 32, or --unquantized 'model.language_model.layers.0.mlp.down_proj.weight'"),
    ("int4", {"unquantized": ["lm_heat.*"]}, EdgecompError, "--unquantized 'lm_heat.*' is the name of none of the 57 weights that int4 is for"),
    ("int8", {"unquantized": ["*_proj.weight", "lm_head.weight"]}, EdgecompError,
     "--unquantized leaves none of the 57 weights that --weights is for: leave out --weights, or one --unquantized"),
])
def test_what_cannot_be_done_is_said_before_anything_is_written(full: Path, tmp_path: Path, precision: str, more: dict[str, Any],
                                                                error: type[EdgecompError], message: str) -> None:
    with pytest.raises(error) as found:
        quantize(full, tmp_path / "out", precision, **more)
    assert str(found.value).startswith(message) and not [*tmp_path.iterdir()]


def test_quantized_weights_are_not_quantized_again(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(EdgecompError, match="has weights in int8 already: quantize the bundle that it was made from"):
        quantize(made["int8"], tmp_path / "out", "int4")


def test_engines_of_the_old_weights_are_left_out(full: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(full)
    engine = EngineInfo("engines/d/vision.engine", "graphs/vision.onnx", "d", "tensorrt-rtx", "1.7", "8.9", {})
    with writing(tmp_path / "built") as (partial, finish):
        copy_files(bundle, partial)
        (partial / engine.file).parent.mkdir(parents=True)
        (partial / engine.file).write_bytes(b"an engine")
        finish(dataclasses.replace(bundle.manifest, engines=(engine,)))
    quantize(tmp_path / "built", tmp_path / "out", "int8")
    assert Bundle.open(tmp_path / "built").manifest.engines == (engine,) and not Bundle.open(tmp_path / "out").manifest.engines
    assert not (tmp_path / "out" / "engines").exists()


def test_a_bundle_may_be_quantized_in_its_place(full: Path, tmp_path: Path, made: dict[str, Path]) -> None:
    compress(full, tmp_path / "bundle", [])
    quantize(tmp_path / "bundle", tmp_path / "bundle", "int4")
    assert Bundle.open(tmp_path / "bundle").manifest == Bundle.open(made["int4"]).manifest
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
