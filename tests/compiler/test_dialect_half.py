"""fp16 decoders for onnxruntime: rotary embeddings whole, queries, keys and values by one product, and the numbers as before."""
from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from test_dialect_onnxruntime import onnxruntime, reference, whole

from edgecomp import methods
from edgecomp.compress import Recipe, compress
from edgecomp.dialects import onnxruntime as dialect
from edgecomp.dialects.packed import pack_projections
from edgecomp.dialects.rotary import whole_rotary
from edgecomp.ir.graphs import load
from edgecomp_runtime import Bundle, Session

sys.path.insert(0, str(Path(__file__).parents[1] / "export"))
import tiny
import tiny_qwen

CLOSE = 1e-2  # of the largest logit: ONNX's evaluator rounds to fp16 wherever it can


@pytest.fixture(scope="module")
def half(compiled: Callable[..., tuple[Path, Path]]) -> Path:
    return compiled(tiny, "gqa-tied", precision="fp16")[1]


def test_a_layer_is_four_products_and_an_attention_that_turns_rows_itself(half: Path) -> None:
    lowered = load(half / "graphs/decoder.onnxruntime.onnx")
    kinds = [node.op_type for node in lowered.graph]
    layers = Bundle.open(half).manifest.decoder.layers
    assert not {"RotaryEmbedding", "Neg", "Slice"} & set(kinds) and kinds.count("GroupQueryAttention") == layers
    for attention in (node for node in lowered.graph if node.op_type == "GroupQueryAttention"):
        assert attention.attributes["do_rotary"].as_int() == 1 and attention.inputs[1:3] == (None, None)


@pytest.mark.parametrize(("maker", "variant"), [(tiny, "gqa-tied"), (tiny_qwen, "qwen2.5-ragged")])
def test_on_a_cpu_too_a_layers_attention_turns_rows_itself(compiled: Callable[..., tuple[Path, Path]], maker: Any, variant: str) -> None:
    """In fp32, with biases and Qwen's three axes of positions in the second."""
    lowered = load(compiled(maker, variant)[1] / "graphs/decoder.onnxruntime.onnx")
    kinds = Counter(node.op_type for node in lowered.graph)
    layers, biased = kinds["GroupQueryAttention"], maker is tiny_qwen
    assert not kinds["RotaryEmbedding"] and kinds["Split"] == layers and kinds["Add"] == layers * biased, "gate and up are split, biases one each"
    for attention in (node for node in lowered.graph if node.op_type == "GroupQueryAttention"):
        assert attention.attributes["do_rotary"].as_int() == 1 and attention.inputs[1:3] == (None, None)


def test_a_packed_weight_is_the_three_that_the_file_has(half: Path) -> None:
    neutral, lowered = (load(half / f"graphs/decoder{dialect}.onnx").graph.initializers for dialect in ("", ".onnxruntime"))
    stored = np.memmap(half / "graphs/weights.bin", np.float16, "r")

    def content(value: ir.Value) -> np.ndarray:
        tensor = value.const_value
        assert isinstance(tensor, ir.ExternalTensor) and tensor.offset is not None
        return stored[tensor.offset // 2:(tensor.offset + tensor.nbytes) // 2].reshape(tensor.shape.numpy())

    name = "model.language_model.layers.1.self_attn.{}_proj.weight"
    parts = [content(neutral[name.format(part)]) for part in "qkv"]
    assert len({part.tobytes() for part in parts}) == 3
    np.testing.assert_array_equal(content(lowered[name.format("q") + ".with_key_and_value"]), np.concatenate(parts))


@pytest.mark.parametrize(("rows", "length"), [(20, 0), (1, 17), (4, 9)])
def test_the_decoder_computes_what_it_did(half: Path, rows: int, length: int) -> None:
    """Against ONNX's own evaluator on the neutral graph; positions jump, as where tokens were pruned."""
    info, random = Bundle.open(half).manifest.decoder, np.random.default_rng(rows)
    state = {f"cache_{kind}.{layer}": random.normal(0, 1, (1, info.key_value_heads, 32, info.head_dim)).astype(np.float16)
             for layer in range(info.layers) for kind in ("key", "value")}
    feeds = {"embeddings": random.normal(0, 1, (1, rows, info.hidden)).astype(np.float16), "length": np.array([length]),
             "positions": np.sort(random.choice(90, (1, rows), replace=False)) + length, "logit_rows": np.array([0, rows - 1]), **state}
    before = reference(whole(half / "graphs/decoder.onnx"), feeds)
    after = onnxruntime(half / "graphs/decoder.onnxruntime.onnx", feeds)
    size = np.abs(before["logits"].astype(np.float32)).max()
    assert size > 1
    np.testing.assert_allclose(after["logits"].astype(np.float32), before["logits"].astype(np.float32), atol=CLOSE * size, rtol=0)
    moved = onnxruntime(half / "graphs/decoder.onnxruntime.onnx", {**feeds, "positions": feeds["positions"] * 2 + 1})
    assert np.abs(moved["logits"] - after["logits"]).max() > 5 * CLOSE * size, "positions matter"
    for layer in range(info.layers):
        cache = after[f"cache_key_out.{layer}"]
        np.testing.assert_array_equal(cache[:, :, :length], state[f"cache_key.{layer}"][:, :, :length])
    np.testing.assert_allclose(after["cache_key_out.0"][:, :, length:length + rows], before["new_key.0"], atol=8e-3, rtol=CLOSE)


def test_a_cut_decoder_answers_as_it_did(half: Path, tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are numbered anew behind a cut, and its method still reads the queries and keys that it asks for."""
    picture, found = sorted((scenes / "images").glob("*.jpg"))[0], []
    for name in ("plain", "packed"):
        if name == "plain":
            monkeypatch.setattr(dialect, "pack_projections", lambda model: None)
        names = compress(half, tmp_path / name, [Recipe.of(methods.make("fastv"), "3", "decoder:1")])
        monkeypatch.undo()
        session = Session(Bundle.open(tmp_path / name), plan=names[-1])
        found.append(session.score("what is written?", [picture], [5, 9, 7]).astype(np.float32))
    packed = load(tmp_path / "packed/graphs" / f"decoder.{names[-1]}.onnxruntime.onnx").graph
    assert [n.attributes.get_int("do_rotary", 0) for n in packed if n.op_type == "GroupQueryAttention"][-1] == 1
    np.testing.assert_allclose(found[1], found[0], atol=CLOSE * np.abs(found[0]).max(), rtol=0)


# by hand

ROTARY = """<ir_version: 10, opset_import: ["" : 23]>
    turn (float16[1,2,rows,4] x, float[1,rows,2] angles, float[1,rows,2] others) => (float16[1,2,rows,4] y)
    <int64[1] one = {1}, int64[1] zero = {0}, int64[1] two = {2}, int64[1] far = {9223372036854775807}, int64[1] axis = {3}> {
      twice = Concat <axis = -1> (angles, angles)
      cos32 = Cos (twice) cos16 = Cast <to = 10> (cos32) cos = Unsqueeze (cos16, one)
      sin32 = Sin (SINE) sin16 = Cast <to = 10> (sin32) sin = Unsqueeze (sin16, one)
      low = Slice (x, zero, two, axis, one) high = Slice (x, two, far, axis, one) negated = Neg (high)
      half = Concat <axis = -1> (HALVES) first = Mul (x, cos) second = Mul (half, sin) y = Add (SUM) }"""


def rotary(sine: str = "twice", halves: str = "negated, low", total: str = "first, second") -> tuple[ir.Model, int]:
    """The graph after the pass, which must compute the same, and how many RotaryEmbedding it has."""
    model = ir.from_onnx_text(ROTARY.replace("SINE", sine).replace("HALVES", halves).replace("SUM", total))
    for value in model.graph.all_nodes():
        for out in value.outputs:
            out.dtype = out.dtype or (ir.DataType.FLOAT if out.name in ("twice", "others_twice", "cos32", "sin32") else ir.DataType.FLOAT16)
    random = np.random.default_rng(0)
    feeds = {"x": random.normal(0, 1, (1, 2, 5, 4)).astype(np.float16), "angles": random.normal(0, 3, (1, 5, 2)).astype(np.float32),
             "others": random.normal(0, 3, (1, 5, 2)).astype(np.float32)}
    before = onnxruntime(ir.to_proto(model).SerializeToString(), feeds)["y"]
    whole_rotary(model)
    after = onnxruntime(ir.to_proto(model).SerializeToString(), feeds)["y"]
    np.testing.assert_allclose(after, before, atol=4e-3)
    assert np.abs(after - feeds["x"]).max() > 0.5
    return model, sum(node.op_type == "RotaryEmbedding" for node in model.graph)


@pytest.mark.parametrize("total", ["first, second", "second, first"])
def test_a_rotation_in_pieces_is_one_operator(total: str) -> None:
    model, count = rotary(total=total)
    assert count == 1 and model.graph.outputs[0].name == "y"


@pytest.mark.parametrize(("sine", "halves"), [("twice", "low, negated"), ("others_twice", "negated, low"), ("twice", "high, low"),
                                              ("twice", "negated, high")])
def test_what_only_looks_like_a_rotation_stays(sine: str, halves: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = ROTARY.replace("cos32 =", "others_twice = Concat <axis = -1> (others, others) cos32 =")
    monkeypatch.setattr(sys.modules[__name__], "ROTARY", text)
    assert rotary(sine, halves)[1] == 0


def projections(folder: Path, dtype: type, gap: int = 0, other_input: bool = False, biased: str = "") -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Three products over weights in a file, in front of attention: the graph before and after the pass."""
    random, width = np.random.default_rng(1), 16
    weights = [random.normal(0, 0.3, (rows, width)).astype(dtype) for rows in (32, 16, 16)]
    places, data = [], b""
    for weight in weights:
        data += b"\0" * (gap if data else 0)
        places.append(len(data))
        data += weight.tobytes()
    (folder / "w.bin").write_bytes(data)
    kind = ir.DataType.from_numpy(np.dtype(dtype))

    def value(name: str, of: ir.DataType, *shape: int | str) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(of), shape=ir.Shape(shape))

    x, z = (value(name, kind, "batch", "rows", width) for name in "xz")
    cos, sin = (value(name, kind, "batch", "rows", 8) for name in ("cos", "sin"))
    past = [value(f"cache_{name}.0", kind, "batch", 1, 12, 16) for name in ("key", "value")]
    last, total = value("last_row", ir.DataType.INT32, "batch"), value("total_rows", ir.DataType.INT32)
    stored = []
    for name, weight, at in zip("qkv", weights, places):
        found = value(name, kind, *weight.shape)
        found.const_value = ir.ExternalTensor("w.bin", at, weight.nbytes, kind, name=name, shape=ir.Shape(weight.shape), base_dir=folder)
        stored.append(found)
    read = [x, x, z if other_input else x]
    made: list[ir.Node] = [ir.node("FusedMatMul", [of, w], {"transB": 1}, domain="com.microsoft") for of, w in zip(read, stored)]
    given = [product.outputs[0] for product in made]
    for at, weight in enumerate(weights):
        if "qkv"[at] in biased:
            bias = ir.tensor(random.normal(0, 1, len(weight)).astype(dtype), name=f"{'qkv'[at]}.bias")
            stored.append(ir.Value(name=bias.name, type=ir.TensorType(kind), shape=bias.shape, const_value=bias))
            made.append(ir.node("Add", [given[at], stored[-1]]))
            given[at] = made[-1].outputs[0]
    turned = [ir.node("RotaryEmbedding", [value, cos, sin], {"num_heads": heads}) for value, heads in zip(given, (2, 1))]
    made += [*turned, ir.node("GroupQueryAttention", [*(node.outputs[0] for node in turned), given[2], *past, last, total],
                              {"num_heads": 2, "kv_num_heads": 1, "scale": 0.25}, domain="com.microsoft", num_outputs=3)]
    for node in made:
        node.outputs[0].type = ir.TensorType(kind)
    for name, out in zip(("y", "key_out", "value_out"), made[-1].outputs):
        out.name, out.type = name, ir.TensorType(kind)
    graph = ir.Graph([x, z, cos, sin, *past, last, total], made[-1].outputs, nodes=made, initializers=stored,
                     opset_imports={"": 23, "com.microsoft": 1})
    model = ir.Model(graph, ir_version=10)
    before = ir.to_proto(model)
    pack_projections(model)
    return before, ir.to_proto(model)


def run(model: onnx.ModelProto, folder: Path, dtype: type) -> list[np.ndarray]:
    onnx.save(model, folder / "m.onnx")
    random = np.random.default_rng(2)
    angles = random.normal(0, 3, (1, 6, 8))
    feeds = {"x": random.normal(0, 1, (1, 6, 16)), "z": random.normal(0, 1, (1, 6, 16)), "cos": np.cos(angles), "sin": np.sin(angles),
             **{f"cache_{kind}.0": random.normal(0, 1, (1, 1, 12, 16)) for kind in ("key", "value")}}
    given = {name: array.astype(dtype) for name, array in feeds.items()} | {
        "last_row": np.array([8], np.int32), "total_rows": np.array(9, np.int32), "row_numbers": np.arange(6)[None]}
    session = ort.InferenceSession(folder / "m.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: given[value.name] for value in session.get_inputs()})


@pytest.mark.parametrize("biased", ["", "qkv"])
def test_three_products_are_one(tmp_path: Path, biased: str) -> None:
    before, after = projections(tmp_path, np.float16, biased=biased)
    assert [n.op_type for n in before.graph.node].count("FusedMatMul") == 3
    assert [n.op_type for n in after.graph.node if n.domain] == ["FusedMatMul", "FusedMatMul", "FusedMatMul", "FusedMatMul", "GroupQueryAttention"]
    for old, new in zip(run(before, tmp_path, np.float16), run(after, tmp_path, np.float16)):
        assert np.abs(old).max() > 0.5
        np.testing.assert_allclose(new, old, atol=4e-3)


@pytest.mark.parametrize(("dtype", "gap", "other_input", "biased"), [
    (np.float32, 0, False, ""), (np.float16, 4, False, ""), (np.float16, 0, True, ""), (np.float16, 0, False, "qv")])
def test_products_that_are_not_alike_stay(tmp_path: Path, dtype: type, gap: int, other_input: bool, biased: str) -> None:
    before, after = projections(tmp_path, dtype, gap, other_input, biased)
    assert after == before


def test_a_head_hardly_larger_than_other_weights_is_one_product(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialect, "HEAD_PIECE", 1000)
    monkeypatch.setattr(dialect, "PAGE_ROWS", 64)
    products = []
    for larger in (4, 3):
        monkeypatch.setattr(dialect, "LARGER", larger)
        model = load(half / "graphs/decoder.onnx")
        dialect.lower(model)
        sizes = sorted(v.const_value.nbytes for v in model.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor))
        products.append(sum(node.op_type == "FusedMatMul" for node in model.graph))
        if larger == 4:
            assert 3 * sizes[-2] < sizes[-1] < 4 * sizes[-2], "the head, and queries, keys and values together"
    assert products[1] == products[0] + 6, "411 words as 6 parts of 64 and a rest"
