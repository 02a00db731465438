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
    from edgecomp.passes.signals import needs_prompt
    kinds = [method_type(name) for name in METHODS]
    asking = {k.name: [site for site, signals in k.taxonomy.sites.items() if needs_prompt(signals)] for k in kinds}
    if as_json:
        print_json([{"name": k.name, **dataclasses.asdict(k.taxonomy), "needs_prompt": asking[k.name], "parameters": parameters(k)} for k in kinds])
        return
    rows = [("method", "kind", "sites", "reads the prompt", "parameters", "keeps", "paper")]
    for kind in kinds:
        facts = kind.taxonomy
        defaults = ",".join(f"{name}={value}" for name, value in parameters(kind).items())
        rows.append((kind.name, facts.kind, ",".join(facts.sites), ",".join(asking[kind.name]) or "-", defaults or "-", facts.summary, facts.paper))
    click.echo(columns(rows, right=lambda column: False))
