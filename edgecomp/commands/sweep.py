"""`edgecomp sweep`: every method at every place."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgecomp import __version__
from edgecomp.commands.options import JSON, KEEP, METHODS, STEPS, Pair, columns, method, print_json, reading, recipes, say
from edgecomp_runtime.errors import EdgecompError

if TYPE_CHECKING:
    from edgecomp.compress import Recipe


class _Seeds(click.ParamType):  # type: ignore[type-arg]
    """Whole numbers with commas between them."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isdecimal() for part in parts):
            self.fail(f"{value!r} is not whole numbers such as 0,1,2", param, ctx)
        return tuple(dict.fromkeys(map(int, parts)))


@click.command("sweep")
@click.argument("model")
@click.option("-o", "--output", "folder", required=True, type=click.Path(path_type=Path, file_okay=False), help="The folder of the sweep.")
@METHODS
@KEEP
@click.option("--site", "sites", multiple=True, metavar="encoder:L|projector|decoder:L", help="Where methods stand. May be repeated. "
              "[default: each method's own]")
@click.option("--position", "positions", multiple=True, type=click.Choice(["keep", "compact"]), default=("keep",), show_default=True,
              help="Kept tokens stay at their places, or are numbered anew. May be repeated.")
@click.option("--windows", multiple=True, type=Pair("RxC", "ROWSxCOLUMNS of windows, such as 4x4"),
              help="Each of R x C windows of a picture gets the same share of the budget. May be repeated; 1x1 is none.")
@STEPS
@click.option("--seeds", type=_Seeds(), default="0,1,2", show_default=True, help="Of methods that have one, such as random.")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="The questions, as `eval` takes them.")
@reading
@click.option("--images", type=click.IntRange(min=1), help="Only the questions about the first so many pictures.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many questions.")
@click.option("--repeats", type=click.IntRange(min=0), default=7, show_default=True, help="Of the timings, after one to warm up; 0: no timings.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads an operator where times are taken; one a core if left out.")
@click.option("--jobs", type=click.IntRange(1, 1024), default=1, show_default=True,
              help="Processes that answer questions; with more than one each has one thread. Times are taken by one.")
@click.option("--prepare", is_flag=True, help="Only write the bundle and what is to be measured; `python -m edgecomp.sweep FOLDER` goes on.")
@JSON
def command(model: str, folder: Path, methods: tuple[str, ...], keeps: tuple[str, ...], sites: tuple[str, ...], positions: tuple[str, ...],
            windows: tuple[tuple[int, int], ...], steps: tuple[str, ...], seeds: tuple[int, ...], data: Path, layout: str | None,
            image_folder: Path | None, suffix: str | None, images: int | None, limit: int | None, repeats: int, threads: int | None, jobs: int,
            prepare: bool, as_json: bool) -> None:
    """Measure every combination of method, budget, site and position, beside random and pooled tokens at the same.

    MODEL is a checkpoint, which is exported once, or a bundle. FOLDER gets sweep.csv, sweep.json and report.html. The same command
    goes on where it was ended; what was measured of another model or with other questions is measured again. Combinations that
    cannot be made are listed and left out.

    \b
    edgecomp sweep BUNDLE -o sweep --method cls --method fastv --keep 64 --keep 25% --data questions.jsonl
    """
    from edgecomp.sweep.job import Job, data_hash
    from edgecomp.sweep.planning import Plans, make, neutral
    from edgecomp.sweep.running import go_on
    asked = _combinations(methods, keeps, sites, positions, windows, steps, seeds)
    job = Job(__version__, " ".join(["edgecomp", *sys.argv[1:]]), model, str(data.resolve()), layout,
              str(image_folder.resolve()) if image_folder else None, suffix, images, limit, repeats, ())
    data_hash(job.questions())  # what cannot be read is said before anything is made
    bundle = neutral(model, folder, say)
    plans = Plans(bundle.manifest, seeds)
    plans.add(asked)
    if len(plans.cells) == 1:
        raise EdgecompError(f"none of this can be made: {plans.skipped[0].combination}: {plans.skipped[0].reason}")
    make(bundle, plans, say, timed=repeats > 0)
    Job(**{**vars(job), "cells": tuple(plans.cells.values()), "skipped": tuple(plans.skipped)}).save(folder)
    for skipped in plans.skipped:
        say(f"left out: {skipped.combination}: {skipped.reason}")
    if prepare:
        say(f"{folder} is ready, with {len(plans.cells)} cells: `python -m edgecomp.sweep {folder}` measures them")
        return
    try:
        rows, failed = go_on(folder, jobs=jobs, threads=threads, say=say)
    except KeyboardInterrupt:
        raise click.exceptions.Exit(130) from None
    say(f"{folder / 'report.html'}, sweep.csv and sweep.json there have {len(rows)} rows")
    if as_json:
        print_json(rows)
    else:
        click.echo(columns(_lines(rows)))
    if failed:
        raise click.ClickException(f"{len(failed)} cells could not be measured: {', '.join(failed)}; the same command tries again")


def _combinations(methods: tuple[str, ...], keeps: tuple[str, ...], sites: tuple[str, ...], positions: tuple[str, ...],
                  windows: tuple[tuple[int, int], ...], steps: tuple[str, ...], seeds: tuple[int, ...]) -> list[Recipe]:
    """What the options ask for. Raises UsageError where they contradict each other, or ask for nothing."""
    from edgecomp.sweep.planning import combinations
    if bool(methods) != bool(keeps) or not (methods or steps):
        raise click.UsageError("a sweep needs at least one --method and one --keep, or --step; see `edgecomp methods`")
    if seeded := next((spec for spec in methods if "seed=" in spec), None):
        raise click.UsageError(f"--method {seeded}: seeds are given to all methods that have one, by --seeds")
    for name, value in (("site", sites), ("windows", windows)):
        if value and not methods:
            raise click.UsageError(f"--{name} is of a --method, and there is none")
    found = combinations([method(spec) for spec in methods], keeps, sites or ("",), list(dict.fromkeys(positions)), windows or (None,), seeds)
    return found + [recipe for position in dict.fromkeys(positions) if steps for recipe in recipes((), (), "", None, steps, position)]


def _lines(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    def number(value: float | None, digits: int = 2) -> str:
        return "-" if value is None else f"{value:.{digits}f}"
    lines: list[tuple[str, ...]] = [("method", "site", "tokens", "mean", "correct %", "vision ms", "prefill ms", "selector ms", "ms a token",
                                     "coverage", "entropy", "position", "loses to")]
    for row in rows:
        name = "full" if row["method"] == "none" else row["method"] + "".join(f" {k}={v}" for k, v in row["parameters"].items())
        times = [number(row[key] and row[key]["median"]) for key in ("vision_ms", "prefill_ms")]
        lines.append((name + (f" {row['windows']}" if row["windows"] else "") + (" compact" if row["position"] == "compact" else ""),
                      "+".join(row["sites"]) or "-", str(row["keep"]), number(row["tokens_mean"], 0), number(row["accuracy"], 1), *times,
                      number(row["selector_ms"]), number(row["decode_ms"] and row["decode_ms"]["median"]), number(row["coverage"]),
                      number(row["entropy"]), number(row["position_correlation"]), ", ".join(row["loses_to"])))
    return lines
