"""The builder's settings as flags of trtexec, where a board's Python has no TensorRT. trtexec itself comes with JetPack.

What each release takes: its own help text as public logs and NVIDIA's migration pages quote it
(https://docs.nvidia.com/deeplearning/tensorrt/11.4.1/api/migration/tensorrt-10x-to-11x-trtexec.html, .../tensorrt-8x-to-10x-trtexec.html).
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx

from edgecomp.build.order import Order, Shapes
from edgecomp.dialects.targets import Target
from edgecomp_runtime.manifest import GraphInfo

# nodes that become the layers whose precision a weakly typed network is told (`edgecomp.build.network`)
IN_FP32 = {"Softmax", "Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "Sqrt", "Exp", "Log",
           "Erf", "Neg", "Abs", "Reciprocal", "Sin", "Cos", "Floor"}


def arguments(order: Order, graph: GraphInfo, target: Target, path: Path) -> list[str]:
    """trtexec's arguments for an order, without --saveEngine.

    Args:
        order: what to build, with paths as they are on the board.
        graph: the manifest's entry.
        target: the release that the graph was lowered for.
        path: where the graph is here.
    """
    found = [f"--onnx={order.graph}", "--skipInference", *_types(order, target, path)]
    if target.attention:  # since 10.14; without it an attention that has no kernel of its own ends the build
        found.append("--decomposableAttentions=*")
    dynamic = {t.name: order.profile[t.name] for t in graph.inputs if any(isinstance(size, str) for size in t.shape)}
    if dynamic:  # a graph without any refuses to be told shapes
        found += [f"--{name}Shapes={_shapes(dynamic, place)}" for place, name in enumerate(("min", "opt", "max"))]
    if order.timing_cache is not None:
        found.append(f"--timingCacheFile={order.timing_cache}")
    if order.workspace_bytes is not None:
        found.append(f"--memPoolSize=workspace:{order.workspace_bytes >> 20}")  # without a unit it is MiB
    if order.optimization_level is not None:
        found.append(f"--builderOptimizationLevel={order.optimization_level}")
    return found


def _types(order: Order, target: Target, path: Path) -> list[str]:
    """The graph's own types: by --stronglyTyped, which 11 has no other way than; 8.6 is told which layers stay in fp32."""
    if order.precision == "fp32":
        return ["--noTF32", *_strongly(target)]
    if target.strongly_typed:
        return _strongly(target)
    layers = fp32_layers(path)
    return ["--fp16", *(["--precisionConstraints=obey", f"--layerPrecisions={','.join(f'{name}:fp32' for name in layers)}"] if layers else [])]


def _strongly(target: Target) -> list[str]:
    return ["--stronglyTyped"] if target.strongly_typed and not target.name.startswith("tensorrt-11") else []


def fp32_layers(path: Path) -> list[str]:
    """The nodes of a graph that compute in fp32, by name; TensorRT calls its layers as they are called."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False)).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    return [node.name for node in graph.node if node.op_type in IN_FP32 and types.get(node.output[0]) == onnx.TensorProto.FLOAT]


def _shapes(profile: Mapping[str, Shapes], place: int) -> str:
    return ",".join(f"{name}:{_dims(shapes[place])}" for name, shapes in profile.items())


def _dims(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
