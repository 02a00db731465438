"""`edgecomp compress`: more budgets for a bundle."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgecomp.commands.options import BUNDLE, OUTPUT, compression, say

if TYPE_CHECKING:
    from edgecomp.compress import Recipe


@click.command("compress")
@BUNDLE
@OUTPUT
@compression
def command(bundle: Path, out: Path, recipes: list[Recipe]) -> None:
    """Write BUNDLE again with a plan for each method and budget, and one of all steps, lowered for ONNX Runtime. Weights are shared, not copied.

    OUTPUT may be BUNDLE itself.
    """
    from edgecomp.compress import compress
    names = compress(bundle, out, recipes, say=say)
    say(f"{out} is ready" + (f", with the new plans {', '.join(names)}" if names else ""))
