"""Products of a vision graph in int8: what enters them is rounded with one scale a tensor, a weight with one for each row.

QuantizeLinear and DequantizeLinear (ONNX) in front of each product say so in the neutral graph; a backend that has products of whole
numbers takes the pairs into them, on any other they compute what is meant. Symmetric around zero, as TensorRT wants it.
"""
from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from edgecomp.ir.rewrite import constant, inputs
from edgecomp.quantize.graph import products_with, read_dequantized
from edgecomp.quantize.rule import weights_of

MOST = 127
Numbers = tuple[ir.ExternalTensor, ir.ExternalTensor] | tuple[ir.Tensor[Any], ir.Tensor[Any]]  # a weight's int8 [out, in], and its scales [out]


def entering(model: ir.Model, names: Collection[str] | None = None) -> dict[ir.Value, list[ir.Node]]:
    """The values that enter products with the named weights, or with all, in a neutral vision graph, each with those products; in order."""
    found: dict[ir.Value, list[ir.Node]] = {}
    for weight in weights_of(model, "vision"):
        for product in products_with(weight.value) if names is None or weight.name in names else ():
            found.setdefault(inputs(product)[0], []).append(product)
    return found


def quantize_products(model: ir.Model, names: Collection[str], ranges: Mapping[str, float],
                      numbers: Callable[[str, ir.TensorProtocol], Numbers]) -> None:
    """Puts the products with the named weights of a neutral vision graph in int8, in place.

    Args:
        model: the graph.
        names: of the weights.
        ranges: what becomes 127 of each value that enters products, by its name; what lies beyond is cut off.
        numbers: of a weight, by name and content: its whole numbers and their scales.
    """
    for value, products in entering(model, names).items():
        assert value.name is not None and value.dtype is not None
        dtype = value.dtype.numpy()
        # never zero, which TensorRT refuses
        scale = constant(model, f"{value.name}.scale", np.maximum(np.array(ranges[value.name] / MOST, dtype), np.finfo(dtype).tiny))
        zero = constant(model, "int8_zero", np.array(0, np.int8))
        rounded = ir.node("QuantizeLinear", [value, scale, zero])
        again = ir.node("DequantizeLinear", [rounded.outputs[0], scale, zero])
        rounded.outputs[0].type, again.outputs[0].type = ir.TensorType(ir.DataType.INT8), value.type
        rounded.outputs[0].shape = again.outputs[0].shape = value.shape
        model.graph.insert_before(products[0], [rounded, again])
        for product in products:
            product.replace_input_with(0, again.outputs[0])
    for weight in weights_of(model, "vision"):
        if weight.name in names:
            assert weight.value.const_value is not None
            read_dequantized(model, weight.value, *numbers(weight.name, weight.value.const_value))
