"""`edgecomp doctor`: what this machine can do."""
from __future__ import annotations

import click

from edgecomp.commands.options import JSON, print_json


@click.command("doctor")
@JSON
def command(as_json: bool) -> None:
    """Show what this machine can export, build and run, with versions, and what to install for the rest."""
    from edgecomp.doctor import examine
    found = examine()
    if as_json:
        print_json(found)
        return
    here = found["machine"]
    click.echo(f"{here['cpu']}, {here['cores']} cores, {here['memory_bytes'] / 2**30:.0f} GiB, Python {here['python']}")
    for name, ability in found["abilities"].items():
        versions = ", ".join(f"{p} {v or 'missing'}" for p, v in ability["packages"].items())
        click.echo(f"{'yes' if ability['ok'] else 'no ':3}  {name}: {versions}" + (f"\n     {ability['advice']}" if ability["advice"] else ""))
