"""Lowering for onnxruntime changes no numbers: against ONNX's own reference evaluator, and by hand-built graphs.

The neutral graphs run in `onnx.reference`, with the two operators of the domain `edgecomp` written out here in numpy.
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from edgecomp import methods
from edgecomp.budget import Reduction, Tokens
from edgecomp.dialects import lowering
from edgecomp.dialects.onnxruntime import lower
from edgecomp.ir.graphs import load, save
from edgecomp.passes.decoder import in_decoder
from edgecomp.passes.signals import needs_prompt
from edgecomp.passes.splice import at_projector
from edgecomp_runtime import images
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.errors import EdgecompError, UnknownNameError

CLOSE = 1e-4  # absolute, fp32: two evaluators over a whole tower or decoder
HEADS, KV_HEADS, WIDTH = 4, 2, 8  # of the hand-built graphs


class Mark(OpRun):
    """An identity."""

    op_domain = "edgecomp"

    def _run(self, x: np.ndarray, **_: object) -> tuple[np.ndarray]:
        return (x,)


class Attention(OpRun):
    """Softmax attention of query [B, H, S, D] over cache[:length] ++ new rows; see `attention`."""

    op_domain = "edgecomp"

    def _run(self, query: np.ndarray, key: np.ndarray, value: np.ndarray, *past: np.ndarray, causal: int, scale: float, window: int = 0,
             softcap: float = 0.0, bounded: int = 1, **_: object) -> tuple[np.ndarray]:
        return (attention(query, key, value, *past, causal=causal, scale=scale, window=window, softcap=softcap, bounded=bounded),)


def attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, past_key: np.ndarray | None = None, past_value: np.ndarray | None = None,
              length: np.ndarray | None = None, segments: np.ndarray | None = None, *, causal: int, scale: float, window: int = 0,
              softcap: float = 0.0, bounded: int = 1) -> np.ndarray:
    """What an edgecomp::Attention node means, row by row in float64.

    causal: a row sees itself and what came before it. window: of that, the last so many rows, itself one of them; 0 is all.
    segments: [batch, rows], a row also sees those of its number, 0 being none; within the window too where that is `bounded`.
    softcap: scores are softcap * tanh(score / softcap); 0 is off.
    """
    if past_key is not None and past_value is not None and length is not None:
        key, value = (np.concatenate([past[:, :, :int(length[0])], new], 2) for past, new in ((past_key, key), (past_value, value)))
    groups, before = query.shape[1] // key.shape[1], key.shape[2] - query.shape[2]
    out = np.empty((*query.shape[:3], value.shape[3]))
    for batch, head, row in np.ndindex(query.shape[:3]):
        at, every = before + row, np.arange(key.shape[2])
        near = every > at - window if window else every >= 0
        seen = near & (every <= at) if causal else near
        if segments is not None and segments[batch, row]:
            same = np.concatenate([np.zeros(before, bool), segments[batch] == segments[batch, row]])
            seen = seen | same & near if bounded else seen | same
        scores = key[batch, head // groups, seen].astype(np.float64) @ query[batch, head, row] * scale
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[batch, head, row] = weights / weights.sum() @ value[batch, head // groups, seen]
    return out.astype(query.dtype)


def reference(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    evaluator = ReferenceEvaluator(model, new_ops=[Mark, Attention])
    return dict(zip(evaluator.output_names, evaluator.run(None, feeds)))


def whole(path: Path) -> onnx.ModelProto:
    """A graph with its weights in it. Read by hand: onnx refuses weight files that are hard links, as bundles share them."""
    model = onnx.load(path, load_external_data=False)
    stored = np.memmap(path.parent / "weights.bin", np.uint8, "r")
    for tensor in model.graph.initializer:
        if tensor.external_data:
            where = {e.key: int(e.value) for e in tensor.external_data if e.key in ("offset", "length")}
            tensor.raw_data = stored[where["offset"]:where["offset"] + where["length"]].tobytes()
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    return model


def onnxruntime(model: Path | bytes, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    if "length" in feeds:  # the dialect is told where the new rows end; and for one row, for how many at most its work is planned
        rows, capacity = feeds["embeddings"].shape[1], feeds["cache_key.0"].shape[2]
        end = int(feeds["length"][0]) + rows
        feeds = {**feeds, "last_row": np.array([end - 1], np.int32), "row_numbers": np.arange(rows)[None],
                 "total_rows": np.array(capacity if rows == 1 else end, np.int32)}
    taken = {value.name for value in session.get_inputs()}
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, {name: array for name, array in feeds.items() if name in taken})))


@pytest.fixture(scope="module")
def bundle(demo: Path) -> Bundle:
    return Bundle.open(demo)


# the demonstration model's graphs

@pytest.fixture(scope="module")
def neutral_decoder(bundle: Bundle) -> onnx.ModelProto:
    return whole(bundle.file("graphs/decoder.onnx"))


@pytest.mark.parametrize(("rows", "length"), [(20, 0), (1, 40), (5, 9)])
def test_the_decoder_computes_what_it_did(bundle: Bundle, neutral_decoder: onnx.ModelProto, rows: int, length: int) -> None:
    generator = np.random.default_rng(rows)
    info, capacity = bundle.manifest.decoder, 48
    state = {f"cache_{kind}.{layer}": generator.normal(0, 1, (1, info.key_value_heads, capacity, info.head_dim)).astype(np.float32)
             for layer in range(info.layers) for kind in ("key", "value")}  # what lies beyond `length` is noise, and must not matter
    positions = np.sort(generator.choice(600, (1, rows), replace=False)).astype(np.int64) + length  # with jumps, as where tokens were pruned
    embeddings = bundle.embeddings()[generator.integers(4, 400, (1, rows))].astype(np.float32)
    rest: dict[str, np.ndarray] = {"positions": positions, "length": np.array([length]), "logit_rows": np.array([0, rows - 1])}
    feeds = {"embeddings": embeddings, **rest, **state}
    before = reference(neutral_decoder, feeds)
    after = onnxruntime(bundle.file("graphs/decoder.onnxruntime.onnx"), feeds)
    assert before["logits"].shape == (1, 2, 411) and np.ptp(before["logits"]) > 5
    np.testing.assert_allclose(after["logits"], before["logits"], atol=CLOSE, rtol=0)
    for layer in range(info.layers):
        for kind in ("key", "value"):
            cache = after[f"cache_{kind}_out.{layer}"]
            assert cache.shape == state[f"cache_{kind}.{layer}"].shape
            np.testing.assert_array_equal(cache[:, :, :length], state[f"cache_{kind}.{layer}"][:, :, :length])
            np.testing.assert_allclose(cache[:, :, length:length + rows], before[f"new_{kind}.{layer}"], atol=CLOSE, rtol=0)


@pytest.fixture(scope="module")
def pixels(bundle: Bundle, scenes: Path) -> np.ndarray:
    return images.preprocess(images.load(scenes / "images/scene-05.jpg"), bundle.manifest.image).reshape(1, 3, 336, 336)


@pytest.mark.parametrize("name", ["cls", "pool"])
def test_the_vision_graph_and_a_method_compute_what_they_did(bundle: Bundle, tmp_path: Path, pixels: np.ndarray, name: str) -> None:
    (tmp_path / "weights.bin").hardlink_to(bundle.file("graphs/weights.bin"))
    model = load(bundle.file("graphs/vision.onnx"))
    at_projector(model, bundle.manifest.vision, Reduction.of(methods.make(name), Tokens.of(bundle.manifest), 64), expose=True)
    save(model, tmp_path / "neutral.onnx")
    lower(model)
    save(model, tmp_path / "lowered.onnx")
    before = reference(whole(tmp_path / "neutral.onnx"), {"pixels": pixels})
    after = onnxruntime(tmp_path / "lowered.onnx", {"pixels": pixels})
    assert list(before) == list(after)
    assert before["features"].shape == (1, 576, 320) and before["visual_tokens"].shape == (1, 64, 320)
    for output, expected in before.items():
        np.testing.assert_allclose(after[output], expected, atol=1e-6 if output == "cls_attention" else CLOSE, rtol=0)


IN_DECODER = [(name, kind) for name in methods.METHODS for kind, signals in methods.method_type(name).taxonomy.sites.items()
              if kind == "decoder" or needs_prompt(signals)]


@pytest.mark.parametrize(("name", "kind"), IN_DECODER)
def test_choosing_costs_nothing_where_there_is_no_picture(bundle: Bundle, name: str, kind: str) -> None:
    """All nodes of a method at decoder:2, or at the decoder's entrance, are in the branch that runs with pictures."""
    method, layer = methods.make(name), 2 if kind == "decoder" else 0
    model = load(bundle.file("graphs/decoder.onnx"))
    in_decoder(model, bundle.manifest.decoder, layer, Reduction.of(method, Tokens.of(bundle.manifest), 64, kind))
    lower(model)
    branch = next(node for node in model.graph if node.op_type == "If").attributes["then_branch"].as_graph()
    chosen = {"TopK", "GatherND", "GatherElements", "ScatterElements", "Softmax"}
    assert not chosen & {node.op_type for node in model.graph}
    assert chosen & {node.op_type for node in branch} or name == "pool"


def lowered_graphs(bundle: Bundle) -> list[str]:
    return sorted({file for plan in bundle.manifest.plans.values() for file in plan.variants["onnxruntime"].values()})


def test_nothing_of_our_own_domains_is_left(bundle: Bundle) -> None:
    for file in lowered_graphs(bundle):
        model = onnx.load(bundle.file(file), load_external_data=False)
        assert {node.domain for node in model.graph.node} == {"", "com.microsoft"}
        assert not model.functions
        assert {o.domain for o in model.opset_import} == {"", "com.microsoft"}


def test_nodes_stand_in_order(bundle: Bundle) -> None:
    for file in lowered_graphs(bundle):
        graph = onnx.load(bundle.file(file), load_external_data=False).graph
        known = {"", *(i.name for i in graph.input), *(t.name for t in graph.initializer)}
        for node in graph.node:
            assert set(node.input) <= known
            known |= set(node.output)


def test_attention_is_fused_and_weights_are_used_as_they_are_stored(bundle: Bundle) -> None:
    for part, attentions in (("vision", {"MultiHeadAttention": 8}), ("decoder", {"GroupQueryAttention": 8})):
        model = onnx.load(bundle.file(f"graphs/{part}.onnxruntime.onnx"), load_external_data=False)
        kinds = [node.op_type for node in model.graph.node]
        assert {kind: kinds.count(kind) for kind in set(kinds) if kind.endswith("Attention")} == attentions
        stored = {t.name for t in model.graph.initializer}
        assert not [n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in stored]
        assert not [n for n in model.graph.node if n.op_type == "Transpose" and n.input[0] in stored]


def test_weights_keep_their_names_and_are_the_checkpoints_numbers(bundle: Bundle, checkpoint: Path) -> None:
    import torch
    from transformers import AutoModelForImageTextToText
    weights = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).state_dict()
    stored = np.memmap(bundle.file("graphs/weights.bin"), np.uint8, "r")
    for file, products in (("graphs/vision.onnxruntime.onnx", 50), ("graphs/decoder.onnxruntime.onnx", 57)):
        lowered, neutral = (external(bundle.file(f)) for f in (file, file.replace(".onnxruntime", "")))
        model = onnx.load(bundle.file(file), load_external_data=False)
        side_by_side = {n.output[0]: n.input for n in model.graph.node if n.op_type == "Concat"}
        used = [name for n in model.graph.node if n.op_type == "FusedMatMul" for name in side_by_side.get(n.input[1], [n.input[1]])]
        assert len(used) == products
        for name in used:
            assert lowered[name] == neutral[name]
            offset, length = lowered[name]
            np.testing.assert_array_equal(stored[offset:offset + length].view(np.float32).reshape(weights[name].shape), weights[name].numpy())
        assert set(lowered) <= set(neutral)


def external(graph: Path) -> dict[str, tuple[int, int]]:
    """A graph's external tensors: name -> offset and length in weights.bin."""
    found = {}
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        if tensor.external_data:
            where = {e.key: e.value for e in tensor.external_data}
            assert where["location"] == "weights.bin"
            found[tensor.name] = int(where["offset"]), int(where["length"])
    return found


def test_an_unknown_dialect_is_one_clear_line() -> None:
    with pytest.raises(UnknownNameError, match="onnxruntime"):
        lowering("onnxrunntime")


# hand-built graphs: what the patterns do not cover has to come out right too

class Sketch:
    """A neutral graph built node by node; `check` runs it before and after lowering."""

    def __init__(self) -> None:
        self.feeds: dict[str, np.ndarray] = {}
        self.inputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []
        self._random = np.random.default_rng(0)

    def input(self, name: str, *shape: int | str, array: np.ndarray | None = None) -> ir.Value:
        """An input; a dimension given as 'name=3' is symbolic and 3 in the run."""
        sizes = [int(d.split("=")[1]) if isinstance(d, str) else d for d in shape]
        self.feeds[name] = self._random.normal(0, 1, sizes).astype(np.float32) if array is None else array
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(self.feeds[name].dtype)),
                         shape=ir.Shape([d.split("=")[0] if isinstance(d, str) else d for d in shape]))
        self.inputs.append(value)
        return value

    def weight(self, name: str, *shape: int, array: np.ndarray | None = None) -> ir.Value:
        array = self._random.normal(0, 1, shape).astype(np.float32) if array is None else array
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.constants.append(value)
        return value

    def add(self, op_type: str, *inputs: ir.Value, shape: tuple[int | str, ...], domain: str = "", **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, domain=domain)
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        self.nodes.append(node)
        return node.outputs[0]

    def attention(self, *inputs: ir.Value, causal: bool, window: int = 0, softcap: float = 0.0) -> ir.Value:
        assert inputs[0].shape is not None
        return self.add("Attention", *inputs, shape=inputs[0].shape.dims, domain="edgecomp", causal=int(causal), layer=0,  # type: ignore[arg-type]
                        scale=0.3, window=window, softcap=softcap)

    def check(self, **outputs: ir.Value) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[str]]:
        """Runs it in ONNX's evaluator, lowers it, runs it in onnxruntime; results of the same name must agree.

        Returns:
            The results before and after, and the operators of the lowered graph.
        """
        for name, value in outputs.items():
            value.name = name.replace("__", ".")
        graph = ir.Graph(self.inputs, list(outputs.values()), nodes=self.nodes, initializers=self.constants,
                         opset_imports={"": 23, "edgecomp": 1}, name="sketch")
        model = ir.Model(graph, ir_version=10)
        before = reference(ir.to_proto(model), self.feeds)
        lower(model)
        proto = ir.to_proto(model)
        assert "edgecomp" not in {n.domain for n in proto.graph.node}
        onnx.checker.check_model(proto)  # nodes in order, too
        after = onnxruntime(proto.SerializeToString(), self.feeds)
        for name in set(before) & set(after):
            assert np.abs(before[name]).max() > 1e-2
            np.testing.assert_allclose(after[name], before[name], atol=1e-5, rtol=1e-5)
        assert set(before) & set(after)
        return before, after, [n.op_type for n in proto.graph.node]


ROWS = "rows=5"


def merged(sketch: Sketch, heads: ir.Value, hidden: int = HEADS * WIDTH) -> ir.Value:
    """[B, H, S, D] -> [B, S, H*D], as HF models do behind attention."""
    rows = sketch.add("Transpose", heads, shape=("batch", "rows", hidden // WIDTH, WIDTH), perm=[0, 2, 1, 3])
    shape = sketch.weight("merged_shape", array=np.array([0, 0, hidden], np.int64))
    return sketch.add("Reshape", rows, shape, shape=("batch", "rows", hidden))


def test_encoder_attention_on_heads_that_no_transpose_made() -> None:
    sketch = Sketch()
    heads = [sketch.input(name, "batch=2", HEADS, ROWS, WIDTH) for name in ("query", "key", "value")]
    sketch.check(y=merged(sketch, sketch.attention(*heads, causal=False)))


def test_encoder_attention_whose_heads_are_not_merged_behind_it() -> None:
    sketch = Sketch()
    heads = [sketch.input(name, "batch=2", HEADS, ROWS, WIDTH) for name in ("query", "key", "value")]
    gate = sketch.input("gate", "batch=2", HEADS, ROWS, WIDTH)
    sketch.check(y=sketch.add("Mul", sketch.attention(*heads, causal=False), gate, shape=("batch", HEADS, "rows", WIDTH)))


def test_encoder_attention_that_is_the_result_itself() -> None:
    sketch = Sketch()
    heads = [sketch.input(name, "batch=2", HEADS, ROWS, WIDTH) for name in ("query", "key", "value")]
    sketch.check(y=sketch.attention(*heads, causal=False))


def test_encoder_attention_merged_once_and_read_as_it_is_once() -> None:
    sketch = Sketch()
    heads = [sketch.input(name, "batch=2", HEADS, ROWS, WIDTH) for name in ("query", "key", "value")]
    out = sketch.attention(*heads, causal=False)
    sketch.check(y=merged(sketch, out), z=sketch.add("Neg", out, shape=("batch", HEADS, "rows", WIDTH)))


def test_encoder_attention_behind_another_transpose_than_the_head_split() -> None:
    sketch = Sketch()
    query, key = (sketch.input(name, "batch=2", HEADS, ROWS, WIDTH) for name in ("query", "key"))
    wide = sketch.input("value", "batch=2", HEADS, WIDTH, ROWS)
    value = sketch.add("Transpose", wide, shape=("batch", HEADS, "rows", WIDTH), perm=[0, 1, 3, 2])
    normed = sketch.add("RMSNormalization", query, sketch.weight("norm", WIDTH), shape=("batch", HEADS, "rows", WIDTH), axis=-1, epsilon=1e-6)
    sketch.check(y=merged(sketch, sketch.attention(normed, key, value, causal=False)))


def decoder_inputs(sketch: Sketch, rows: int, length: int) -> tuple[tuple[str, int, str, int], list[ir.Value]]:
    """The new rows' shape, and past key, past value and length."""
    sketch.input("embeddings", "batch=1", f"rows={rows}", HEADS * WIDTH)
    past = [sketch.input(f"cache_{kind}.0", "batch=1", KV_HEADS, "capacity=12", WIDTH) for kind in ("key", "value")]
    return ("batch=1", KV_HEADS, f"rows={rows}", WIDTH), [*past, sketch.input("length", 1, array=np.array([length]))]


def check_caches(before: dict[str, np.ndarray], after: dict[str, np.ndarray], sketch: Sketch, rows: int, length: int) -> None:
    for kind in ("key", "value"):
        cache = after[f"cache_{kind}_out.0"]
        np.testing.assert_array_equal(cache[:, :, :length], sketch.feeds[f"cache_{kind}.0"][:, :, :length])
        np.testing.assert_allclose(cache[:, :, length:length + rows], before[f"new_{kind}.0"], atol=1e-6)


STEPS = pytest.mark.parametrize(("rows", "length"), [(7, 0), (1, 11), (3, 5)])


@STEPS
def test_decoder_attention_on_heads_that_no_transpose_made(rows: int, length: int) -> None:
    sketch = Sketch()
    shape, past = decoder_inputs(sketch, rows, length)
    query = sketch.input("query", shape[0], HEADS, shape[2], WIDTH)
    key, value = (sketch.add("Neg", sketch.input(name, *shape), shape=("batch", KV_HEADS, "rows", WIDTH)) for name in ("key", "value"))
    y = merged(sketch, sketch.attention(query, key, value, *past, causal=True))
    before, after, kinds = sketch.check(y=y, new_key__0=key, new_value__0=value)
    check_caches(before, after, sketch, rows, length)
    assert "GroupQueryAttention" in kinds


@STEPS
@pytest.mark.parametrize("rotated", [WIDTH, WIDTH // 2])
def test_decoder_attention_behind_rotary_embeddings_of_all_or_half_the_width(rows: int, length: int, rotated: int) -> None:
    sketch = Sketch()
    shape, past = decoder_inputs(sketch, rows, length)
    angles = sketch.input("angles", "batch=1", shape[2], rotated // 2)
    tables = [sketch.add(kind, angles, shape=("batch", "rows", rotated // 2)) for kind in ("Cos", "Sin")]

    def heads(name: str, count: int) -> ir.Value:
        flat = sketch.input(name, "batch=1", shape[2], count * WIDTH)
        sizes = sketch.weight(f"{name}_shape", array=np.array([0, 0, count, WIDTH], np.int64))
        split = sketch.add("Reshape", flat, sizes, shape=("batch", "rows", count, WIDTH))
        return sketch.add("Transpose", split, shape=("batch", count, "rows", WIDTH), perm=[0, 2, 1, 3])

    attributes: dict[str, Any] = {"rotary_embedding_dim": rotated} if rotated < WIDTH else {}
    query, key = (sketch.add("RotaryEmbedding", heads(name, count), *tables, shape=("batch", count, "rows", WIDTH), **attributes)
                  for name, count in (("query", HEADS), ("key", KV_HEADS)))
    value = heads("value", KV_HEADS)
    y = merged(sketch, sketch.attention(query, key, value, *past, causal=True))
    before, after, kinds = sketch.check(y=y, new_key__0=key, new_value__0=value)
    check_caches(before, after, sketch, rows, length)
    assert kinds.count("Transpose") == 0  # seen through


@STEPS
@pytest.mark.parametrize(("window", "softcap"), [(4, 0.0), (1, 0.0), (100, 0.0), (0, 1.5), (4, 0.5)])
def test_decoder_attention_with_a_window_and_soft_caps(rows: int, length: int, window: int, softcap: float) -> None:
    sketch = Sketch()
    shape, past = decoder_inputs(sketch, rows, length)
    query = sketch.input("query", shape[0], HEADS, shape[2], WIDTH)
    key, value = (sketch.add("Neg", sketch.input(name, *shape), shape=("batch", KV_HEADS, "rows", WIDTH)) for name in ("key", "value"))
    y = merged(sketch, sketch.attention(query, key, value, *past, causal=True, window=window, softcap=softcap))
    before, after, _ = sketch.check(y=y, new_key__0=key, new_value__0=value)
    check_caches(before, after, sketch, rows, length)


@pytest.mark.parametrize("meaning", [{"window": 2}, {"softcap": 1.0}])
def test_encoder_attention_that_onnxruntime_has_no_operator_for_is_refused(meaning: dict[str, Any]) -> None:
    sketch = Sketch()
    heads = [sketch.input(name, "batch=2", HEADS, ROWS, WIDTH) for name in ("query", "key", "value")]
    y = merged(sketch, sketch.attention(*heads, causal=False, **meaning))
    with pytest.raises(EdgecompError, match="no window and no softcap, and encoder layer 0 has one"):
        sketch.check(y=y)


def test_marks_are_gone_wherever_they_stand() -> None:
    sketch = Sketch()
    x = sketch.input("x", "batch=2", 4)
    marked = sketch.add("Mark", x, shape=("batch", 4), domain="edgecomp", signal="hidden", layer=0)
    again = sketch.add("Mark", marked, shape=("batch", 4), domain="edgecomp", signal="hidden", layer=1)
    y = sketch.add("Neg", again, shape=("batch", 4))
    _, _, kinds = sketch.check(y=sketch.add("Mark", y, shape=("batch", 4), domain="edgecomp", signal="visual_tokens", layer=-1))
    assert kinds == ["Neg"]


X = ("batch", "rows", 6)


def relu_gate(sketch: Sketch, x: ir.Value) -> ir.Value:
    """y * sigmoid(x): the gate is on another value."""
    return sketch.add("Mul", sketch.add("Relu", x, shape=X), sketch.add("Sigmoid", x, shape=X), shape=X)


def silu(sketch: Sketch, x: ir.Value) -> ir.Value:
    return sketch.add("Mul", sketch.add("Sigmoid", x, shape=X), x, shape=X)


def quick_gelu(sketch: Sketch, x: ir.Value) -> ir.Value:
    scaled = sketch.add("Mul", x, sketch.weight("alpha", array=np.array(1.702, np.float32)), shape=X)
    return sketch.add("Mul", x, sketch.add("Sigmoid", scaled, shape=X), shape=X)


def alpha_first(sketch: Sketch, x: ir.Value) -> ir.Value:
    scaled = sketch.add("Mul", sketch.weight("alpha", array=np.array(1.702, np.float32)), x, shape=X)
    return sketch.add("Mul", x, sketch.add("Sigmoid", scaled, shape=X), shape=X)


def alpha_a_channel(sketch: Sketch, x: ir.Value) -> ir.Value:
    scaled = sketch.add("Mul", x, sketch.weight("alpha", 6), shape=X)
    return sketch.add("Mul", x, sketch.add("Sigmoid", scaled, shape=X), shape=X)


def gated_scale(sketch: Sketch, x: ir.Value) -> ir.Value:
    """(2x) * sigmoid(2x)"""
    scaled = sketch.add("Mul", x, sketch.weight("two", array=np.array(2, np.float32)), shape=X)
    return sketch.add("Mul", scaled, sketch.add("Sigmoid", scaled, shape=X), shape=X)


def gate_used_twice(sketch: Sketch, x: ir.Value) -> ir.Value:
    gate = sketch.add("Sigmoid", x, shape=X)
    return sketch.add("Add", sketch.add("Mul", x, gate, shape=X), gate, shape=X)


@pytest.mark.parametrize(("build", "fused"), [(silu, True), (quick_gelu, True), (gated_scale, True), (relu_gate, False), (alpha_first, None),
                                              (alpha_a_channel, False), (gate_used_twice, False)])
def test_gates_keep_their_numbers(build: Callable[[Sketch, ir.Value], ir.Value], fused: bool | None) -> None:
    sketch = Sketch()
    _, _, kinds = sketch.check(y=build(sketch, sketch.input("x", "batch=2", ROWS, 6)))
    assert fused is None or ("QuickGelu" in kinds) == fused


@pytest.mark.parametrize(("case", "fused"), [
    ("residual", True), ("sum is a result", True), ("sum is read first", True), ("defaults", True),
    ("made scale", False), ("bias", False), ("one row for all", False), ("made row for all", False), ("two axes", False)])
def test_norms_behind_additions_keep_their_numbers(case: str, fused: bool) -> None:
    sketch = Sketch()
    x = sketch.input("x", "batch=2", ROWS, 6)
    other = {"bias": lambda: sketch.weight("bias", 6), "one row for all": lambda: sketch.input("row", 6),
             "made row for all": lambda: sketch.add("Neg", sketch.input("row", "batch=2", 1, 6), shape=("batch", 1, 6))
             }.get(case, lambda: sketch.input("z", "batch=2", ROWS, 6))()
    total = sketch.add("Add", x, other, shape=X)
    if case == "sum is read first":
        first = sketch.add("Neg", total, shape=X)
    if case == "two axes":
        y = sketch.add("RMSNormalization", total, sketch.weight("norm", 5, 6), shape=X, axis=1, epsilon=1e-5)
    elif case == "made scale":
        y = sketch.add("RMSNormalization", total, sketch.add("Neg", sketch.input("norm", 6), shape=(6,)), shape=X, axis=-1, epsilon=1e-5)
    elif case == "defaults":
        y = sketch.add("RMSNormalization", total, sketch.weight("norm", 6), shape=X)
    else:
        y = sketch.add("RMSNormalization", total, sketch.weight("norm", 6), shape=X, axis=-1, epsilon=0.1)
    other = {"sum is a result": lambda: total, "sum is read first": lambda: first}.get(case, lambda: sketch.add("Neg", total, shape=X))()
    _, _, kinds = sketch.check(y=y, other=other)
    assert ("SkipSimplifiedLayerNormalization" in kinds) == fused


@pytest.mark.parametrize("case", ["weight", "made", "three axes", "on the left", "not transposed"])
def test_products_keep_their_numbers(case: str) -> None:
    sketch = Sketch()
    x = sketch.input("x", "batch=2", ROWS, 6)
    if case == "three axes":
        w = sketch.weight("w", 2, 3, 6)
        y = sketch.add("MatMul", x, sketch.add("Transpose", w, shape=(2, 6, 3), perm=[0, 2, 1]), shape=("batch", "rows", 3))
    elif case == "on the left":
        w = sketch.weight("w", 5, 4)
        y = sketch.add("MatMul", sketch.add("Transpose", w, shape=(4, 5), perm=[1, 0]), x, shape=("batch", 4, 6))
    elif case == "not transposed":
        y = sketch.add("MatMul", x, sketch.weight("w", 6, 3), shape=("batch", "rows", 3))
    else:
        w = sketch.weight("w", 3, 6) if case == "weight" else sketch.add("Neg", sketch.input("w", 3, 6), shape=(3, 6))
        y = sketch.add("MatMul", x, sketch.add("Transpose", w, shape=(6, 3), perm=[1, 0]), shape=("batch", "rows", 3))
    _, _, kinds = sketch.check(y=y)
    assert ("FusedMatMul" in kinds) == (case == "weight")


# rows that see each other both ways

def segmented(segments: list[int], length: int, *, window: int = 0, bounded: int = 1,
              softcap: float = 0.0) -> tuple[list[str], np.ndarray]:
    """Checks one decoder attention with these segments; the lowered graph's operators, and its result."""
    sketch, rows = Sketch(), len(segments)
    (batch, _, count, width), past = decoder_inputs(sketch, rows, length)
    number = sketch.input("segments", "batch=1", count, array=np.array([segments]))
    query = sketch.input("query", batch, HEADS, count, width)
    key, value = (sketch.add("Neg", sketch.input(name, batch, KV_HEADS, count, width), shape=("batch", KV_HEADS, "rows", width))
                  for name in ("key", "value"))
    out = sketch.attention(query, key, value, *past, number, causal=True, window=window, softcap=softcap)
    node = out.producer()
    assert node is not None
    node.attributes.add(ir.AttrInt64("bounded", bounded))
    before, after, kinds = sketch.check(y=merged(sketch, out), new_key__0=key, new_value__0=value)
    check_caches(before, after, sketch, rows, length)
    return kinds, after["y"]


@pytest.mark.parametrize(("segments", "length"), [
    ([1] * 7, 0), ([0, 1, 1, 1, 1, 0, 2, 2, 2], 0), ([3, 3, 3, 0, 4], 6), ([0, 0, 0], 5), ([0], 11), ([2], 4), ([1, 2, 2, 3], 8)])
@pytest.mark.parametrize(("window", "bounded", "softcap"), [(0, 1, 0.0), (2, 1, 0.0), (2, 0, 0.0), (0, 0, 1.5), (3, 0, 0.5), (100, 1, 0.0)])
def test_decoder_attention_whose_segments_see_each_other_both_ways(segments: list[int], length: int, window: int, bounded: int,
                                                                   softcap: float) -> None:
    kinds, _ = segmented(segments, length, window=window, bounded=bounded, softcap=softcap)
    assert kinds.count("GroupQueryAttention") == 1 and kinds.count("If") == 2


def test_a_window_bounds_segments_or_does_not() -> None:
    causal, bounded, free = (segmented(segments, 3, window=2, bounded=bounded)[1][0]
                             for segments, bounded in (([0] * 5, 1), ([1] * 5, 1), ([1] * 5, 0)))
    changed = [~np.isclose(a, b, atol=1e-4).all(-1) for a, b in ((causal, bounded), (bounded, free))]
    assert changed[0].tolist() == [True] * 4 + [False], "the last row has no later one to see"
    assert changed[1].tolist() == [False, False, True, True, True], "the first two have no row of theirs beyond the window"
