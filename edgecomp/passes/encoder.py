"""A cut inside the vision tower: its later layers see fewer tokens."""
from __future__ import annotations

import onnx_ir as ir

from edgecomp.budget import Reduction
from edgecomp.ir.fork import downstream
from edgecomp.ir.rewrite import dims, marks
from edgecomp.passes.apply import Application
from edgecomp.passes.shapes import shorten
from edgecomp.passes.signals import vision_signals
from edgecomp.passes.splice import compose, expose_rule
from edgecomp.passes.tape import Tape
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import VisionInfo


def in_encoder(model: ir.Model, vision: VisionInfo, layer: int, step: Reduction, *, expose: bool = False) -> None:
    """Shortens the vision tower's hidden state before a layer, or behind the last one that the projector reads, in place.

    A CLS row stays in front. Signals are those of the layer before. The graph gains the output `kept` [images, K].
    `expose`: see `at_projector`.

    Raises:
        EdgecompError: the tower does not have one row a visual token there, the projector mixes neighbouring ones, or a signal is not to be had.
    """
    names = step.method.signals("encoder")
    hidden, cls = state_before(model, layer), int(vision.has_cls)
    if len(step.tokens.tiles) != 1 or dims(hidden)[1] != cls + step.tokens.count:
        raise EdgecompError(f"this vision tower has {dims(hidden)[1]} rows before layer {layer} and not one for each of {step.tokens.count} "
                            "visual tokens of one tile: it cannot be cut inside; cut at the projector")
    tape, behind = Tape(model), downstream([hidden])
    images, rows, width = dims(hidden)
    features = tape.add("Slice", hidden, tape.ints([1]), tape.ints([2**31 - 1]), tape.ints([1])) if cls else hidden
    features.type, features.shape = hidden.type, ir.Shape([images, step.tokens.count, width])
    signals = vision_signals(model, vision, names, layer - 1, step.tokens)
    applied = Application(model, step)(features, signals)
    short = applied.tokens
    if cls:
        short = tape.add("Concat", tape.add("Slice", hidden, tape.ints([0]), tape.ints([1]), tape.ints([1])), short, axis=1)
    short.type, short.shape = hidden.type, ir.Shape([images, rows, width])
    for node in behind:
        for position, value in enumerate(node.inputs):
            if value is hidden:
                node.replace_input_with(position, short)
    compose(model, applied.kept, step.keep)
    if expose:
        expose_rule(model, applied, features, dict(zip(names, signals)))
    model.graph.sort()
    shorten(model, short, 1, cls + step.keep)


def state_before(model: ir.Model, layer: int) -> ir.Value:
    """The hidden state before a layer of the tower, or behind its last one: what its two residual additions end in."""
    found = marks(model, "hidden")
    return found[layer].outputs[0] if layer in found else residual(residual(found[layer - 1].outputs[0]))


def residual(value: ir.Value) -> ir.Value:
    """The sum of a value and what a block made of it."""
    sums = [node for node, _ in value.uses() if node.op_type == "Add"]
    if len(sums) != 1:
        raise EdgecompError(f"this vision tower does not add what a block makes to {value.name}: it cannot be cut there; cut at the projector")
    return sums[0].outputs[0]
