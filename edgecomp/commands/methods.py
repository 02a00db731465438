"""`edgecomp methods`: what compression there is."""
from __future__ import annotations

import dataclasses

import click

from edgecomp.commands.options import JSON, columns, print_json


@click.command("methods")
@JSON
def command(as_json: bool) -> None:
    """List the compression methods: what each keeps, where it can stand, what it needs, its paper."""
    from edgecomp.methods import METHODS, method_type, parameters
    kinds = [method_type(name) for name in METHODS]
    if as_json:
        print_json([{"name": k.name, **dataclasses.asdict(k.taxonomy), "parameters": parameters(k)} for k in kinds])
        return
    rows = [("method", "kind", "sites", "parameters", "keeps", "paper")]
    for kind in kinds:
        facts = kind.taxonomy
        defaults = ",".join(f"{name}={value}" for name, value in parameters(kind).items())
        rows.append((kind.name, facts.kind, ",".join(facts.sites), defaults or "-", facts.summary, facts.paper))
    click.echo(columns(rows, right=lambda column: False))
