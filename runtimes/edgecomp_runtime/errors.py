"""What can go wrong, said so that a person can act on it: what happened, the values, the way out."""
from __future__ import annotations

import difflib
from collections.abc import Iterable


class EdgecompError(Exception):
    """The root of every error that edgecomp raises on purpose. The CLI prints it as one line and exits 1."""


class BundleError(EdgecompError):
    """A bundle cannot be read or trusted: cut short, changed, of a newer schema, or with a path that leaves it."""


class InputError(EdgecompError):
    """An image, prompt or option of a call cannot be used."""


class UnknownNameError(EdgecompError):
    """A name that the user typed is not in the table it was looked up in."""

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        super().__init__(f"unknown {kind} {name!r}{hint} (known: {', '.join(known) or 'none'})")
