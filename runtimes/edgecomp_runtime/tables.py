"""Tables of import paths: what exists is listed in one place, and imported when it is asked for."""
from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from edgecomp_runtime.errors import UnknownNameError


def look_up(kind: str, name: str, table: Mapping[str, str]) -> Any:
    """What a table's 'module:attribute' names. The name is looked up before anything is imported, so that a broken
    import is never taken for an unknown name. Raises UnknownNameError with the nearest name."""
    if name not in table:
        raise UnknownNameError(kind, name, table)
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
