"""A bundle's quantized weights as numbers again, put into Hugging Face's model: what is compared then is the graphs, on the same weights.

What the numbers cost in accuracy is measured on questions (`edgecomp eval`), not here.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgecomp.ir.graphs import load, read
from edgecomp.ir.rewrite import inputs, made_by, nodes
from edgecomp.quantize.blocks import dequantized
from edgecomp.quantize.graph import order_of
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.errors import EdgecompError

Contents = Mapping[str, Callable[[], NDArray[np.float32]]]


def contents(bundle: Bundle) -> Contents:
    """What each quantized weight [out, in] of a bundle stands for in fp32, by its Hugging Face name; computed when it is asked for.

    Raises EdgecompError for a bundle that rounds activations too.
    """
    found: dict[str, Callable[[], NDArray[np.float32]]] = {}
    if tower := bundle.manifest.calibrated:
        raise EdgecompError(f"{bundle.path} has the products of its vision tower in {tower.activations}, and Hugging Face's model does not: "
                            "verify the bundle that it was made from; `edgecomp eval` shows what rounding costs")
    if bundle.manifest.quantized is None:
        return found
    for file in set(bundle.manifest.plans["full"].variants["neutral"].values()):
        for node in nodes(load(bundle.file(file)), "DequantizeLinear"):
            widened = made_by(node.inputs[1], "Cast")
            numbers, scales = inputs(node)[0].const_value, inputs(widened or node)[0 if widened else 1].const_value
            zeros, order = inputs(node)[2].const_value if len(inputs(node)) > 2 else None, order_of(node)
            assert numbers is not None and scales is not None, "weights are constants"

            def content(numbers: Any = numbers, scales: Any = scales, zeros: Any = zeros, order: Any = order) -> NDArray[np.float32]:
                found = dequantized(np.asarray(read(numbers)), read(scales), None if zeros is None else np.asarray(read(zeros)))
                return found if order is None else np.ascontiguousarray(found[:, np.argsort(order)])
            found[str(numbers.name)] = content
    return found


def own_parameters(model: Any, names: Iterable[str]) -> dict[str, torch.nn.Parameter]:
    """Gives the named weights parameters of their own, by name: a head that is tied to the embeddings is quantized without them."""
    table, found = model.get_input_embeddings(), {}
    for name in names:
        shared = model.get_parameter(name)
        found[name] = torch.nn.Parameter(shared.detach(), requires_grad=False)
        for module in model.modules():
            for attribute, parameter in list(module._parameters.items()):
                if parameter is shared and module is not table:
                    module.register_parameter(attribute, found[name])
    return found


def impose(model: Any, contents: Contents) -> None:
    """Puts the contents into a model in fp32."""
    for name, parameter in own_parameters(model, contents).items():
        parameter.data = torch.from_numpy(contents[name]())
