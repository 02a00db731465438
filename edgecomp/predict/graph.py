"""What a bundle's graphs ask of a machine, counted node by node: operations of matrix products, and bytes by what they are read for.

The graphs may be neutral or lowered for onnxruntime.
"""
from __future__ import annotations

from collections.abc import Callable
from math import prod

import onnx_ir as ir

from edgecomp.dialects.segments import MICROSOFT
from edgecomp.ir.graphs import load
from edgecomp.ir.rewrite import DOMAIN, SEGMENTS, inputs
from edgecomp.predict.resolve import OF_METHOD, Run, constants, itemsize, nbytes, resolved, run_of, sizes
from edgecomp.predict.work import PHASES, Work
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.errors import InputError, UnknownNameError


def counted(bundle: Bundle, plan: str, phase: str, *, text_rows: int, pictures: int = 1, context: int = 0, dialect: str = "onnxruntime") -> Work:
    """What one phase of a bundle's plan asks for, by its graphs; see `run_of` for the sizes.

    'vision' is one picture and 'prefill' a prompt, methods included; 'selector' is the methods' share of both, by the neutral graphs.

    Raises:
        UnknownNameError, InputError: no such plan or phase; the plan was not lowered to the dialect.
    """
    if phase not in PHASES:
        raise UnknownNameError("phase", phase, PHASES)
    name, info = bundle.plan(plan)
    dialect = "neutral" if phase == "selector" else dialect
    if dialect not in info.variants:
        raise InputError(f"plan {name!r} has no {dialect} graphs, but {', '.join(info.variants)}: lower it with `edgecomp compress BUNDLE -o BUNDLE`")
    total = Work({}, 0.0, 0.0, 0.0, 0.0, 0)
    for part in ("vision", "prefill") if phase == "selector" else (phase,):
        run = run_of(bundle.manifest, info, part, text_rows=text_rows, pictures=pictures, context=context)
        graph = resolved(load(bundle.file(info.variants[dialect][part])), run)
        total = total_of(total, count(graph, run, only=of_methods(graph) if phase == "selector" else None))
    return total


def of_methods(model: ir.Model) -> set[ir.Node]:
    """Of a resolved neutral graph the nodes that are there for a method: its function's, and what computes its signals from the model's values.

    Further than to a product with weights or to attention this is not followed: those are the model's own.
    """
    fixed = constants(model)
    found = {node for node in model.graph if OF_METHOD in node.metadata_props}
    for node in reversed(list(model.graph)):
        own = (node.domain, node.op_type) in ATTENTION or (node.op_type in PRODUCTS and not fixed.isdisjoint(inputs(node)))
        users = [user for out in node.outputs for user, _ in out.uses()]
        if users and not own and found.issuperset(users) and not any(out.is_graph_output() for out in node.outputs):
            found.add(node)
    return found


def count(model: ir.Model, run: Run, only: set[ir.Node] | None = None) -> Work:
    """Adds up the nodes of a resolved graph, or those of `only`.

    Matrix products are counted, and attention over the pairs of rows that see each other. Weights count once a reading node, of tables the
    rows that are looked up. activation_bytes: what goes into matrix products and comes out of them, each value once.
    """
    fixed = constants(model)
    total, moved = Work({}, 0.0, 0.0, 0.0, 0.0, 0), set[ir.Value]()
    for node in model.graph:
        if fixed.issuperset(node.outputs) or (node.op_type in VIEWS and not node.domain) or (only is not None and node not in only):
            continue
        given = inputs(node)
        attention = ATTENTION.get((node.domain, node.op_type))
        if attention:
            total = total_of(total, attention(node, run))
            continue
        product = node.op_type in PRODUCTS
        if product:
            moved.update(value for value in (*given[:2], node.outputs[0]) if value not in fixed)
        weights = [value for value in given if value in fixed]
        if node.op_type.startswith("Gather") and given[0] in fixed:
            weights = [node.outputs[0]]
        flops = {precision(given[0]): _flops(node)} if product else {}
        total = total_of(total, Work(flops, sum(map(_stored, weights)), 0.0, 0.0, 0.0, 0))
    return total_of(total, Work({}, 0.0, 0.0, 0.0, sum(map(nbytes, moved)), 0))


def total_of(*works: Work) -> Work:
    """The sum of what several graphs ask for."""
    flops: dict[str, float] = {}
    for work in works:
        for name, number in work.flops.items():
            flops[name] = flops.get(name, 0.0) + number
    return Work(flops, sum(w.weight_bytes for w in works), sum(w.cache_read_bytes for w in works), sum(w.cache_write_bytes for w in works),
                sum(w.activation_bytes for w in works), sum(w.layers for w in works))


def _stored(weight: ir.Value) -> float:
    """Bytes that a constant is stored in: of quantized weights, the numbers and their scales."""
    node = weight.producer()
    if node is None or node.op_type not in ("DequantizeLinear", "BitwiseXor", "Transpose", "Cast", "Concat"):
        return nbytes(weight)
    return sum(map(_stored, inputs(node)))


def _flops(node: ir.Node) -> float:
    """Of a matrix product or a convolution: two for each element of the result and of the sum behind it."""
    first, second = inputs(node)[:2]
    summed = sizes(first)[-2 if node.attributes.get_int("transA", 0) else -1]
    if node.op_type == "Conv":
        summed = prod(sizes(second)[1:])  # of a weight [out, in / groups, kernel...]
    return 2.0 * prod(sizes(node.outputs[0])) * summed


def _grouped_query(node: ir.Node, run: Run) -> Work:
    """Query [B, S, heads * width], new keys and values [B, S, key heads * width], or all side by side; it finds in the cache past and these."""
    query, past = node.inputs[0], node.inputs[3]
    assert query is not None and past is not None
    (batch, rows, _), (_, key_heads, _, width) = sizes(query), sizes(past)
    layer, window = int((past.name or "").rpartition(".")[2]), max(node.attributes.get_int("local_window_size", -1), 0)
    heads = node.attributes["num_heads"].as_int()
    return _causal(query, batch * heads * width, 2 * batch * key_heads * width, rows, run.before(layer), window, False)


def _multi_head(node: ir.Node, run: Run) -> Work:
    """Query [B, S, heads * width] and keys [B, T, heads * width], which all see each other."""
    query, key = inputs(node)[:2]
    batch, rows, width = sizes(query)
    return Work({precision(query): 4.0 * batch * rows * sizes(key)[1] * width}, 0.0, 0.0, 0.0, 0.0, 1)


def _neutral(node: ir.Node, run: Run) -> Work:
    """Query [B, heads, S, width], keys and values [B, key heads, T, width]."""
    query, key = inputs(node)[:2]
    batch, heads, rows, width = sizes(query)
    if not node.attributes["causal"].as_int():
        return Work({precision(query): 4.0 * batch * heads * rows * sizes(key)[2] * width}, 0.0, 0.0, 0.0, 0.0, 1)
    both_ways = run.pictures and len(node.inputs) > SEGMENTS and node.inputs[SEGMENTS] is not None
    return _causal(query, batch * heads * width, 2 * batch * sizes(key)[1] * width, rows, run.before(node.attributes["layer"].as_int()),
                   node.attributes["window"].as_int(), both_ways)


def _causal(query: ir.Value, across: int, row_elements: int, rows: int, before: int, window: int, both_ways: bool) -> Work:
    """Attention of new rows over a cache and themselves.

    Args:
        query: of the precision that is computed in.
        across: elements of one row of the query, all sequences together.
        row_elements: of one row's keys and values.
        rows: the new ones.
        before: rows in the cache.
        window: rows that one looks back on, itself among them; 0 is all.
        both_ways: every row sees every other, as attention under a mask computes it.
    """
    seen = rows * (before + rows) if both_ways else sum(min(before + row + 1, window or before + rows) for row in range(rows))
    row_bytes = row_elements * itemsize(query)
    return Work({precision(query): 4.0 * across * seen}, 0.0, row_bytes * min(before, window or before), row_bytes * rows, 0.0, 1)


def precision(value: ir.Value) -> str:
    """The name of a value's type in `Work.flops`."""
    assert value.dtype is not None, f"{value.name} has no type"
    return {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "INT8": "int8", "UINT8": "int8"}.get(value.dtype.name, value.dtype.name.lower())


# another look at the same bytes, or at shapes alone
VIEWS = {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size"}
PRODUCTS = {"MatMul", "FusedMatMul", "MatMulNBits", "MatMulIntegerToFloat", "Gemm", "Conv"}
ATTENTION: dict[tuple[str, str], Callable[[ir.Node, Run], Work]] = {
    (MICROSOFT, "GroupQueryAttention"): _grouped_query, (MICROSOFT, "MultiHeadAttention"): _multi_head, (DOMAIN, "Attention"): _neutral,
}
