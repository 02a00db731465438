"""`edgecomp show`: what a plan keeps of a picture."""
from __future__ import annotations

from pathlib import Path

import click

from edgecomp.commands.options import BACKEND, BUNDLE, PLAN, THREADS, say


@click.command("show")
@BUNDLE
@click.option("--image", required=True, type=click.Path(), help="The picture.")
@click.option("--prompt", default="Describe the image.", show_default=True, help="For methods that read the question.")
@PLAN
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="Draw on the picture: a PNG to write.")
@click.option("--ascii", "as_text", is_flag=True, help="Print a raster: # went on, . was dropped.")
@BACKEND
@THREADS
def command(bundle: Path, image: str, prompt: str, plan: str | None, out: Path | None, as_text: bool, backend: str, threads: int | None) -> None:
    """Draw which visual tokens of a picture a plan of BUNDLE keeps, step by step.

    \b
    edgecomp show BUNDLE --image street.jpg --plan cls-64 -o kept.png
    """
    from edgecomp.show import draw, rasters
    from edgecomp_runtime import Bundle, Session
    if out is None and not as_text:
        raise click.UsageError("nowhere to draw: give -o PICTURE.png, or --ascii")
    if out is not None and (out.suffix.lower() != ".png" or out.is_dir()):
        raise click.UsageError(f"{out} does not end in .png" if out.suffix.lower() != ".png" else f"{out} is a folder")
    if out is not None and not out.parent.is_dir():
        raise click.UsageError(f"{out.parent} is not a folder")
    session = Session(Bundle.open(bundle), plan=plan, backend=backend, threads=threads)
    if as_text:
        click.echo(rasters(session, image, prompt))
    if out is not None:
        draw(session, image, prompt).save(out)
        say(f"the picture is {out}")
