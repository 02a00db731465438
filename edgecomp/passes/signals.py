"""The signals that methods ask for, computed beside the graph they are read from, which stays as it was."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from edgecomp.ir.rewrite import DOMAIN, constant, inputs, insert, nodes
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import VisionInfo


def cls_attention(model: ir.Model, vision: VisionInfo) -> ir.Value:
    """The CLS row of the select layer, softmax(q_cls K^T) averaged over heads, without CLS itself: [images, N] float32.

    Raises:
        EdgecompError: the tower has no CLS token.
    """
    if not vision.has_cls:
        raise EdgecompError("this vision tower has no CLS token, so there is no CLS attention to rank tokens by; use another method")
    attention = next(n for n in nodes(model, "Attention", DOMAIN) if n.attributes["layer"].as_int() == vision.select_layer)
    query, key = inputs(attention)[:2]

    def add(op_type: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        return insert(model, attention, op_type, inputs, attributes)[0]

    row = add("Gather", query, constant(model, "cls_row", np.array([0], np.int64)), axis=2)  # [B, H, 1, D]
    row, keys = (add("Cast", value, to=ir.DataType.FLOAT) for value in (row, add("Transpose", key, perm=[0, 1, 3, 2])))
    scores = add("Mul", add("MatMul", row, keys), constant(model, "cls_scale", np.float32(attention.attributes["scale"].as_float())))
    weights = add("Softmax", scores, axis=-1)  # [B, H, 1, 1 + N]
    mean = add("ReduceMean", weights, constant(model, "heads_and_row", np.array([1, 2], np.int64)), keepdims=0)
    bounds = [constant(model, f"cls_{name}", np.array([at], np.int64)) for name, at in (("start", 1), ("end", 1 + vision.tokens), ("axis", 1))]
    return add("Slice", mean, *bounds)


SIGNALS: dict[str, Callable[[ir.Model, VisionInfo], ir.Value]] = {"cls_attention": cls_attention}
