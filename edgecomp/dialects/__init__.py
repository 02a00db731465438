"""Neutral graphs to what one backend takes: one module a backend, each with `lower(model)`, edited in place."""
from __future__ import annotations

import importlib
from collections.abc import Callable

import onnx_ir as ir

from edgecomp_runtime.errors import UnknownNameError

DIALECTS = {"onnxruntime": "edgecomp.dialects.onnxruntime"}


def lowering(dialect: str) -> Callable[[ir.Model], None]:
    """The `lower` function of a dialect. Raises UnknownNameError."""
    if dialect not in DIALECTS:
        raise UnknownNameError("dialect", dialect, DIALECTS)
    function: Callable[[ir.Model], None] = importlib.import_module(DIALECTS[dialect]).lower
    return function
