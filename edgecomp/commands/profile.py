"""`edgecomp profile`: measure a bundle on this machine."""
from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from edgecomp.commands.options import JSON, THREADS, columns, print_json, reading, say


@click.command("profile")
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...", type=click.Path(path_type=Path))
@click.option("-o", "--output", "outs", multiple=True, type=click.Path(path_type=Path), metavar="FILE.html|.md|.json",
              help="Write the report here, in the form of its suffix. May be repeated.")
@click.option("--plan", "plans", multiple=True, help="Only this budget. May be repeated. [default: all]")
@click.option("--data", type=click.Path(path_type=Path), help="Questions for the accuracy, as `eval` takes them.")
@reading
@click.option("--images", type=click.IntRange(min=1), help="Only the questions about the first so many pictures.")
@click.option("--image", type=click.Path(), help="The picture for the latency. [default: the first of --data]")
@click.option("--prompt", default="Describe the image.", show_default=True, help="The question for the latency.")
@click.option("--repeats", type=click.IntRange(min=1), default=7, show_default=True, help="Of the latency, after one to warm up.")
@click.option("--device", "names", multiple=True, help="Add what is predicted for this device; see `edgecomp devices`. May be repeated.")
@click.option("--save", metavar="ID", help="Keep the times as the calibration of the device ID, which this machine is; a new one gets a profile.")
@THREADS
@JSON
def command(bundles: tuple[Path, ...], outs: tuple[Path, ...], plans: tuple[str, ...], data: Path | None, layout: str | None,
            image_folder: Path | None, suffix: str | None, images: int | None, image: str | None, prompt: str, repeats: int, names: tuple[str, ...],
            save: str | None, threads: int | None, as_json: bool) -> None:
    """Measure latency, peak memory and accuracy of BUNDLE's plans on this machine, beside random and pooled tokens, and predict devices.

    Every plan runs in a process of its own. All figures of this machine are measured but where predicted is said. Bundles of one model in
    different bits, as `edgecomp quantize` writes them, are compared with each other and held against the first one's full model.
    """
    from edgecomp import devices
    from edgecomp.profiling import profile
    from edgecomp.report.marks import losers
    if images is not None and data is None:
        raise click.UsageError("--images limits the questions of --data, and there is no --data")
    for out in outs:
        if out.is_dir():
            raise click.UsageError(f"{out} is a folder, and the report is one file: name it, such as {out / 'report.html'}")
        if not out.parent.is_dir():
            raise click.UsageError(f"{out.parent} is not a folder")
        if out.suffix not in FORMS:
            raise click.UsageError(f"{out}: a report ends in {', '.join(FORMS)}, which says its form")
    found = [devices.load(name) for name in dict.fromkeys(names)]
    result = profile(bundles, plans, image=image, prompt=prompt, data=data,
                     reading={"layout": layout, "image_folder": image_folder, "suffix": suffix}, images=images, repeats=repeats, threads=threads,
                     devices=found, save=save, command=" ".join(["edgecomp", *sys.argv[1:]]), say=say)
    for out in outs:
        out.write_text(FORMS[out.suffix](result), encoding="utf-8")
        say(f"the report is {out}")
    for plan, lost_to in losers(result["plans"]).items():
        if lost_to:
            say(f"warning: {plan} loses to {' and '.join(lost_to)} at its budget")
    if as_json:
        print_json(result)
    else:
        click.echo("\n\n".join(_text(result)))


def _html(result: dict[str, Any]) -> str:
    from edgecomp.report.page import render
    return render(result)


def _markdown(result: dict[str, Any]) -> str:
    from edgecomp.report.text import markdown
    return markdown(result)


FORMS: dict[str, Callable[[dict[str, Any]], str]] = {
    ".html": _html, ".md": _markdown, ".json": lambda result: json.dumps(result, indent=1) + "\n"}


def _text(result: dict[str, Any]) -> Iterator[str]:
    """The tables for a terminal: what was measured, what the gauges said, what is predicted. Further seeds cost what the first one does."""
    seeds = {plan["name"] for plan in result["plans"] if plan["parameters"].get("seed")}
    rows = [("measured", "correct %", "vision ms", "prefill ms", "first token ms", "ms a token", f"peak MiB ({result['plans'][0]['peak']['meter']})")]
    for plan in result["plans"]:
        took = plan["latency"]
        correct = f"{plan['accuracy']['all']:.1f}" if plan["accuracy"] else "-"
        rows.append((plan["name"], correct, *(f"{took[k]['median']:.2f}" for k in ("vision_ms", "prefill_ms", "first_token_ms", "per_token_ms")),
                     f"{plan['peak']['peak_bytes'] / 2**20:.0f}"))
    yield columns(rows)
    told = [(gauge["name"], *("-" if gauge[end] is None else f"{gauge[end]:.1f} {gauge['unit']}" for end in ("before", "after")))
            for gauge in result["machine"]["gauges"]]
    yield columns([("measured", "before", "after"), *told]) if told else "This system tells neither clocks nor power nor temperature."
    if off := [pair for pair in result["compared"] if pair["plan"] not in seeds]:
        yield columns([("this machine", "", "predicted", "90 % interval", "measured"), *map(_compared, off)], right=lambda column: column > 1)
    for device in result["devices"]:
        if not device["here"]:
            yield _device(device, seeds)


def _compared(pair: dict[str, Any]) -> tuple[str, ...]:
    scale, unit = (2**20, "peak MiB") if pair["phase"] == "peak_bytes" else (1, pair["phase"].replace("_", " "))
    value, low, high = (pair["predicted"][end] / scale for end in ("value", "low", "high"))
    return pair["plan"], unit, f"{value:.1f}", f"{low:.1f} to {high:.1f}", f"{pair['measured'] / scale:.1f}"


def _device(device: dict[str, Any], without: set[str]) -> str:
    """One device's predictions, but for some plans."""
    rows = [(f"predicted, {device['id']}", "first token ms", "90 % interval", "ms a token", "90 % interval", "memory MiB", "")]
    for name, plan in ((name, plan) for name, plan in device["plans"].items() if name not in without):
        if "refused" in plan:
            rows.append((name, "-", "-", "-", "-", "-", plan["refused"]))
        else:
            both = (plan["ttft_ms"], plan["tpot_ms"])
            times = [text for each in both for text in (f"{each['value']:.1f}", f"{each['low']:.1f} to {each['high']:.1f}")]
            rows.append((name, *times, f"{plan['memory_bytes']['value'] / 2**20:.0f}", plan["verdict"]))
    return columns(rows, right=lambda column: 0 < column < 6) + f"\n{device['engine']}, {device['weights']}" + (
        f"; calibrated on {device['calibrated']}" if device["calibrated"] else "")
