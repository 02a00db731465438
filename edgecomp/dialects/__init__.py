"""Neutral graphs to what one backend takes: one module a backend, each with `lower(model)`, edited in place."""
from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from edgecomp_runtime.tables import look_up

DIALECTS = {"onnxruntime": "edgecomp.dialects.onnxruntime:lower"}


def lowering(dialect: str) -> Callable[[ir.Model], None]:
    """The `lower` function of a dialect. Raises UnknownNameError."""
    function: Callable[[ir.Model], None] = look_up("dialect", dialect, DIALECTS)
    return function
