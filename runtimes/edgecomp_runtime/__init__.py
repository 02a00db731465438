"""edgecomp_runtime: what goes on the device. Opens a compiled bundle and answers questions about images.

    from edgecomp_runtime import Bundle, Session
    session = Session(Bundle.open("BUNDLE"))
    for piece in session.generate("What does the sign say?", images=["street.jpg"]):
        print(piece, end="", flush=True)
"""
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgecomp_runtime.bundle import Bundle
    from edgecomp_runtime.errors import BundleError, EdgecompError, InputError, UnknownNameError
    from edgecomp_runtime.generation import Generation, Statistics
    from edgecomp_runtime.sampling import Sampling
    from edgecomp_runtime.session import Session

__all__ = ["Bundle", "BundleError", "EdgecompError", "Generation", "InputError", "Sampling", "Session", "Statistics", "UnknownNameError"]

_WHERE = {"Bundle": "bundle", "Sampling": "sampling", "Generation": "generation", "Session": "session", "Statistics": "generation"}


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first used: `edgecomp --help` needs none of numpy, pillow, tokenizers."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE.get(name, 'errors')}"), name)
