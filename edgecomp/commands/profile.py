"""`edgecomp profile`: measure a bundle on this machine."""
from __future__ import annotations

import sys
from pathlib import Path

import click

from edgecomp.commands.options import BUNDLE, JSON, THREADS, columns, print_json, reading, say


@click.command("profile")
@BUNDLE
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="Write the HTML report here.")
@click.option("--plan", "plans", multiple=True, help="Only this budget. May be repeated. [default: all]")
@click.option("--data", type=click.Path(path_type=Path), help="Questions for the accuracy, as `eval` takes them.")
@reading
@click.option("--images", type=click.IntRange(min=1), help="Only the questions about the first so many pictures.")
@click.option("--image", type=click.Path(), help="The picture for the latency. [default: the first of --data]")
@click.option("--prompt", default="Describe the image.", show_default=True, help="The question for the latency.")
@click.option("--repeats", type=click.IntRange(min=1), default=7, show_default=True, help="Of the latency, after one to warm up.")
@THREADS
@JSON
def command(bundle: Path, out: Path | None, plans: tuple[str, ...], data: Path | None, layout: str | None, image_folder: Path | None,
            suffix: str | None, images: int | None, image: str | None, prompt: str, repeats: int, threads: int | None, as_json: bool) -> None:
    """Measure latency, peak memory and accuracy of BUNDLE's plans on this machine, beside random and pooled tokens.

    Every plan runs in a process of its own. All figures are measured.
    """
    from edgecomp.profiling import profile
    from edgecomp.report.page import losers, render
    if images is not None and data is None:
        raise click.UsageError("--images limits the questions of --data, and there is no --data")
    if out is not None and not out.parent.is_dir():
        raise click.UsageError(f"{out.parent} is not a folder")
    if out is not None and out.is_dir():
        raise click.UsageError(f"{out} is a folder, and the report is one file: name it, such as {out / 'report.html'}")
    result = profile(bundle, plans, image=image, prompt=prompt, data=data,
                     reading={"layout": layout, "image_folder": image_folder, "suffix": suffix}, images=images, repeats=repeats, threads=threads,
                     command=" ".join(["edgecomp", *sys.argv[1:]]), say=say)
    if out is not None:
        out.write_text(render(result), encoding="utf-8")
        say(f"the report is {out}")
    for plan, lost_to in losers(result["plans"]).items():
        if lost_to:
            say(f"warning: {plan} loses to {' and '.join(lost_to)} at its budget")
    if as_json:
        print_json(result)
        return
    rows = [("plan", "correct %", "vision ms", "prefill ms", "first token ms", "ms a token", "cache MiB", "peak MiB")]
    for plan in result["plans"]:
        took, memory = plan["latency"], plan["memory"]
        correct = f"{plan['accuracy']['all']:.1f}" if plan["accuracy"] else "-"
        rows.append((plan["name"], correct, *(f"{took[k]['median']:.2f}" for k in ("vision_ms", "prefill_ms", "first_token_ms", "per_token_ms")),
                     f"{memory['cache_bytes'] / 2**20:.1f}", f"{memory['peak_bytes'] / 2**20:.0f}"))
    click.echo(columns(rows))
