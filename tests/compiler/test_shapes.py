"""After shortening, the shapes that a graph states are those that onnxruntime finds when it runs it."""
from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edgecomp.ir.rewrite import DOMAIN, constant, dims
from edgecomp.passes.shapes import shorten
from edgecomp_runtime.errors import EdgecompError

OLD, NEW, WIDTH = 6, 4, 6  # as many columns as rows: whoever looks for a number finds both

# name -> (body reading x [images, 6, 6] and its sixth-by-sixth weight w, declared shape of y, where y's rows are after 6 became 4)
FOLLOWED = {
    "product": ("y = MatMul (x, w)", "[images,6,6]", {1: NEW}),
    "product from the right": ("y = MatMul (w, t) t = Transpose <perm=[0,2,1]> (x)", "[images,6,6]", {2: NEW}),
    "rows against rows": ("y = MatMul (x, t) t = Transpose <perm=[0,2,1]> (x)", "[images,6,6]", {1: NEW, 2: NEW}),
    "sum over rows": ("y = MatMul (t, x) t = Transpose <perm=[0,2,1]> (x)", "[images,6,6]", {}),
    "bias a column": ("y = Add (x, b) b = Gather (w, zero)", "[images,6,6]", {1: NEW}),
    "with itself": ("y = Mul (x, g) g = Sigmoid (x)", "[images,6,6]", {1: NEW}),
    "norm": ("y = LayerNormalization (x, b, b) b = Gather (w, zero)", "[images,6,6]", {1: NEW}),
    "heads": ("y = Transpose <perm=[0,2,1,3]> (h) h = Reshape (x, s) s = Constant <value_ints=[0,6,2,3]> ()", "[images,2,6,3]", {2: NEW}),
    "heads merged": ("y = Reshape (r, d) d = Constant <value_ints=[0,-1,6]> () r = Transpose <perm=[0,2,1,3]> (t) "
                     "t = Transpose <perm=[0,2,1,3]> (h) h = Reshape (x, s) s = Constant <value_ints=[0,6,3,2]> ()", "[images,6,6]", {1: NEW}),
    "columns split in six": ("y = Reshape (x, s) s = Constant <value_ints=[-1,6,6,1]> ()", "[images,6,6,1]", {1: NEW}),
    "shape with the batch read": ("y = Reshape (x, s) s = Concat <axis=0> (n, r) n = Shape <start=0,end=1> (x) r = Constant <value_ints=[6,3,2]> ()",
                                  "[images,6,3,2]", {1: NEW}),
    "first row dropped": ("y = Slice (x, one, many, one) one = Constant <value_ints=[1]> () many = Constant <value_ints=[9223372036854775807]> ()",
                          "[images,5,6]", {1: NEW - 1}),
    "columns sliced": ("y = Slice (x, one, five, two) one = Constant <value_ints=[1]> () five = Constant <value_ints=[5]> () "
                       "two = Constant <value_ints=[2]> ()", "[images,6,4]", {1: NEW}),
    "softmax": ("y = Softmax <axis=-1> (x)", "[images,6,6]", {1: NEW}),
    "another axis joined": ("y = Concat <axis=-1> (x, g) g = Tanh (x)", "[images,6,12]", {1: NEW}),
    "mean over columns": ("y = ReduceMean <keepdims=0> (x, two) two = Constant <value_ints=[2]> ()", "[images,6]", {1: NEW}),
    "one more axis": ("y = Unsqueeze (x, one) one = Constant <value_ints=[1]> ()", "[images,1,6,6]", {2: NEW}),
    "one axis less": ("y = Squeeze (u, one) u = Unsqueeze (x, one) one = Constant <value_ints=[1]> ()", "[images,6,6]", {1: NEW}),
    "expanded": ("y = Expand (u, s) u = Unsqueeze (x, one) one = Constant <value_ints=[1]> () s = Constant <value_ints=[1,2,6,1]> ()",
                 "[images,2,6,6]", {2: NEW}),
    "columns picked": ("y = Gather <axis=2> (x, zero)", "[images,6]", {1: NEW}),
    "halves of columns": ("y, z = Split <axis=2, num_outputs=2> (x)", "[images,6,3]", {1: NEW}),
}

REFUSED = {
    "rows joined with columns": ("y = Reshape (x, s) s = Constant <value_ints=[-1,36]> ()", "[images,36]", "Reshape.*axis 1, the rows"),
    "rows in blocks": ("y = Reshape (x, s) s = Constant <value_ints=[-1,3,12]> ()", "[images,3,12]", "Reshape.*axis 1, the rows"),
    "rows with the batch": ("y = Reshape (x, s) s = Constant <value_ints=[-1,6]> ()", "[rows,6]", "Reshape.*axis 1, the rows"),
    "old rows mixed in": ("y = Add (x, w)", "[images,6,6]", "Add.*'w' has 6 rows where 4 are left"),
    "old rows to sum over": ("y = MatMul (w, x)", "[images,6,6]", "MatMul.*'w' has 6 rows where 4 are left"),
    "last rows": ("y = Slice (x, minus, many, one) one = Constant <value_ints=[1]> () minus = Constant <value_ints=[-1]> () "
                  "many = Constant <value_ints=[9223372036854775807]> ()", "[images,1,6]", "Slice.*which rows those are has changed"),
    "certain rows": ("y = Gather <axis=1> (x, zero)", "[images,6]", "Gather.*picks rows"),
    "more rows": ("y = Concat <axis=1> (x, x)", "[images,12,6]", "Concat.*joins rows"),
    "mean over rows": ("y = ReduceMean <keepdims=0> (x, one) one = Constant <value_ints=[1]> ()", "[images,6]", "ReduceMean.*across rows"),
    "norm over rows": ("y = LayerNormalization <axis=1> (x, w, w)", "[images,6,6]", "LayerNormalization.*across rows"),
    "unknown": ("y = CumSum (x, zero)", "[images,6,6]", "CumSum.*not known"),
}


def graph(body: str, shape: str) -> ir.Model:
    """A graph in which x is made by an Identity, so that it is no input, with every shape stated by ONNX's inference."""
    import onnx
    lines = re.findall(r"\S[^=]*= \w+ (?:<[^>]*> )?\([^)]*\)", body)
    text = f"""<ir_version: 10, opset_import: ["" : 23]>
        g (float[images,{OLD},{WIDTH}] given, float[6,6] w) => (float{shape} y) <int64 zero = {{0}}> {{ x = Identity (given)
        {chr(10).join(reversed(lines))} }}"""
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), data_prop=True))


def shortened(body: str, shape: str) -> ir.Model:
    """The same with rows 0, 2, 3 and 5 of x only."""
    model = graph(body, shape)
    first = next(n for n in model.graph if n.op_type == "Identity")
    x = first.outputs[0]
    pick = ir.node("Gather", [first.inputs[0], constant(model, "rows", np.array([0, 2, 3, 5]))], {"axis": 1})
    model.graph.insert_before(first, pick)
    first.replace_input_with(0, pick.outputs[0])
    shorten(model, x, -2, NEW)
    return model


@pytest.mark.parametrize(("body", "shape", "rows"), FOLLOWED.values(), ids=FOLLOWED)
def test_shapes_follow_the_rows(body: str, shape: str, rows: dict[int, int]) -> None:
    model = shortened(body, shape)
    y = model.graph.outputs[0]
    assert y.shape is not None
    assert list(y.shape) == [rows.get(axis, size) for axis, size in enumerate(graph(body, shape).graph.outputs[0].shape or [])]
    model.graph.outputs[:] = [v for n in model.graph for v in n.outputs if v.name]
    given = np.random.default_rng(0).standard_normal((3, OLD, WIDTH)).astype(np.float32)
    ran = ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, {"given": given, "w": given[0]})
    for value, result in zip(model.graph.outputs, ran):
        stated = [3 if not isinstance(size, int) else size for size in value.shape or result.shape]
        assert stated == list(result.shape), value.name


@pytest.mark.parametrize(("body", "shape", "why"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_follow_is_refused_by_name(body: str, shape: str, why: str) -> None:
    with pytest.raises(EdgecompError, match=why):
        shortened(body, shape)


def attending(*shortened: str, bias: int | None = None) -> ir.Value:
    """Attention [B, 2, 6, 3] in which the named inputs come from a value that then has 4 rows, and keys have a bias of `bias` rows."""
    def value(name: str, *shape: int) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["images", *shape]))

    given = [value("x", 2, OLD, 3), value("other", 2, OLD, 3), *([value("bias", bias)] if bias else [])]
    made = ir.node("Identity", given[:1])
    made.outputs[0].shape = ir.Shape(dims(given[0]))
    inputs = [made.outputs[0] if name in shortened else given[1] for name in ("query", "key", "value")]
    attention = ir.node("Attention", [*inputs, *([None] * 4 + given[2:] if bias else [])], {"causal": 0}, domain=DOMAIN)
    attention.outputs[0].shape = ir.Shape(dims(given[0]))
    model = ir.Model(ir.Graph(given, attention.outputs, nodes=[made, attention], opset_imports={"": 23, DOMAIN: 1}), ir_version=10)
    shorten(model, made.outputs[0], 2, NEW)
    return attention.outputs[0]


def test_attention_has_the_rows_of_its_queries() -> None:
    assert dims(attending("query", "key", "value"))[2] == dims(attending("query"))[2] == dims(attending("query", "key", "value", bias=NEW))[2] == NEW
    assert dims(attending("key", "value"))[2] == OLD


def test_attention_with_old_values_or_an_old_bias_is_refused() -> None:
    with pytest.raises(EdgecompError, match=r"Attention.*'other' has 6 rows where 4 are left"):
        attending("query", "key")
    with pytest.raises(EdgecompError, match=r"Attention.*'bias' has 6 rows where 4 are left"):
        attending("query", "key", "value", bias=OLD)
