"""From a torch module to a neutral ONNX graph whose weights keep their Hugging Face parameter names."""
from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import CommonSubexpressionEliminationPass
from onnxscript.optimizer import optimize_ir
from onnxscript.rewriter import onnx_fusions

from edgecomp_runtime.errors import EdgecompError

OPSET = 23  # Attention, RMSNormalization and RotaryEmbedding are whole here; 24 loses fusions, 26 is broken in torch 2.13


def trace(module: torch.nn.Module, inputs: tuple[Any, ...], names: tuple[list[str], list[str]], dynamic: Any, parameters: dict[str, str]) -> ir.Model:
    """Exports a module and tidies the graph, with nothing done to the weights.

    Args:
        module: what to trace; its parameters lie below attributes of its own.
        inputs: example inputs. Dimensions that vary must be 2 or more, or torch fixes them.
        names: the graph's input and output names.
        dynamic: for each input, the names of the dimensions that vary.
        parameters: module parameter name -> Hugging Face name.

    Raises:
        EdgecompError: torch could not trace the module; the first line of its reason is in the message.
    """
    noise = io.StringIO()  # torch prints whole graphs where an export fails
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(noise), contextlib.redirect_stdout(noise), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(module, inputs, dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
                                        input_names=names[0], output_names=names[1], dynamic_shapes=dynamic)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__:  # torch wraps what happened in what it was doing
            cause = cause.__cause__
        reason = next((line for line in str(cause).splitlines() if line.strip()), "no reason given")
        raise EdgecompError(f"torch could not export this model ({type(cause).__name__}: {reason[:200]}); "
                            "its code may need a transformers version that edgecomp was not tried with") from error
    finally:
        exporter_log.setLevel(level)
    assert program is not None
    model = program.model
    with _unknown(model, set(parameters)):
        optimize_ir(model)
        onnx_fusions.fuse(model)
        _norms_of_one_type(model)
        CommonSubexpressionEliminationPass()(model)
    for name in sorted(set(parameters) & set(model.graph.initializers)):
        model.graph.initializers[name].name = parameters[name]
    for node in model.graph:
        node.metadata_props.clear()  # torch's stack traces: most of the file's size, and paths of this machine
        node.doc_string = None
    for value in (v for node in model.graph for v in node.outputs):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    return model


def _norms_of_one_type(model: ir.Model) -> None:
    """Casts the input of an RMSNormalization to the type of its scale, where that is wider.

    Gemma normalises and scales in fp32, and the fusion takes the cast in front for its own. ONNX allows an fp16 input beside an
    fp32 scale, but its expansion of the operator multiplies the two, and onnxruntime refuses that.
    """
    for node in list(model.graph):
        if node.op_type == "RMSNormalization":
            x, scale = node.inputs[:2]
            if x is not None and scale is not None and scale.dtype == ir.DataType.FLOAT and x.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
                cast = ir.node("Cast", [x], {"to": scale.dtype})
                cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(scale.dtype), x.shape
                model.graph.insert_before(node, cast)
                node.replace_input_with(0, cast.outputs[0])


@contextlib.contextmanager
def _unknown(model: ir.Model, names: set[str]) -> Iterator[None]:
    """While inside, weights are inputs: no optimisation can look at their content, which is not there yet, or fold it."""
    graph, count = model.graph, len(model.graph.inputs)
    weights = {name: graph.initializers.pop(name) for name in sorted(names & set(graph.initializers))}
    content = {name: value.const_value for name, value in weights.items()}
    for value in weights.values():
        value.const_value = None
        graph.inputs.append(value)
    yield
    del graph.inputs[count:]
    for name, value in weights.items():
        value.const_value = content[name]
        if value.uses():
            graph.register_initializer(value)
