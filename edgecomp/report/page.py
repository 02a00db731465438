"""The report page: what `edgecomp profile` measured and predicted, as one HTML text that opens offline.

Computing is in the modules of this folder, HTML in its templates.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from edgecomp.canvas import cells
from edgecomp.evaluate import normal
from edgecomp.report import bars, compared, device_chart, devices, formats, roofline, tables, tradeoff, words
from edgecomp.report.contents import Contents
from edgecomp.report.marks import looks
from edgecomp.report.phases import PHASES

ROOF_SHAPES = {"vision": "s0", "prefill": "s1", "decode": "s2"}


def bold(text: str) -> markupsafe.Markup:
    """Text as HTML, with what stands between two ** in bold."""
    parts = [str(markupsafe.escape(part)) for part in text.split("**")]
    return markupsafe.Markup("".join(f"<strong>{part}</strong>" if i % 2 else part for i, part in enumerate(parts)))


PAGES = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=jinja2.StrictUndefined,
                           trim_blocks=True, lstrip_blocks=True)
PAGES.filters.update(ms=formats.ms, size=formats.size, points=formats.points, number=formats.number, metric=formats.metric, bold=bold,
                     spoken=words.of_mark, spoken_device=words.of_device_mark, rests_on=devices.rests_on)


def render(result: dict[str, Any]) -> str:
    """The page of what `edgecomp profile` measured and predicted: one HTML text that loads nothing.

    The example's picture is laid over the whole token grid, so it has to be what the model saw, after any crop.
    """
    found = Contents.of(result)
    picture = formats.find(result, "example", "image") or ""
    return PAGES.get_template("page.html").render(
        result=result, title=found.title, names=words.names(result["bundles"]), plans=found.plans, marks=found.marks,
        budgets=found.budgets, looks=looks(found.marks), verdict=found.verdict, verdict_text=found.verdict_text,
        warnings=found.warnings, missing=found.missing, tables=found.tables,
        charts={axis: {name: tradeoff.chart(found.marks, axis, *sides) for name, sides in tradeoff.SIZES.items()} for axis in tradeoff.AXES},
        axes=tradeoff.AXES, phases=tables.PHASES, kinds=formats.KINDS, find=formats.find, normal=normal, cells=cells,
        picture=picture if picture.startswith("data:image/") else "",
        measured_bars={"first": bars.first_token(found.marks), "each": bars.each_token(found.marks), "memory": bars.memory(found.marks)},
        **_devices(found))


def _devices(found: Contents) -> dict[str, Any]:
    """What the sections about devices read."""
    few, those = found.few, found.devices
    return {
        "devices": those, "device_looks": {device.facts["id"]: device.look for device in those}, "device_text": found.device_text,
        "reasons": found.reasons, "few": few, "roofed_names": [mark.name for mark in found.roofed],
        "device_charts": {name: device_chart.device_chart(those, found.marks, few, *sides) for name, sides in device_chart.SIZES.items()},
        "device_bars": [(device, bars.predicted_first(device, shown), bars.predicted_each(device, shown)) for device in those
                        if (shown := [mark for mark in few if device.plan(mark)])],
        "roofs": roofline.rooflines(those, found.roofed),
        "phase_names": {phase: named.title for phase, named in PHASES.items()}, "phase_shapes": ROOF_SHAPES,
        "ratio_charts": {name: compared.ratio_chart(found.pairs, few, width) for name, width in compared.SIZES.items()},
        "here_calibrated": next((device.facts["calibrated"] for device in those if device.facts["here"]), None)}
