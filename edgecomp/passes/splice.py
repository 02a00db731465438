"""Putting a method at the end of the vision graph, behind the projector."""
from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from edgecomp.budget import Reduction
from edgecomp.ir.rewrite import dims
from edgecomp.passes.apply import Application, Applied, Signal
from edgecomp.passes.signals import vision_signals
from edgecomp.passes.tape import Tape, typed
from edgecomp_runtime.manifest import VisionInfo


def at_projector(model: ir.Model, vision: VisionInfo, step: Reduction, *, expose: bool = False) -> None:
    """Shortens the vision graph's visual tokens, in place; the graph gains the output `kept` [images, K].

    Deepstack features follow the kept tokens. Where an earlier step has shortened them, `kept` still names places of the whole picture.

    Args:
        model: the neutral vision graph.
        vision: the tower's facts.
        step: what to put in.
        expose: add what the rule saw and did as outputs: features, each signal, and for one part the order of choice.
    """
    outputs = {v.name or "": v for v in model.graph.outputs}
    features = outputs["visual_tokens"]
    stacked = {name: value for name, value in outputs.items() if name.startswith("deepstack")}
    names = step.method.signals("projector")
    signals = vision_signals(model, vision, names, vision.select_layer, step.tokens)
    images, _, width = dims(features)
    earlier = f"step{len(model.graph)}."
    work, keep = Application(model, step), step.keep
    applied = work(features, signals)
    followed = {name: work.follow(value, applied) for name, value in stacked.items()}
    kept = compose(model, applied.kept, keep)
    for name, value in {"features": features, **stacked}.items():
        value.name = f"{earlier}{name}"
    for name, value in followed.items():
        typed(value, name, features.dtype, [images, keep, width])
    model.graph.outputs[:] = [typed(applied.tokens, "visual_tokens", features.dtype, [images, keep, width]), kept, *followed.values()]
    if expose:
        expose_rule(model, applied, features, dict(zip(names, signals)))
    model.graph.sort()


def expose_rule(model: ir.Model, applied: Applied, features: ir.Value, signals: Mapping[str, Signal], suffix: str = "") -> None:
    """Makes what a rule saw and did results of the graph."""
    seen = {"features": features, **{name: signal.value for name, signal in signals.items()}}
    for name, value in {**seen, **({"order": applied.order} if applied.order is not None else {})}.items():
        value.name = name + suffix
        value.type = value.type or ir.TensorType(ir.DataType.INT64 if name == "order" else ir.DataType.FLOAT)
        model.graph.outputs.append(value)


def compose(model: ir.Model, kept: ir.Value, keep: int) -> ir.Value:
    """Makes the places [images, K] that a step keeps the graph's output `kept`, as places of the whole picture where a step went before."""
    before = next((v for v in model.graph.outputs if v.name == "kept"), None)
    if before is not None:
        before.name = f"step{len(model.graph)}.kept"
        model.graph.outputs.remove(before)
        kept = Tape(model).add("GatherElements", before, kept, axis=1)
    model.graph.outputs.append(typed(kept, "kept", ir.DataType.INT64, ["images", keep]))
    return kept
