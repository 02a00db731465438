"""The onnxruntime dialect: fused attention with the cache updated in place, weights used in the layout that HF stores.

Decoder attention becomes com.microsoft.GroupQueryAttention whose past and present are one buffer; encoder attention
MultiHeadAttention (flash attention on the CPU). `MatMul(x, Transpose(W))` becomes FusedMatMul with transB, so that no
transposed copy of the weights is made, on disk or at load.
"""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, InlinePass, RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

from edgecomp.dialects.cuts import where_pictures
from edgecomp.dialects.integer_products import integer_products
from edgecomp.dialects.joined import join_small_products
from edgecomp.dialects.packed import pack_projections
from edgecomp.dialects.quantized import quantized_products
from edgecomp.dialects.rotary import whole_rotary
from edgecomp.dialects.segments import MICROSOFT, BothWays
from edgecomp.ir.rewrite import DOMAIN, KEYS_BIAS, SEGMENTS, constant, dims, ends_as_result, inputs, insert, made_by, nodes, replace
from edgecomp_runtime.errors import EdgecompError

HEAD_PIECE = 16 * 2**20  # bytes
LARGER = 4  # times the next largest weight: what its copy decides then
PAGE_ROWS = 2048  # rows of 2-byte numbers that end on a page, whatever their width


def lower(model: ir.Model) -> None:
    """Turns a neutral graph into one that onnxruntime runs (1.23.2 to 1.31.1 were tried; 1.22 refuses opset 23), in place."""
    InlinePass()(model)
    for mark in nodes(model, "Mark", DOMAIN):
        replace(model, mark, inputs(mark)[0])
    whole_rotary(model)
    lengths, both_ways = _CacheLengths(model), {}
    for attention in nodes(model, "Attention", DOMAIN):
        if not attention.attributes["causal"].as_int():
            _multi_head(model, attention)
            continue
        length = inputs(attention)[5]
        if length not in both_ways:
            both_ways[length] = BothWays(model, length)
        _grouped_query(model, attention, lengths, both_ways[length])
    integer_products(model)
    quantized_products(model)
    _transposed_weights(model)
    RemoveUnusedNodesPass()(model)  # those that nobody reads would count as readers
    if lengths.made:  # in decoders, which take one row at a time: to take many rows' results apart costs what joining gains
        join_small_products(model)
    pack_projections(model)
    _split_head(model)
    _quick_gelu(model)
    _skip_norm(model)
    RemoveUnusedNodesPass()(model)  # what nobody reads would keep what it reads out of a cut's branch
    for cut in nodes(model, "Cut", DOMAIN):
        where_pictures(model, cut)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    lengths.drop_unread()
    RemoveUnusedOpsetsPass()(model)
    model.opset_imports[MICROSOFT] = 1


class _CacheLengths:
    """GroupQueryAttention's two views of a cache length, once for all layers that share it: inputs, which the host fills.

    Computed from the length, one of them would have to come from the host to the GPU in the middle of a step, and no CUDA graph could
    be made of it.
    """

    def __init__(self, model: ir.Model):
        self.model = model
        self.made: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def of(self, attention: ir.Node) -> tuple[ir.Value, ir.Value]:
        """(index of the last row in the cache [batch] int32, total rows int32 scalar), the new rows counted."""
        past, length = inputs(attention)[3], inputs(attention)[5]
        if length not in self.made:
            layer = (length.name or "").removeprefix("length")
            last, total = (ir.Value(name=name + layer, type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape(shape))
                           for name, shape in (("last_row", dims(past)[:1]), ("total_rows", ())))
            self.model.graph.inputs.extend([last, total])
            self.made[length] = last, total
        return self.made[length]

    def drop_unread(self) -> None:
        """Takes lengths away that nothing else reads."""
        for length in self.made:
            if not length.uses():
                self.model.graph.inputs.remove(length)


def _grouped_query(model: ir.Model, node: ir.Node, lengths: _CacheLengths, both_ways: BothWays) -> None:
    query, key, value, past_key, past_value = inputs(node)[:5]
    layer, heads, kv_heads = node.attributes["layer"].as_int(), dims(query)[1], dims(key)[1]
    flat = [_rows_by_hidden(model, node, v) for v in (query, key, value)]
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": node.attributes["scale"].as_float(),
                  "softcap": node.attributes["softcap"].as_float(), "local_window_size": node.attributes["window"].as_int() or -1}
    given = [*flat, past_key, past_value, *lengths.of(node)]
    out, new_key, new_value = insert(model, node, "GroupQueryAttention", given, attributes, MICROSOFT, 3)
    for kind, present, past in (("key", new_key, past_key), ("value", new_value, past_value)):
        present.name, present.type, present.shape = f"cache_{kind}_out.{layer}", past.type, past.shape
        position = next(n for n, v in enumerate(model.graph.outputs) if v.name == f"new_{kind}.{layer}")
        model.graph.outputs[position] = present
    if len(node.inputs) > SEGMENTS:
        out = both_ways.attend(node, out, flat[0], new_key, new_value)
    _heads_from_hidden(model, node, out)


def _multi_head(model: ir.Model, node: ir.Node) -> None:
    if node.attributes["window"].as_int() or node.attributes["softcap"].as_float():
        layer = node.attributes["layer"].as_int()
        raise EdgecompError(f"onnxruntime's MultiHeadAttention has no window and no softcap, and encoder layer {layer} has one")
    flat = [_rows_by_hidden(model, node, v) for v in inputs(node)[:3]]
    attributes = {"num_heads": dims(inputs(node)[0])[1], "scale": node.attributes["scale"].as_float()}
    bias: list[ir.Value | None] = []
    if len(node.inputs) > KEYS_BIAS and node.inputs[KEYS_BIAS] is not None:
        query = inputs(node)[0]
        rows = constant(model, f"bias_rows_{dims(query)[2]}", np.array([1, 1, dims(query)[2], 1], np.int64))
        cast, = insert(model, node, "Cast", [node.inputs[KEYS_BIAS]], {"to": query.dtype})
        by_key, = insert(model, node, "Unsqueeze", [cast, constant(model, "bias_axes", np.array([1, 2], np.int64))])  # [B, 1, 1, S]
        bias = [None, None, *insert(model, node, "Expand", [by_key, rows])]  # the kernel wants it once a query row
    out, = insert(model, node, "MultiHeadAttention", [*flat, *bias], attributes, MICROSOFT)
    _heads_from_hidden(model, node, out)


def _rows_by_hidden(model: ir.Model, before: ir.Node, value: ir.Value) -> ir.Value:
    """[B, H, S, D] -> [B, S, H*D], by taking back the transpose that made it where it can be seen."""
    if rotary := made_by(value, "RotaryEmbedding"):
        flat = _rows_by_hidden(model, before, inputs(rotary)[0])
        attributes = {**rotary.attributes, "num_heads": dims(value)[1]}
        return insert(model, before, "RotaryEmbedding", [flat, *rotary.inputs[1:]], attributes)[0]
    split = made_by(value, "Transpose")
    if split and tuple(split.attributes["perm"].as_ints()) == (0, 2, 1, 3):
        rows = inputs(split)[0]
        reshape = made_by(rows, "Reshape")
        if reshape and dims(inputs(reshape)[0])[:-1] == dims(rows)[:2]:  # where windows go into the batch too, it does more than split heads
            return inputs(reshape)[0]
    else:
        rows, = insert(model, before, "Transpose", [value], {"perm": [0, 2, 1, 3]})
    return insert(model, before, "Reshape", [rows, constant(model, "rows_by_hidden", np.array([0, 0, -1], np.int64))])[0]


def _heads_from_hidden(model: ir.Model, attention: ir.Node, flat: ir.Value) -> None:
    """Puts [B, S, H*D] where an Attention node gave [B, H, S, D]: as it is where heads are merged, split again for other readers."""
    for merge in list(_merges(attention)):
        replace(model, merge, flat)
    heads = dims(attention.outputs[0])[1]
    split, = insert(model, attention, "Reshape", [flat, constant(model, f"heads_of_{heads}", np.array([0, 0, heads, -1], np.int64))])
    replace(model, attention, insert(model, attention, "Transpose", [split], {"perm": [0, 2, 1, 3]})[0])  # goes as unused where all were merges


def _merges(attention: ir.Node) -> Iterator[ir.Node]:
    """The nodes behind an Attention node whose result is its heads side by side, [B, S, H*D]."""
    for transpose, _ in attention.outputs[0].uses():
        if transpose.op_type == "Transpose" and tuple(transpose.attributes["perm"].as_ints()) == (0, 2, 1, 3):
            rows = transpose.outputs[0]
            yield from (n for n, _ in rows.uses() if n.op_type == "Reshape" and dims(n.outputs[0])[:-1] == dims(rows)[:2])


def _transposed_weights(model: ir.Model) -> None:
    for matmul in nodes(model, "MatMul"):
        transpose = made_by(matmul.inputs[1], "Transpose")
        if transpose and inputs(transpose)[0].is_initializer() and len(dims(inputs(transpose)[0])) == 2:
            out, = insert(model, matmul, "FusedMatMul", [matmul.inputs[0], transpose.inputs[0]], {"transB": 1}, MICROSOFT)
            replace(model, matmul, out)


def _split_head(model: ir.Model) -> None:
    """The head's weight as several row ranges of the same bytes, their logits side by side.

    onnxruntime packs each weight into a copy before it lets go of the mapped file. With a small model's large vocabulary
    that one copy decides the peak: 108 MiB of 650 at 49,280 words and width 576. Of a large model's, whose head is hardly larger than
    its other weights, one product is faster than many.
    """
    stored = [value.const_value for value in model.graph.initializers.values() if isinstance(value.const_value, ir.ExternalTensor)]
    for head in nodes(model, "FusedMatMul", MICROSOFT):
        x, weight = inputs(head)
        tensor = weight.const_value
        if not ends_as_result(head.outputs[0]) or not isinstance(tensor, ir.ExternalTensor) or tensor.nbytes <= 2 * HEAD_PIECE:
            continue
        if tensor.nbytes <= LARGER * max((other.nbytes for other in stored if other is not tensor), default=0):
            continue
        rows, width = weight.shape.numpy() if weight.shape else (0, 0)
        row_bytes = tensor.nbytes // rows
        step = max(HEAD_PIECE // row_bytes // PAGE_ROWS, 1) * PAGE_ROWS
        logits: list[ir.Value] = []
        for first in range(0, rows, step):
            count = min(step, rows - first)
            name = f"{weight.name}.rows{first}"
            piece = ir.ExternalTensor(tensor.location, (tensor.offset or 0) + first * row_bytes, count * row_bytes, tensor.dtype, name=name,
                                      shape=ir.Shape([count, width]), base_dir=tensor.base_dir)
            value = ir.Value(name=name, type=weight.type, shape=piece.shape, const_value=piece)
            model.graph.register_initializer(value)
            logits += insert(model, head, "FusedMatMul", [x, value], {"transB": 1}, MICROSOFT)
        replace(model, head, insert(model, head, "Concat", logits, {"axis": -1})[0])


def _quick_gelu(model: ir.Model) -> None:
    """x * sigmoid(a x) in one node: CLIP's QuickGelu, and SiLU with a = 1."""
    for gate in nodes(model, "Sigmoid"):
        uses = [n for n, _ in gate.outputs[0].uses()]
        if len(uses) != 1 or uses[0].op_type != "Mul":
            continue
        argument = inputs(gate)[0]
        x, alpha = argument, 1.0
        scale = made_by(argument, "Mul")
        if scale and argument not in uses[0].inputs:
            x, number = inputs(scale)
            if number.const_value is None or number.const_value.size != 1:
                continue
            alpha = number.const_value.numpy().item()
        if x in uses[0].inputs:
            out, = insert(model, uses[0], "QuickGelu", [x], {"alpha": alpha}, MICROSOFT)
            replace(model, uses[0], out)


def _skip_norm(model: ir.Model) -> None:
    """A residual addition and the RMS norm behind it in one node, which also gives the sum."""
    for norm in nodes(model, "RMSNormalization"):
        add, scale = made_by(norm.inputs[0], "Add"), inputs(norm)[1]
        if not add or not scale.is_initializer():
            continue
        x, skip = inputs(add)
        if x.shape is None or x.shape != skip.shape or len(x.shape) not in (2, 3):
            continue
        if norm.attributes.get_int("axis", -1) not in (-1, len(x.shape) - 1):
            continue
        # it stands where the sum stood, for whoever reads the sum before the norm
        out, _, _, total = insert(model, add, "SkipSimplifiedLayerNormalization", [x, skip, scale],
                                  {"epsilon": norm.attributes.get_float("epsilon", 1e-5)}, MICROSOFT, 4)
        replace(model, norm, out)
        replace(model, add, total)
