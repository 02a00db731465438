"""The compression methods: one module each, and the one table of them."""
from __future__ import annotations

import dataclasses
from typing import Any

from edgecomp.methods.base import Method
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.tables import look_up

METHODS = {
    # what every other has to beat
    "random": "edgecomp.methods.random:Random",
    "stride": "edgecomp.methods.stride:Stride",
    "grid": "edgecomp.methods.grid:Grid",
    "pool": "edgecomp.methods.pool:Pool",
    # what the vision tower looks at
    "cls": "edgecomp.methods.cls:Cls",
    "hiprune": "edgecomp.methods.hiprune:HiPrune",
    "vispruner": "edgecomp.methods.vispruner:VisPruner",
    "visionzip": "edgecomp.methods.visionzip:VisionZip",
    # what is unlike the rest
    "dart": "edgecomp.methods.dart:Dart",
    "divprune": "edgecomp.methods.divprune:DivPrune",
    "tome": "edgecomp.methods.tome:ToMe",
    # what the prompt asks for
    "cdpruner": "edgecomp.methods.cdpruner:CDPruner",
    "fastv": "edgecomp.methods.fastv:FastV",
    "pyramiddrop": "edgecomp.methods.pyramiddrop:PyramidDrop",
    "sparsevlm": "edgecomp.methods.sparsevlm:SparseVLM",
}


def method_type(name: str) -> type[Method]:
    """The class of a method. Raises UnknownNameError with the nearest name."""
    found: type[Method] = look_up("method", name, METHODS)
    return found


def make(name: str, **values: Any) -> Method:
    """A method with its parameters. Raises UnknownNameError, or EdgecompError for a parameter that it does not have."""
    kind = method_type(name)
    known = parameters(kind)
    for parameter in values:
        if parameter not in known:
            raise EdgecompError(f"method {name!r} has no parameter {parameter!r}"
                                + (f"; it has {', '.join(known)}" if known else " (it has none)"))
    return kind(**values)


def parameters(kind: type[Method]) -> dict[str, Any]:
    """A method's parameters and their defaults."""
    return {f.name: f.default for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
