"""`edgecomp doctor`: what this machine can do."""
from __future__ import annotations

import dataclasses

import click

from edgecomp.commands.options import JSON, print_json


@click.command("doctor")
@click.option("--device", help="Also what this device needs, against what there is here.")
@JSON
def command(device: str | None, as_json: bool) -> None:
    """Show what this machine can export, build and run, with versions, and what to install for the rest."""
    from edgecomp.doctor import examine
    found = examine()
    if device is not None:
        from edgecomp import devices
        from edgecomp.build.needs import needs
        wanted = devices.load(device)
        found["device"] = {"id": wanted.id, "needs": [dataclasses.asdict(need) for need in needs(wanted)]}
    if as_json:
        print_json(found)
        return
    here = found["machine"]
    click.echo(f"{here['cpu']}, {here['cores']} cores, {here['memory_bytes'] / 2**30:.0f} GiB, Python {here['python']}")
    for name, ability in found["abilities"].items():
        versions = ", ".join(f"{p} {v or 'missing'}" for p, v in ability["packages"].items())
        click.echo(f"{'yes' if ability['ok'] else 'no ':3}  {name}: {versions}" + (f"\n     {ability['advice']}" if ability["advice"] else ""))
    if device is not None:
        click.echo(f"\nfor {found['device']['id']}")
        for need in found["device"]["needs"]:
            click.echo(f"{'yes' if need['ok'] else 'no ':3}  {need['what']}: {need['found']}")
