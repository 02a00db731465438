"""Small products of one input as one: the same numbers in onnxruntime, from the same weights, and only where it gains."""
from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edgecomp.dialects import joined
from edgecomp.dialects.joined import join_small_products
from edgecomp.dialects.quantized import quantized_products
from edgecomp.dialects.segments import MICROSOFT
from edgecomp.ir.rewrite import constant

WIDTH, BLOCK = 64, 32
SIZES = {"q": 48, "k": 16, "v": 24}
RANDOM = np.random.default_rng(0)
WEIGHTS = {name: RANDOM.standard_normal((rows, WIDTH)).astype(np.float32) for name, rows in SIZES.items()}
NUMBERS = {name: RANDOM.integers(-8, 8, (rows, WIDTH)).astype(np.int8) for name, rows in SIZES.items()}
SCALES = {name: RANDOM.random((rows, WIDTH // BLOCK)).astype(np.float32) for name, rows in SIZES.items()}
BIASES = {name: RANDOM.standard_normal(rows).astype(np.float32) for name, rows in SIZES.items()}
X, Z = (RANDOM.standard_normal((2, rows, WIDTH)).astype(np.float32) for rows in (3, 3))


def products(kind: str, inputs: dict[str, str], exposed: str = "", biased: str = "") -> ir.Model:
    """y_NAME = -(input @ W_NAME^T), in fp32 or from numbers of 4 or 8 bits; `exposed` is a result without the minus; `biased` ones have a bias."""
    names = ("x", "z")
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21, "{MICROSOFT}" : 1]> graph '
                              f'({", ".join(f"float[batch,rows,{WIDTH}] {name}" for name in names)}) => () {{}}')
    given = {value.name: value for value in model.graph.inputs}
    for name, rows in SIZES.items():
        if kind == "float32":
            weight = constant(model, f"w.{name}", WEIGHTS[name])
            product = ir.node("FusedMatMul", [given[inputs[name]], weight], {"transB": 1}, domain=MICROSOFT)
        else:
            numbers = ir.tensor(NUMBERS[name].astype(ir.DataType.INT4.numpy() if kind == "int4" else np.int8), name=f"w.{name}")
            weight = ir.Value(name=f"w.{name}", type=ir.TensorType(numbers.dtype), shape=numbers.shape, const_value=numbers)
            model.graph.register_initializer(weight)
            scaled = ir.node("DequantizeLinear", [weight, constant(model, f"w.{name}.scale", SCALES[name])], {"axis": 1, "block_size": BLOCK})
            turned = ir.node("Transpose", scaled.outputs, {"perm": [1, 0]})
            model.graph.extend([scaled, turned])
            product = ir.node("MatMul", [given[inputs[name]], turned.outputs[0]])
        model.graph.append(product)
        last = product
        if name in biased:
            last = ir.node("Add", [constant(model, f"b.{name}", BIASES[name]), product.outputs[0]])
            model.graph.append(last)
        minus = ir.node("Neg", last.outputs)
        model.graph.append(minus)
        result = product.outputs[0] if name == exposed else minus.outputs[0]
        result.name, result.type, result.shape = f"y_{name}", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "rows", rows])
        model.graph.outputs.append(result)
    quantized_products(model)
    return model


def run(model: ir.Model, folder: Path) -> tuple[dict[str, np.ndarray], list[tuple[str, int]]]:
    """The results, and the products that onnxruntime does, with how many outputs each has."""
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    ir.save(model, folder / "model.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    found = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"x": X, "z": Z})))
    graph = ir.load(folder / "optimized.onnx").graph
    done = [node for node in graph if node.op_type in ("FusedMatMul", "MatMulNBits", "MatMul", "Gemm")]
    assert all(value.is_initializer() for node in done for value in node.inputs[1:] if value is not None), "weights are laid together at load"
    return found, sorted((node.op_type, node.inputs[1].shape[0]) for node in done)


def expected(kind: str, inputs: dict[str, str], exposed: str = "") -> dict[str, np.ndarray]:
    found = {}
    for name in SIZES:
        weight = WEIGHTS[name] if kind == "float32" else np.stack(
            [[n * SCALES[name][row, at // BLOCK] for at, n in enumerate(numbers)] for row, numbers in enumerate(NUMBERS[name].tolist())])
        product = np.einsum("brw,ow->bro", {"x": X, "z": Z}[inputs[name]].astype(np.float64), weight)
        found[f"y_{name}"] = product if name == exposed else -product
    return found


@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
@pytest.mark.parametrize(("inputs", "exposed", "together"), [
    ("xxx", "", [88]), ("xzx", "", [16, 72]), ("xzz", "", [40, 48]), ("xxx", "k", [16, 72])])
def test_products_of_one_input_are_one(kind: str, inputs: str, exposed: str, together: list[int], tmp_path: Path) -> None:
    """A product that is itself a result stays, since results have names."""
    of = dict(zip(SIZES, inputs))
    model = products(kind, of, exposed)
    join_small_products(model)
    found, done = run(model, tmp_path)
    assert done == [("FusedMatMul" if kind == "float32" else "MatMulNBits", rows) for rows in together]
    for name, values in expected(kind, of, exposed).items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
@pytest.mark.parametrize(("biased", "additions"), [("qkv", [("Add", 1)]), ("qv", [("Add", 2)])])
def test_biases_are_added_together_where_all_have_one(kind: str, biased: str, additions: list[tuple[str, int]], tmp_path: Path) -> None:
    of = dict.fromkeys(SIZES, "x")
    model = products(kind, of, biased=biased)
    join_small_products(model)
    assert [*Counter(node.op_type for node in model.graph if node.op_type == "Add").items()] == additions
    found, done = run(model, tmp_path)
    assert done == [("FusedMatMul" if kind == "float32" else "MatMulNBits", 88)]
    for name, values in expected(kind, of).items():
        np.testing.assert_allclose(found[name], values - BIASES[name[-1]] * (name[-1] in biased), rtol=1e-4, atol=1e-4)


def test_one_number_for_a_whole_row_is_no_bias(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(BIASES, "k", np.ones(1, np.float32))
    of = dict.fromkeys(SIZES, "x")
    model = products("float32", of, biased="qkv")
    join_small_products(model)
    assert sum(node.op_type == "Add" for node in model.graph) == 3
    found, _ = run(model, tmp_path)
    for name, values in expected("float32", of).items():
        np.testing.assert_allclose(found[name], values - BIASES[name[-1]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
def test_large_weights_stay_by_themselves(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """k has 16 rows, v 24, q 48: with a limit at v's size, k and v are joined alone."""
    bits = {"float32": 32, "int8": 8, "int4": 4}[kind]
    monkeypatch.setattr(joined, "SMALL", SIZES["v"] * WIDTH * bits // 8)
    model = products(kind, dict.fromkeys(SIZES, "x"))
    join_small_products(model)
    split, = (node for node in model.graph if node.op_type == "Split")
    assert split.inputs[1].const_value.numpy().tolist() == [SIZES["k"], SIZES["v"]]
    live = [node for node in model.graph if node.op_type in ("FusedMatMul", "MatMulNBits")]
    assert len(live) == 2


def test_products_of_other_bits_or_forms_are_not_mixed() -> None:
    model = products("int8", dict.fromkeys(SIZES, "x"))
    for node, level in zip([n for n in model.graph if n.op_type == "MatMulNBits"], (4, 4, 0)):
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
    join_small_products(model)
    assert Counter(node.op_type for node in model.graph if node.op_type in ("MatMulNBits", "Split")) == {"MatMulNBits": 2, "Split": 1}
    scaled = products("float32", dict.fromkeys(SIZES, "x"))
    for node in list(scaled.graph):
        if node.op_type == "FusedMatMul":
            node.attributes["alpha"] = ir.AttrFloat32("alpha", 2.0)  # not a form that the dialect writes
    join_small_products(scaled)
    assert not [node for node in scaled.graph if node.op_type == "Split"]
