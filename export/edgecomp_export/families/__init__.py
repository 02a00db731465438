"""One module a Hugging Face `model_type`; the file's name is the type. The table is the only place that lists them."""
from __future__ import annotations

import importlib

from edgecomp_export.families.base import Family
from edgecomp_runtime.errors import UnknownNameError

FAMILIES = {
    "llava": "edgecomp_export.families.llava:Llava",
}


def family_of(model_type: str) -> type[Family]:
    """The family class for a `model_type`. Raises UnknownNameError with what is known."""
    if model_type not in FAMILIES:
        raise UnknownNameError("model family", model_type, FAMILIES)
    module, _, name = FAMILIES[model_type].partition(":")
    found: type[Family] = getattr(importlib.import_module(module), name)
    return found
