"""`edgecomp compress`: more budgets for a bundle."""
from __future__ import annotations

from pathlib import Path

import click

from edgecomp.commands.options import BUNDLE, KEEP, METHODS, OUTPUT, POSITION, recipes, say


@click.command("compress")
@BUNDLE
@OUTPUT
@METHODS
@KEEP
@POSITION
def command(bundle: Path, out: Path, methods: tuple[str, ...], keeps: tuple[str, ...], position: str) -> None:
    """Write BUNDLE again with a plan for each method and budget, lowered for ONNX Runtime. Weights are shared, not copied.

    OUTPUT may be BUNDLE itself.
    """
    from edgecomp.compress import compress
    names = compress(bundle, out, recipes(methods, keeps, position), say=say)
    say(f"{out} is ready" + (f", with the new plans {', '.join(names)}" if names else ""))
