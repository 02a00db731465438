"""Plain JSON or TOML data into dataclasses, every field checked: what a manifest or a device profile says is what it is read as."""
from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Any

from edgecomp_runtime.errors import BundleError


def build(kind: Any, value: Any, where: str) -> Any:
    """Makes a value of a (possibly nested) type from plain JSON or TOML data. Raises BundleError naming the field that is off."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise BundleError(f"{where}: a table is expected, not {value!r:.60}")
        hints, fields = _hints(kind), {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
        if unknown := sorted(set(value) - set(fields)):
            raise BundleError(f"{where}: unknown field {', '.join(unknown)}")
        missing = [n for n, f in fields.items()
                   if n not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
        if missing:
            raise BundleError(f"{where}: missing field {', '.join(missing)}")
        return kind(**{n: build(hints[n], v, f"{where}: {n}") for n, v in value.items()})  # type: ignore[operator]
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) == len(value):
            return tuple(build(k, v, f"{where}[{n}]") for n, (k, v) in enumerate(zip(kinds, value)))
    elif origin is dict and isinstance(value, dict):
        return {k: build(arguments[1], v, f"{where}: {k}") for k, v in value.items()}
    elif origin in (types.UnionType, typing.Union):
        tables = [option for option in arguments if dataclasses.is_dataclass(option)]
        if isinstance(value, dict) and len(tables) == 1:
            return build(tables[0], value, where)  # so that what is off in it is named
        for option in arguments:
            try:
                return build(option, value, where)
            except BundleError:
                continue
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif origin is None and isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise BundleError(f"{where}: {value!r:.60} is not of the expected kind, {_kind(kind)}")


_hints = functools.cache(typing.get_type_hints)  # a manifest has thousands of tensors, and evaluating hints is slow


def _kind(kind: Any) -> str:
    """A type in words, as JSON and TOML have it."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return "a list" if arguments[-1] is Ellipsis else f"a list of {len(arguments)}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_kind, arguments))
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false", types.NoneType: "null"}.get(kind, "a table")
