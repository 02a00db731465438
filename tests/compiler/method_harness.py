"""A method's ONNX function as a graph of its own, run by onnxruntime on made-up features and signals."""
from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from edgecomp import methods
from edgecomp.methods.base import DOMAIN, Method, Place

HIDDEN, KEYS = 6, 4  # widths of features and of keys

# Signals: attention [N] or [T, N], hidden states [N, D], the text's [T, D], keys [N, d], the text's [T, d].
ATTENTION = ("cls_attention", "column_attention", "last_attention", "own_attention", "text_attention")
OF_TEXT = ("text_attention", "text_embeddings", "text_normed", "text_keys")
ROWS = ("visual_embeddings", "normed", "text_embeddings", "text_normed", "keys", "text_keys")


def shape_of(signal: str, tokens: int | str, text: int | str) -> list[int | str]:
    """A signal's shape without its batch axis."""
    name = signal.split(":")[0]
    assert name in ATTENTION + ROWS, f"a signal that is not known here: {signal}"
    if name in ATTENTION:
        return [text, tokens] if name in OF_TEXT else [tokens]
    return [text if name in OF_TEXT else tokens, KEYS if name.endswith("keys") else HIDDEN]


@dataclass(frozen=True)
class Case:
    """A method at a place, and the pictures it is given there: features [images, N, D] and its signals."""
    method: Method
    place: Place
    inputs: tuple[np.ndarray, ...]

    @property
    def images(self) -> int:
        return len(self.inputs[0])

    def picture(self, number: int) -> Case:
        return Case(self.method, self.place, tuple(values[number: number + 1] for values in self.inputs))


@functools.lru_cache(maxsize=512)
def session(method: Method, place: Place, dtype: np.dtype, width: int = HIDDEN) -> ort.InferenceSession:
    """A graph that is one call of the method's ONNX function."""
    wide, own = ir.DataType.FLOAT, ir.DataType.from_numpy(dtype)
    inputs = [ir.Value(name="features", type=ir.TensorType(own), shape=ir.Shape(["images", place.tokens, width]))]
    inputs += [ir.Value(name=name.replace(":", "_"), type=ir.TensorType(wide if name.split(":")[0] in ATTENTION else own),
                        shape=ir.Shape(["images", *shape_of(name, place.tokens, "text")])) for name in method.signals(place.site)]
    function = method.function(place)
    call = ir.node(function.name, inputs, domain=DOMAIN, num_outputs=3)
    for value, name, kind in zip(call.outputs, ("tokens", "kept", "order"), (own, ir.DataType.INT64, ir.DataType.INT64)):
        value.name, value.type = name, ir.TensorType(kind)
    graph = ir.Graph(inputs, call.outputs, nodes=[call], opset_imports={"": 23, DOMAIN: 1}, name="law")
    model = ir.Model(graph, ir_version=10, functions=[function])
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # no pool of threads for each of many sessions
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The method in onnxruntime: tokens [images, K, D], kept [images, K], order [images, K]."""
    ready = session(case.method, case.place, case.inputs[0].dtype, case.inputs[0].shape[2])
    tokens, kept, order = ready.run(None, {value.name: given for value, given in zip(ready.get_inputs(), case.inputs, strict=True)})
    return tokens, kept, order


def one_picture(name: str, place: Place, features: np.ndarray, *signals: np.ndarray, **parameters: Any) -> Case:
    """A case of one picture: features [N, D] and its signals, as they are."""
    return Case(methods.make(name, **parameters), place, tuple(np.asarray(values, np.float32)[None] for values in (features, *signals)))
