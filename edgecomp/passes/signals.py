"""The signals that methods ask for, computed beside the graph they are read from, which stays as it was."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgecomp.budget import Tokens, places_of
from edgecomp.ir.fork import Fork
from edgecomp.ir.rewrite import DOMAIN, dims, inputs, marks, nodes
from edgecomp.passes.apply import Signal
from edgecomp.passes.tape import Tape
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import VisionInfo

FLOAT = ir.DataType.FLOAT
MIDDLE = (3, 8)  # of the tower's layers: the ninth of CLIP's 24, where HiPrune's authors see objects


def attention_of(model: ir.Model, layer: int) -> ir.Node:
    """The Attention node of a layer."""
    return next(n for n in nodes(model, "Attention", DOMAIN) if n.attributes["layer"].as_int() == layer)


# the vision graph

def vision_signals(model: ir.Model, vision: VisionInfo, names: Sequence[str], layer: int, tokens: Tokens) -> list[Signal]:
    """Signals of a layer of the vision tower, each with a row a visual token.

    Raises:
        EdgecompError: the tower has no CLS token, or not one row a visual token.
    """
    return [_vision_signal(model, vision, name, layer, tokens) for name in names]


def _vision_signal(model: ir.Model, vision: VisionInfo, name: str, layer: int, tokens: Tokens) -> Signal:
    kind, _, which = name.partition(":")
    assert kind in VISION, f"no signal of the vision graph is named {kind}"
    if which:
        layer = vision.select_layer * MIDDLE[0] // MIDDLE[1] if which == "middle" else int(which)
        if not 0 <= layer <= vision.select_layer:
            raise EdgecompError(f"the vision tower has layers 0 to {vision.select_layer}; there is no attention of layer {layer}")
    if kind == "cls_attention" and not vision.has_cls:
        raise EdgecompError("this vision tower has no CLS token, so there is no CLS attention to rank tokens by; use another method")
    query, key = inputs(attention_of(model, layer))[:2]
    scale, cls = attention_of(model, layer).attributes["scale"].as_float(), int(vision.has_cls)
    pixels = next(v for v in model.graph.inputs if v.name == "pixels")
    seen = dims(pixels)[1] if len(dims(pixels)) == 5 else 1
    if seen != len(tokens.tiles) or any(dims(key)[2] != cls + tile.tokens for tile in tokens.tiles):
        raise EdgecompError(f"layer {layer} of this vision tower has {dims(key)[2]} rows for a tile and not one for each of its visual tokens, so "
                            "its attention cannot rank them; use another method")
    tape = Tape(model)

    def patches(value: ir.Value, axis: int) -> ir.Value:  # without the CLS row
        return tape.add("Slice", value, tape.ints([1]), tape.ints([2**31 - 1]), tape.ints([axis])) if cls else value

    def of_picture(value: ir.Value, *tail: object) -> Signal:  # [images * tiles, n, ..] -> [images, N, ..]
        if len(tokens.tiles) > 1:
            at = np.zeros(tokens.count, np.int64)  # separators get a value that nobody reads
            for number, tile in enumerate(tokens.tiles):
                at[places_of(tile)] = number * tile.tokens + np.arange(tile.tokens)
            every = tape.add("Reshape", value, tape.ints([-1, sum(tile.tokens for tile in tokens.tiles), *tail]))
            value = tape.add("Gather", every, tape.ints(at), axis=1)
        value.type, value.shape = ir.TensorType(FLOAT), ir.Shape([dims(pixels)[0], tokens.count, *tail])  # type: ignore[list-item]
        return Signal(value)

    if kind == "keys":
        mean = tape.add("ReduceMean", tape.add("Cast", key, to=FLOAT), tape.ints([1]), keepdims=0)
        return of_picture(patches(mean, 1), dims(key)[3])
    if kind == "cls_attention":
        query = tape.add("Slice", query, tape.ints([0]), tape.ints([1]), tape.ints([2]))  # [B, H, 1, D]
    query, keys = (tape.add("Cast", value, to=FLOAT) for value in (query, tape.add("Transpose", key, perm=[0, 1, 3, 2])))
    weights = tape.add("Softmax", tape.add("Mul", tape.add("MatMul", query, keys), tape.number(scale)), axis=-1)  # [B, H, rows, cls + N]
    return of_picture(patches(tape.add("ReduceMean", weights, tape.ints([1, 2]), keepdims=0), 1))


# the decoder

@dataclass(frozen=True)
class Prefill:
    """What a cut before a decoder layer can read. `hidden` [B, S, D] is the state there; `rows` [I, N] are the visual ones of it,
    `text` [T] the prompt's behind its last picture; `per_row` are the graph's inputs with one entry a row, by name; `causal`: text rows
    do not see those behind them."""
    model: ir.Model
    layer: int
    hidden: ir.Value
    rows: ir.Value
    text: ir.Value | None
    per_row: dict[str, ir.Value]
    causal: bool = True

    def visual(self, value: ir.Value) -> ir.Value:
        """The visual rows of a value as pictures: [B, S, d] -> [B * I, N, d]; [B, S] -> [B * I, N]."""
        tape = Tape(self.model)
        picked = tape.add("Gather", value, self.rows, axis=1)
        shape = [dims(self.rows)[1], *dims(value)[2:]]
        found = tape.add("Reshape", picked, tape.ints([-1, *shape]))
        found.type, found.shape = value.type, ir.Shape([None, *shape])
        return found

    def of_text(self, value: ir.Value) -> ir.Value:
        """The text rows of a value, once for each picture: [B, S, d] -> [B * I, T, d]."""
        assert self.text is not None
        tape, width = Tape(self.model), dims(value)[2]
        images = tape.add("Concat", tape.ints([1]), tape.add("Shape", self.rows, start=0, end=1), tape.ints([1, 1]), axis=0)
        every = tape.add("Expand", tape.add("Unsqueeze", tape.add("Gather", value, self.text, axis=1), tape.ints([1])), images)
        shape = tape.add("Concat", tape.ints([-1]), tape.add("Shape", self.text), tape.ints([width]), axis=0)
        found = tape.add("Reshape", every, shape)
        found.shape, found.type = ir.Shape([None, None, width]), value.type
        return found


def last_attention(at: Prefill) -> Signal:
    """What the prompt's last row gives each visual token in the layer before, mean over heads: [B * I, N] (FastV, arXiv 2403.06764)."""
    node = attention_of(at.model, at.layer - 1)
    return Signal(_row(at, node, inputs(node)[0], inputs(node)[1]))


def own_attention(at: Prefill) -> Signal:
    """The same with this layer's own query and keys, on the state before it: [B * I, N] (PyramidDrop, arXiv 2410.17247)."""
    node = attention_of(at.model, at.layer)
    tape = Tape(at.model)
    last = [tape.ints([-1]), tape.ints([2**31 - 1])]

    def end(value: ir.Value, axis: int) -> ir.Value:
        found = tape.add("Slice", value, *last, tape.ints([axis]))
        found.type, found.shape = value.type, ir.Shape([1 if n == axis else d for n, d in enumerate(dims(value))])
        return found

    only_last = {value: end(value, len(dims(value)) - 1 if name == "positions" else 1) for name, value in at.per_row.items()}
    rows = str(dims(at.hidden)[1])
    query = Fork(at.model, {**only_last, at.hidden: end(at.hidden, 1)}, (rows, "last_row")).of(inputs(node)[0])
    key = Fork(at.model, {at.hidden: tape.add("Identity", at.hidden)}, (rows, rows)).of(inputs(node)[1])
    return Signal(_row(at, node, query, key))


def text_attention(at: Prefill) -> Signal:
    """What each text row gives each visual token in the layer before, mean over heads: [B * I, T, N] (SparseVLM, arXiv 2410.04417)."""
    node = attention_of(at.model, at.layer - 1)
    assert at.text is not None
    tape = Tape(at.model)
    query, key = inputs(node)[:2]
    heads = _weights(at, node, tape.add("Gather", query, at.text, axis=2), key, at.text if at.causal else None)  # [B, T, S]
    picked = tape.add("Transpose", tape.add("Gather", heads, at.rows, axis=2), perm=[0, 2, 1, 3])  # [B, I, T, N]
    shape = tape.add("Concat", tape.ints([-1]), tape.add("Shape", at.text), tape.ints([dims(at.rows)[1]]), axis=0)
    return Signal(tape.add("Reshape", picked, shape), 2)


def _row(at: Prefill, node: ir.Node, query: ir.Value, key: ir.Value) -> ir.Value:
    """The last row's attention to the visual rows, mean over heads: [B * I, N]."""
    tape = Tape(at.model)
    last = tape.add("Slice", query, tape.ints([-1]), tape.ints([2**31 - 1]), tape.ints([2]))
    weights = tape.add("Squeeze", _weights(at, node, last, key, None), tape.ints([1]))  # [B, S]
    weights.shape, weights.type = ir.Shape([None, None]), ir.TensorType(FLOAT)
    return at.visual(weights)


def _weights(at: Prefill, node: ir.Node, query: ir.Value, key: ir.Value, rows: ir.Value | None) -> ir.Value:
    """softmax(query K^T) of some rows over all, mean over heads: query [B, H, R, d], key [B, Hkv, S, d] -> [B, R, S] fp32.

    `rows` are the queries' own, which do not see those behind them; None: they see all.
    """
    if node.attributes["window"].as_int():
        raise EdgecompError(f"decoder layer {node.attributes['layer'].as_int()} looks through a sliding window, so its attention does not rank all "
                            "visual tokens; cut before another layer, or use another method")
    tape = Tape(at.model)
    heads, kv_heads, width = dims(inputs(node)[0])[1], dims(inputs(node)[1])[1], dims(inputs(node)[0])[3]
    assert isinstance(heads, int) and isinstance(kv_heads, int)
    grouped = tape.add("Reshape", tape.add("Cast", query, to=FLOAT), tape.ints([0, kv_heads, heads // kv_heads, -1, width]))  # [B, Hkv, G, R, d]
    keys = tape.add("Unsqueeze", tape.add("Transpose", tape.add("Cast", key, to=FLOAT), perm=[0, 1, 3, 2]), tape.ints([2]))  # [B, Hkv, 1, d, S]
    scores = tape.add("Mul", tape.add("MatMul", grouped, keys), tape.number(node.attributes["scale"].as_float()))
    if cap := node.attributes["softcap"].as_float():
        scores = tape.add("Mul", tape.add("Tanh", tape.add("Div", scores, tape.number(cap))), tape.number(cap))
    if rows is not None:
        every = tape.add("Range", tape.ints(0), tape.add("Squeeze", tape.add("Shape", key, start=2, end=3)), tape.ints(1))
        behind = tape.add("Greater", every, tape.add("Unsqueeze", rows, tape.ints([1])))  # [R, S]
        scores = tape.add("Where", behind, tape.number(-1e30), scores)
    return tape.add("ReduceMean", tape.add("Softmax", scores, axis=-1), tape.ints([1, 2]), keepdims=0)


def _keys(at: Prefill) -> ir.Value:
    """The layer before's keys by row, heads side by side: [B, S, Hkv * d]."""
    key = inputs(attention_of(at.model, at.layer - 1))[1]
    tape = Tape(at.model)
    _, heads, _, width = dims(key)
    assert isinstance(heads, int) and isinstance(width, int)
    found = tape.add("Reshape", tape.add("Transpose", key, perm=[0, 2, 1, 3]), tape.ints([0, 0, heads * width]))
    found.shape, found.type = ir.Shape([None, None, heads * width]), key.type
    return found


def _normed(at: Prefill) -> ir.Value:
    """The state through the decoder's final norm: [B, S, D]."""
    final, hidden = _final_norm(at.model), at.hidden
    if (wide := inputs(final)[0].dtype) not in (None, hidden.dtype):  # some norms work in fp32 whatever the model does
        hidden = Tape(at.model).add("Cast", hidden, to=wide)
        hidden.type, hidden.shape = inputs(final)[0].type, at.hidden.shape
    node = ir.node(final.op_type, [hidden, *inputs(final)[1:]], dict(final.attributes))
    at.model.graph.append(node)
    found = node.outputs[0]
    found.shape, found.type = at.hidden.shape, final.outputs[0].type
    return found


def _final_norm(model: ir.Model) -> ir.Node:
    """The norm before the head: the first one on the way back from the logits. Signals of earlier cuts may have put copies of others anywhere."""
    waiting = [next(v for v in model.graph.outputs if v.name == "logits")]
    while True:
        node = waiting.pop(0).producer()
        if node is not None and node.op_type == "RMSNormalization":
            return node
        waiting += inputs(node) if node is not None else []


DECODER: dict[str, Callable[[Prefill], Signal]] = {
    "last_attention": last_attention,
    "own_attention": own_attention,
    "text_attention": text_attention,
    "visual_embeddings": lambda at: Signal(at.visual(marks(at.model, "hidden")[0].inputs[0])),  # type: ignore[arg-type]
    "text_embeddings": lambda at: Signal(at.of_text(marks(at.model, "hidden")[0].inputs[0]), 0),  # type: ignore[arg-type]
    "normed": lambda at: Signal(at.visual(_normed(at))),
    "text_normed": lambda at: Signal(at.of_text(_normed(at)), 0),
    "keys": lambda at: Signal(at.visual(_keys(at))),
    "text_keys": lambda at: Signal(at.of_text(_keys(at)), 0),
}
OF_LAYER_BEFORE = ("cls_attention", "column_attention", "last_attention", "text_attention", "keys", "text_keys")
VISION = ("cls_attention", "column_attention", "keys")
PROMPT = ("last_attention", "own_attention", "text_attention", "text_embeddings", "text_normed", "text_keys")  # what depends on the question
TEXT = tuple(name for name in PROMPT if name.startswith("text_"))  # what reads the rows behind the last picture


def needs_prompt(names: Sequence[str]) -> bool:
    """Whether any of these signals depends on the question."""
    return any(name in PROMPT for name in names)
