"""The compression methods: one module each, and the one table of them."""
from __future__ import annotations

import dataclasses
from typing import Any

from edgecomp.methods.base import Method
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.tables import look_up

METHODS = {
    "random": "edgecomp.methods.random:Random",
    "stride": "edgecomp.methods.stride:Stride",
    "pool": "edgecomp.methods.pool:Pool",
    "cls": "edgecomp.methods.cls:Cls",
    "dart": "edgecomp.methods.dart:Dart",
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
