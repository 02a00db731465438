"""Options and output that several commands share."""
from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from edgecomp.compress import Recipe

BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
OUTPUT = click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="The bundle to write.")
PLAN = click.option("--plan", help="A budget of the bundle by name; see `edgecomp inspect`. The bundle's default if left out.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
BACKEND = click.option("--backend", default="auto", show_default=True, help="auto, onnxruntime or null.")
THREADS = click.option("--threads", type=click.IntRange(1, 1024), help="Threads an operator; one a core if left out.")
METHODS = click.option("--method", "methods", multiple=True, metavar="NAME[:PARAMETER=VALUE,...]",
                       help="A compression method, such as dart, or random:seed=1. May be repeated.")
KEEP = click.option("--keep", "keeps", multiple=True, metavar="K|P%",
                    help="Visual tokens of a picture that go on: a count, or a part such as 25%. May be repeated; each method gets each budget.")
POSITION = click.option("--position", type=click.Choice(["keep", "compact"]), default="keep", show_default=True,
                        help="Kept tokens stay at their places, or are numbered anew.")

PRECISION = click.option("--precision", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True, help="Of weights and arithmetic.")
CONTEXT = click.option("--context", type=click.IntRange(min=1),
                       help="Rows of the window, before compression. [default: 2048, or what the pictures need, or the model's]")


class _Tiles(click.IntRange):
    """At least 1; the 0 that --no-tiles stands for comes as a number."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == 0 else super().convert(value, param, ctx)


class _Size(click.ParamType):  # type: ignore[type-arg]
    """HEIGHTxWIDTH in pixels."""
    name = "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        height, _, width = str(value).lower().partition("x")
        if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
            self.fail(f"{value!r} is not HEIGHTxWIDTH in pixels, such as 480x640", param, ctx)
        return int(height), int(width)


def pictures(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options on pictures' geometry: `image_size`, `tiles` and `max_images`."""
    for option in (
        click.option("--max-images", type=click.IntRange(min=1), help="Pictures of a prompt at most. [default: what the window holds]"),
        click.option("--no-tiles", "tiles", flag_value=0, type=click.INT, help="The whole picture as one tile."),
        click.option("--tiles", type=_Tiles(min=1),
                     help="Tiles that a picture is cut into, beside its overview, for families that do. [default: the family's; shown first]"),
        click.option("--image-size", type=_Size(), help="Height x width that pictures are fitted to. [default: the model's; shown first]"),
    ):
        command = option(command)
    return command


def say(line: str) -> None:
    """Tells on stderr what is being done."""
    click.echo(line, err=True)


def print_json(data: Any) -> None:
    """Prints plain data or a dataclass as JSON."""
    click.echo(json.dumps(dataclasses.asdict(data) if dataclasses.is_dataclass(data) and not isinstance(data, type) else data, indent=1))


def progress(label: str, length: int) -> Any:
    """A progress bar on stderr, or on no terminal one line at the start."""
    return click.progressbar(length=length, label=label, file=sys.stderr)


def recipes(methods: tuple[str, ...], keeps: tuple[str, ...], position: str) -> list[Recipe]:
    """Each method with each budget. Raises UsageError where one is given without the other, or a position without either."""
    from edgecomp import methods as table
    from edgecomp.compress import Recipe
    if bool(methods) != bool(keeps):
        raise click.UsageError("--method and --keep go together: a method needs a budget, a budget a method; see `edgecomp methods`")
    if position != "keep" and not methods:
        raise click.UsageError(f"--position {position} is of the tokens that a method keeps, and there is no --method")
    made = []
    for spec in methods:
        name, _, rest = spec.partition(":")
        kind = table.method_type(name)
        parameters = dict(_parameter(spec, part) for part in rest.split(",") if part)
        made += [Recipe(table.make(kind.name, **parameters), keep, position=position) for keep in keeps]
    return made


def _parameter(spec: str, part: str) -> tuple[str, int]:
    name, _, value = part.partition("=")
    try:
        return name.strip(), int(value)
    except ValueError:
        raise click.UsageError(f"--method {spec}: {part!r} is not PARAMETER=WHOLE NUMBER") from None


def columns(rows: Sequence[tuple[str, ...]], right: Callable[[int], bool] = lambda column: column > 0) -> str:
    """Rows of cells as aligned text, columns to the right where they hold numbers."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(w) if right(n) else cell.ljust(w) for n, (cell, w) in enumerate(zip(row, widths))).rstrip() for row in rows)
