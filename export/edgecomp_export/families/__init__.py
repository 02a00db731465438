"""One module a Hugging Face `model_type`; the file's name is the type. The table is the only place that lists them."""
from __future__ import annotations

from edgecomp_export.families.base import Family
from edgecomp_runtime.tables import look_up

FAMILIES = {
    "llava": "edgecomp_export.families.llava:Llava",
}


def family_of(model_type: str) -> type[Family]:
    """The family class for a `model_type`. Raises UnknownNameError with what is known."""
    found: type[Family] = look_up("model family", model_type, FAMILIES)
    return found
