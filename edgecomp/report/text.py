"""The report as Markdown: the sentences and tables of the page, for a README, an issue or a terminal."""
from __future__ import annotations

import re
from typing import Any

from edgecomp.report import devices
from edgecomp.report.contents import Contents
from edgecomp.report.formats import KINDS
from edgecomp.report.tables import LOSES, Cell, Column, Row, Table


def markdown(result: dict[str, Any]) -> str:
    """What `edgecomp profile` measured and predicted, as GitHub's Markdown. The kind of its numbers is in the heading of each column."""
    found, machine = Contents.of(result), result["machine"]
    parts = [f"# {_line(found.title)}",
             _line(f"Measured on {machine['cpu']}, {machine['cores']} core{'' if machine['cores'] == 1 else 's'}, {machine['backend']}, "
                   f"{result['created']}, by `{result['command']}`."), _line(found.verdict_text)]
    parts += [_line(found.device_text)] * bool(found.device_text)
    for title, names in SECTIONS.items():
        if shown := [found.tables[name] for name in names if name in found.tables and found.tables[name].bodies and found.tables[name].columns]:
            parts += [f"## {title}", *map(table, shown)]
            parts += [_list(found.reasons)] * (title == "What fits where" and bool(found.reasons))
            parts += [_list(found.warnings.values())] * (title == "Accuracy by budget" and bool(found.warnings))
    if found.devices:
        parts += ["## Where the numbers of the devices are from", _list(map(_origin, found.devices))]
    used = {kind for made in found.tables.values() for kind in made.kinds}
    parts += ["## What the words mean", _list(f"{kind}: {text}" for kind, text in KINDS.items() if kind in used)]
    return "\n\n".join(parts) + "\n"


SECTIONS = {"At a glance": ["glance"], "What fits where": ["fits"], "Latency by phase on each device": ["device-times"],
            "Rooflines": ["rooflines"], "Predicted against measured, on this machine": ["errors", "compared"],
            "What the devices have": ["profiles"],
            "Bits and tokens": ["joint", "bundles"], "Accuracy by budget": ["accuracy", "tasks"], "Latency by phase": ["latency"],
            "Clocks, power and temperature": ["gauges"], "Memory by part": ["memory"], "Token counts": ["counts"]}


def table(made: Table) -> str:
    """A table with its caption above; rows under a title have it in a column of their own."""
    head = [*[made.group] * bool(made.group), made.first, *map(_heading, made.columns)]
    right = [*[False] * (2 if made.group else 1), *(bool(column.kind) for column in made.columns)]
    rows = [[*[body.title] * bool(made.group), _name(row), *map(_cell, row.cells)] for body in made.bodies for row in body.rows]
    lines = [head, ["---:" if each else "---" for each in right], *rows]
    return f"{_line(made.caption)}\n\n" + "\n".join(f"| {' | '.join(_line(text).replace('|', chr(92) + '|') for text in line)} |" for line in lines)


def _heading(column: Column) -> str:
    return " ".join([column.title, *(f"({said})" for said in (column.about, column.kind) if said)])


def _name(row: Row) -> str:
    return f"{row.name} ({row.about})" if row.about else row.name


def _cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.best else cell.text
    return " ".join(filter(None, (text, cell.below and f"({cell.below})", cell.at, *(f"{LOSES} {name}" for name in cell.flags))))


def _origin(device: devices.Target) -> str:
    facts = device.facts
    said = [f"**{device.name}** (`{facts['id']}`): predicted from {'; '.join(devices.rests_on(device)) or 'nothing'}"]
    said += [f"calibrated on {facts['calibrated']}"] * bool(facts["calibrated"])
    said += [f"uncertain: {', '.join(facts['uncertain'])}"] * bool(facts["uncertain"])
    return f"{'. '.join(said)}. Sources: {'; '.join(dict.fromkeys(facts['sources'])) or 'none are named'}."


def _list(lines: Any) -> str:
    return "\n".join(f"- {_line(line)}" for line in lines)


def _line(text: str) -> str:
    """In one line, and no HTML: what a name or an answer brings along stays text."""
    return re.sub(r"<(?=[\w/!?])", r"\\<", " ".join(text.split()))
