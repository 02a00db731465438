"""The TensorRT dialects: three graphs a plan, batch 1, caches of a fixed capacity of which only a bucket is looked at.

A neutral decoder becomes two graphs, `prefill` and `decode` (one row). Both have one more input for each stretch of layers between two
cuts: `places` [bucket], 0, 1, .. in order. Its size says how many rows of the caches are looked at; it is at least length + rows. A
size is a CUDA graph. What a release takes is in `targets`.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, InlinePass, RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

from edgecomp.dialects.plain_operators import REDUCTIONS, type_of, write_in_opset, write_plainly
from edgecomp.dialects.targets import Target, opset_for
from edgecomp.dialects.tensorrt_attention import Piece, Stretch, attend
from edgecomp.ir.rewrite import DOMAIN, dims, inputs, nodes, replace
from edgecomp.passes.tape import Tape, typed

INT32, INT64 = ir.DataType.INT32, ir.DataType.INT64
CAPACITY_STEP = 8  # rows; of 16 numbers of 2 bytes and more they end on 256 bytes, where any buffer may begin
ONE = {"vision": ("images", "batch"), "prefill": ("batch",), "decode": ("batch", "rows", "logit_rows")}  # symbols that are 1


def lower(model: ir.Model, part: str, target: Target, cache_rows: Sequence[int] = ()) -> None:
    """Turns a neutral graph into one that a TensorRT release takes, in place.

    In `prefill` a cut always shortens; in `decode` it never does, and what only cuts read or give is gone. New keys and values are written
    into the cache by the graph (`cache_key_out.L`, `cache_value_out.L`: one buffer with the input) where the release can; else they are
    one result a stretch, `new_rows.L` [2 * layers, Hkv, rows, D], key and value of its first layer L, then of the next, for whoever runs
    it to copy. Releases without int64 have int32 inputs and outputs.

    Args:
        model: a neutral graph.
        part: 'vision' (one picture), 'prefill' or 'decode'.
        target: the release.
        cache_rows: rows that each decoder layer's cache is to hold at least; none for a vision graph.

    Raises:
        EdgecompError: an encoder with attention in windows.
    """
    InlinePass()(model)
    for mark in nodes(model, "Mark", DOMAIN):
        replace(model, mark, inputs(mark)[0])
    for cut in nodes(model, "Cut", DOMAIN):
        _cut(model, cut, shortened=part == "prefill")
    RemoveUnusedNodesPass()(model)
    _fix_sizes(model, dict.fromkeys(ONE[part], 1), part == "decode", cache_rows)
    if part == "vision":
        _encoder(model, target)
    else:
        _decoder(model, target, one_row=part == "decode")
    write_plainly(model, target.operators - {"CastLike"})  # of which only newer tables speak, and which a Cast replaces at no cost
    if not target.int64:
        _without_int64(model)
    write_in_opset(model, opset_for(model, target))
    model.graph.sort()
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    RemoveUnusedOpsetsPass()(model)
    read = {value for node in model.graph for value in node.inputs}
    for value in list(model.graph.inputs):
        if value not in read:
            model.graph.inputs.remove(value)


def capacity(rows: int) -> int:
    """Rows of a cache that is to hold so many."""
    return -(-rows // CAPACITY_STEP) * CAPACITY_STEP


def _cut(model: ir.Model, cut: ir.Node, shortened: bool) -> None:
    """Puts one side of a `Cut` node where it stands: shortened values, or those that came, for which there is nothing to say of what was kept."""
    count = len(cut.outputs)
    for old, new in zip(list(cut.outputs), cut.inputs[1:1 + count] if shortened else cut.inputs[1 + count:]):
        assert new is not None
        if shortened:
            new.type, new.shape = old.type, old.shape
        if old.is_graph_output() and not shortened:
            model.graph.outputs.remove(old)
        elif old.is_graph_output():
            new.name, old.name = old.name, None
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    model.graph.remove(cut, safe=True)


def _fix_sizes(model: ir.Model, known: Mapping[str, int], one_row: bool, cache_rows: Sequence[int]) -> None:
    """Puts numbers in the place of symbols, in every value's shape."""
    for value in (*model.graph.inputs, *(v for node in model.graph for v in node.outputs)):
        role, _, layer = (value.name or "").partition(".")
        if value.shape is not None:
            symbols = [d.value or "" if isinstance(d, ir.SymbolicDim) else None for d in value.shape]
            shape = [d if s is None else 1 if one_row and s.startswith("rows.") else known.get(s, d) for s, d in zip(symbols, value.shape)]
            if value.is_graph_input() and role in ("cache_key", "cache_value"):
                shape[2] = capacity(cache_rows[int(layer)])
            value.shape = ir.Shape(shape)


def _encoder(model: ir.Model, target: Target) -> None:
    for node in nodes(model, "Attention", DOMAIN):
        _, key, value = inputs(node)[:3]
        replace(model, node, attend(Tape(model), node, [Piece(key, value)], _fuses(target, node)))


def _fuses(target: Target, node: ir.Node) -> bool:
    query, width = inputs(node)[0], dims(inputs(node)[0])[3]
    assert isinstance(width, int)
    return target.fuses(type_of(query), width, node.attributes["softcap"].as_float())


def _decoder(model: ir.Model, target: Target, one_row: bool) -> None:
    tape, stretches, new_rows = Tape(model), dict[str, Stretch](), dict[str, list[ir.Value]]()
    for node in nodes(model, "Attention", DOMAIN):
        key, value, past_key, past_value, length = inputs(node)[1:6]
        layer, first = node.attributes["layer"].as_int(), (length.name or "").partition(".")[2]
        if first not in stretches:
            stretches[first] = _stretch(tape, node, f".{first}" if first else "", one_row)
        stretch = stretches[first]
        results = [next(v for v in model.graph.outputs if v.name == f"new_{kind}.{layer}") for kind in ("key", "value")]
        if target.in_place:
            caches = [typed(tape.add("TensorScatter", cache, new, length, axis=-2), f"cache_{kind}_out.{layer}", cache.dtype, cache.shape)
                      for kind, cache, new in (("key", past_key, key), ("value", past_value, value))]
            for old, new in zip(results, caches):
                model.graph.outputs[model.graph.outputs.index(old)] = new
            pieces = [stretch.cache(node, *caches)]
        else:
            for old in results:
                model.graph.outputs.remove(old)
            new_rows.setdefault(first, []).extend([key, value])
            pieces = [stretch.past(node, past_key, past_value), stretch.new(node, key, value)]
        replace(model, node, attend(tape, node, pieces, _fuses(target, node)))
    for first, values in new_rows.items():
        shape = [len(values), *dims(values[0])[1:]]
        model.graph.outputs.append(typed(tape.add("Concat", *values, axis=0), f"new_rows.{first or 0}", values[0].dtype, shape))


def _stretch(tape: Tape, node: ir.Node, suffix: str, one_row: bool) -> Stretch:
    """The layers that share the length of a node's cache."""
    query, length = inputs(node)[0], inputs(node)[5]
    rows = None
    if not one_row:
        count = tape.add("Squeeze", tape.add("Shape", query, start=2, end=3), tape.ints([0]))
        rows = tape.add("Range", tape.ints(0), count, tape.ints(1))
    return Stretch(tape, length, tape.input(f"places{suffix}", INT64, [f"bucket{suffix}"]), rows)


def _without_int64(model: ir.Model) -> None:
    """Makes whole inputs and outputs int32, as they would be bound, and reduces whole numbers as fp32 ones, which are exact below 2^24."""
    tape = Tape(model)
    for node in list(model.graph):
        if node.op_type in (*REDUCTIONS, "ReduceSum") and (dtype := type_of(inputs(node)[0])).is_integer():
            wide = ir.node(node.op_type, [tape.add("Cast", inputs(node)[0], to=ir.DataType.FLOAT), *node.inputs[1:]], dict(node.attributes))
            model.graph.append(wide)
            replace(model, node, tape.add("Cast", wide.outputs[0], to=dtype))
    for value in model.graph.inputs:
        if value.dtype == INT64:
            uses = list(value.uses())
            value.type, wider = ir.TensorType(INT32), tape.add("Cast", value, to=INT64)  # not its dtype: others may share the type
            wider.type, wider.shape = ir.TensorType(INT64), value.shape
            for node, at in uses:
                node.replace_input_with(at, wider)
    for at, value in enumerate(model.graph.outputs):
        if value.dtype == INT64:
            name, value.name = value.name or "", None
            model.graph.outputs[at] = typed(tape.add("Cast", value, to=INT32), name, INT32, value.shape)
