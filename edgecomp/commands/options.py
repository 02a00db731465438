"""Options and output that several commands share."""
from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from edgecomp.compress import Recipe
    from edgecomp.methods.base import Method
    from edgecomp.quantize.subset import Calibration

BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
OUTPUT = click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="The bundle to write.")
PLAN = click.option("--plan", help="A budget of the bundle by name; see `edgecomp inspect`. The bundle's default if left out.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
BACKEND = click.option("--backend", default="auto", show_default=True, help="auto, onnxruntime, onnxruntime-cuda, tensorrt, tensorrt-rtx or null.")
THREADS = click.option("--threads", type=click.IntRange(1, 1024), help="Threads an operator; one a core if left out.")
METHODS = click.option("--method", "methods", multiple=True, metavar="NAME[:PARAMETER=VALUE,...]",
                       help="A compression method, such as dart, or random:seed=1. May be repeated.")
KEEP = click.option("--keep", "keeps", multiple=True, metavar="K|P%",
                    help="Visual tokens of a picture that go on: a count, or a part such as 25%. May be repeated; each method gets each budget.")


class Pair(click.ParamType):  # type: ignore[type-arg]
    """Two whole numbers with an x between them."""

    def __init__(self, name: str, what: str):
        self.name, self._what = name, what

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        first, _, second = str(value).lower().partition("x")
        if not (first.isdecimal() and second.isdecimal() and int(first) and int(second)):
            self.fail(f"{value!r} is not {self._what}", param, ctx)
        return int(first), int(second)


SITE = click.option("--site", default="", metavar="encoder:L|projector|decoder:L",
                    help="Where --method stands: before a layer of the vision tower, behind it, or in the decoder. [default: the method's]")
WINDOWS = click.option("--windows", type=Pair("RxC", "ROWSxCOLUMNS of windows, such as 4x4"),
                       help="Give each of R x C windows of a picture the same share of the budget.")
STEPS = click.option("--step", "steps", multiple=True, metavar="METHOD:SITE[:LAYER]:K|P%[:PARAMETER=VALUE,...]",
                     help="One step of a plan of several, such as pool:projector:144 and fastv:decoder:2:64. May be repeated; all make one plan.")
POSITION = click.option("--position", type=click.Choice(["keep", "compact"]), default="keep", show_default=True,
                        help="Kept tokens stay at their places, or are numbered anew.")

PRECISION = click.option("--precision", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True, help="Of weights and arithmetic.")
CONTEXT = click.option("--context", type=click.IntRange(min=1),
                       help="Rows of the window, before compression. [default: 2048, or what the pictures need, or the model's]")


def quantization(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options on weights in fewer bits, `weights`, `block` and `unquantized`, and on the vision tower in whole numbers, `calibration`."""
    @functools.wraps(command)
    def checked(weights: str | None, block: int | None, unquantized: tuple[str, ...], activations: str | None, pictures: Path | None,
                number: int | None, choice: str | None, seed: int | None, **rest: Any) -> Any:
        from edgecomp.quantize.rule import BLOCK
        given = {"images": number, "choice": choice, "seed": seed}
        calibration = _calibration(activations, pictures, {name: value for name, value in given.items() if value is not None})
        if block is not None and weights is None:
            raise click.UsageError("--block goes with --weights")
        if unquantized and weights is None and calibration is None:
            raise click.UsageError("--unquantized goes with --weights or --activations")
        return command(weights=weights, block=BLOCK if block is None else block, unquantized=unquantized, calibration=calibration, **rest)
    wrapped: Callable[..., Any] = checked
    for option in (
        click.option("--calibration-seed", "seed", type=click.INT, help="Of what is drawn. [default: 0]"),
        click.option("--calibration-choice", "choice", metavar="random|cover",
                     help="'random', or 'cover': pictures that together have what stands out in any, for which the tower is run on up to 16 times "
                          "as many. [default: random]"),
        click.option("--calibration-images", "number", type=click.IntRange(min=1), help="Pictures to calibrate on. [default: 32]"),
        click.option("--calibration", "pictures", type=click.Path(path_type=Path),
                     help="With --activations: a folder of pictures such as the model will see, on which each plan's vision graph is run."),
        click.option("--activations", metavar="int8",
                     help="The vision tower's products in int8: weights, and what enters them, with scales from --calibration. Measured as faster on "
                          "a CPU with AVX-512 VNNI; --backend onnxruntime-cuda leaves them to the CPU."),
        click.option("--unquantized", multiple=True, metavar="PATTERN",
                     help="With --weights or --activations: names of weights that stay as they are, such as 'lm_head.*' or '*.layers.0.*'. May be "
                          "repeated."),
        click.option("--block", type=click.INT, help="With --weights: numbers of a row that share a scale. [default: 32]"),
        click.option("--weights", metavar="int8|int4", help="The decoder's weights in blocks of whole numbers; int4 has the head in int8."),
    ):
        wrapped = option(wrapped)
    return wrapped


def _calibration(activations: str | None, folder: Path | None, rest: dict[str, Any]) -> Calibration | None:
    if activations is None:
        if folder is not None or rest:
            raise click.UsageError("--calibration and its choices go with --activations int8")
        return None
    from edgecomp.quantize.subset import Calibration
    from edgecomp_runtime.errors import UnknownNameError
    if activations != "int8":
        raise UnknownNameError("precision of activations", activations, ["int8"])
    if folder is None:
        raise click.UsageError("--activations int8 needs --calibration, a folder of pictures such as the model will see")
    return Calibration(folder, **rest)


class _Tiles(click.IntRange):
    """At least 1; the 0 that --no-tiles stands for comes as a number."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == 0 else super().convert(value, param, ctx)


def pictures(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options on pictures' geometry: `image_size`, `tiles` and `max_images`."""
    for option in (
        click.option("--max-images", type=click.IntRange(min=1), help="Pictures of a prompt at most. [default: what the window holds]"),
        click.option("--no-tiles", "tiles", flag_value=0, type=click.INT, help="The whole picture as one tile."),
        click.option("--tiles", type=_Tiles(min=1),
                     help="Tiles that a picture is cut into, beside its overview, for families that do. [default: the family's; shown first]"),
        click.option("--image-size", type=Pair("HxW", "HEIGHTxWIDTH in pixels, such as 480x640"),
                     help="Height x width that pictures are fitted to. [default: the model's; shown first]"),
    ):
        command = option(command)
    return command


def reading(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options on how --data is read: `layout`, `image_folder` and `suffix`."""
    for option in (
        click.option("--suffix", help="What to put behind each question, on a line of its own; '' is nothing. [default: of the benchmarks, "
                                      "\"Answer the question using a single word or phrase.\"]"),
        click.option("--image-folder", type=click.Path(path_type=Path), help="Where the questions' pictures are. [default: beside the file]"),
        click.option("--layout", help="jsonl, pope, textvqa, docvqa or gqa. [default: told from the file's keys]"),
    ):
        command = option(command)
    return command


def say(line: str) -> None:
    """Tells on stderr what is being done."""
    click.echo(line, err=True)


def print_json(data: Any) -> None:
    """Prints plain data or a dataclass as JSON."""
    click.echo(json.dumps(dataclasses.asdict(data) if dataclasses.is_dataclass(data) and not isinstance(data, type) else data, indent=1))


def progress(label: str, length: int, eta: bool = True) -> Any:
    """A progress bar on stderr, or on no terminal one line at the start. eta: steps take about as long as each other."""
    return click.progressbar(length=length, label=label, show_eta=eta, file=sys.stderr)


def compression(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options on what to compress, as the argument `recipes`."""
    @functools.wraps(command)
    def with_recipes(methods: tuple[str, ...], keeps: tuple[str, ...], site: str, windows: tuple[int, int] | None, steps: tuple[str, ...],
                     position: str, **rest: Any) -> Any:
        return command(recipes=recipes(methods, keeps, site, windows, steps, position), **rest)
    wrapped: Callable[..., Any] = with_recipes
    for option in (POSITION, STEPS, WINDOWS, SITE, KEEP, METHODS):
        wrapped = option(wrapped)
    return wrapped


def recipes(methods: tuple[str, ...], keeps: tuple[str, ...], site: str, windows: tuple[int, int] | None, steps: tuple[str, ...],
            position: str) -> list[Recipe]:
    """Each method with each budget at the site, and the steps as one plan. Raises UsageError where options contradict each other."""
    from edgecomp.compress import Recipe, Stage
    if bool(methods) != bool(keeps):
        raise click.UsageError("--method and --keep go together: a method needs a budget, a budget a method; see `edgecomp methods`")
    if not methods and site:
        raise click.UsageError(f"--site {site} is of a --method, and there is none; a --step names its own site")
    for name, value, used in (("position", position != "keep", methods or steps), ("windows", windows, methods or steps)):
        if value and not used:
            raise click.UsageError(f"--{name} is of the tokens that a method keeps, and there is no --method")
    made = [Recipe.of(method(spec), keep, site, position, windows) for spec in methods for keep in keeps]
    if steps:
        made.append(Recipe(tuple(Stage(*_step(spec), windows if n == 0 else None) for n, spec in enumerate(steps)), position))
    return made


def method(spec: str, where: str = "") -> Method:
    """'dart' or 'random:seed=1' as a method; `where` that was said, for errors."""
    from edgecomp import methods as table
    name, _, rest = spec.partition(":")
    kind = table.method_type(name)
    return table.make(kind.name, **dict(_parameter(where or f"--method {spec}", part) for part in rest.split(",") if part))


def _step(spec: str) -> tuple[Method, str, str]:
    """'fastv:decoder:2:64' or 'random:projector:64:seed=1' as method, budget and site."""
    name, _, rest = spec.partition(":")
    kind, _, rest = rest.partition(":")
    first, _, rest = rest.partition(":")
    layer, keep, parameters = ("", first, rest)
    if kind != "projector":
        layer, (keep, _, parameters) = f":{first}", rest.partition(":")
    if not keep:
        raise click.UsageError(f"--step {spec}: not METHOD:projector:K or METHOD:encoder|decoder:LAYER:K, such as fastv:decoder:2:64")
    return method(f"{name}:{parameters}", f"--step {spec}"), keep, f"{kind}{layer}"


def _parameter(where: str, part: str) -> tuple[str, float]:
    name, _, value = part.partition("=")
    try:
        return name.strip(), int(value) if value.strip().lstrip("-").isdecimal() else float(value)
    except ValueError:
        raise click.UsageError(f"{where}: {part!r} is not PARAMETER=NUMBER") from None


def columns(rows: Sequence[tuple[str, ...]], right: Callable[[int], bool] = lambda column: column > 0) -> str:
    """Rows of cells as aligned text, columns to the right where they hold numbers."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(w) if right(n) else cell.ljust(w) for n, (cell, w) in enumerate(zip(row, widths))).rstrip() for row in rows)
