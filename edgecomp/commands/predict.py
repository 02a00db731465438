"""`edgecomp predict`: latency and memory of a model on a device, before anything is built."""
from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgecomp.commands.options import JSON, PLAN, columns, print_json
from edgecomp_runtime.errors import InputError

if TYPE_CHECKING:
    from edgecomp.predict.predict import Prediction

ROWS = {"vision_ms": "vision", "prefill_ms": "prefill", "ttft_ms": "to the first token", "tpot_ms": "each further token"}


@click.command("predict")
@click.argument("model", metavar="CONFIG_OR_MODEL", type=click.Path(path_type=Path))
@click.option("--device", "device_name", required=True, help="A device by its id, see `edgecomp devices`; ID@MODE in a power mode.")
@click.option("--engine", help="A kernel path by the name of its measurements, such as 'TensorRT Edge-LLM'. [default: what edgecomp builds]")
@click.option("--weights", help="How the decoder's weights are stored: fp16, int8, int4, nvfp4 ... [default: fp16, on a CPU fp32, or the model's]")
@click.option("--prompt-tokens", type=int, default=2048, show_default=True, help="Rows of the prompt as they enter, visual tokens among them.")
@click.option("--context", type=int, help="Rows in the window when a token is decoded, uncompressed. [default: the prompt's]")
@click.option("--visual-tokens", type=int, help="Visual tokens of all pictures in the prompt. [default: none, or the bundle's of one picture]")
@click.option("--keep", type=int, help="How many of the visual tokens go on. [default: all, or the plan's]")
@click.option("--cut-layer", type=int, default=0, show_default=True, help="The decoder layer before which the others go; 0 is the projector.")
@click.option("--batch", type=int, default=1, show_default=True, help="Sequences side by side.")
@PLAN
@JSON
def command(model: Path, device_name: str, engine: str | None, weights: str | None, prompt_tokens: int, context: int | None,
            visual_tokens: int | None, keep: int | None, cut_layer: int, batch: int, plan: str | None, as_json: bool) -> None:
    """Predict latency and memory of a config.json, a folder that has one, or a bundle, with 90 % intervals."""
    from edgecomp import devices
    from edgecomp.predict.model import Shape
    from edgecomp.predict.predict import Request, predict, read_config, weights_of
    device = devices.load(device_name)
    context = prompt_tokens if context is None else context
    if (model / "edgecomp.json").is_file():
        from edgecomp.predict.bundles import of_bundle
        from edgecomp_runtime import Bundle
        own = {"weights": weights, "keep": keep, "visual-tokens": visual_tokens, "cut-layer": cut_layer}
        if given := [name for name, value in own.items() if value]:
            raise InputError(f"--{given[0]} is not for a bundle, which has its own: choose a plan with --plan, or give a config.json")
        found = of_bundle(Bundle.open(model), plan, device, Request(prompt_tokens, context, batch=batch), engine)
    else:
        if plan:
            raise InputError(f"--plan {plan} is for a bundle: {model} is none")
        if cut_layer and keep is None:
            raise InputError(f"--cut-layer {cut_layer} without --keep: say how many visual tokens go on from there")
        request = Request(prompt_tokens, context, visual_tokens or 0, keep, cut_layer, batch)
        config = read_config(model)
        found = predict(Shape.of_config(config), device, request, weights=weights or weights_of(config, device), engine=engine)
    if as_json:
        print_json({key: value for key, value in {**dataclasses.asdict(found), "largest": found.largest}.items() if value is not None})
    else:
        click.echo(_text(found))


def _text(found: Prediction) -> str:
    rows: list[tuple[str, ...]] = [("predicted", "ms", "90 % interval", "constants")]
    for name, title in ROWS.items():
        if estimate := getattr(found, name):
            why = "" if name == "ttft_ms" else estimate.constants
            rows.append((title, f"{estimate.value:.1f}", f"{estimate.low:.1f} to {estimate.high:.1f}", why))
    speed, memory = found.decode_tokens_per_s, found.memory_bytes
    parts = ", ".join(f"{name} {_size(size)}" for name, size in found.memory_parts.items())
    lines = [f"decode  {speed.value:.1f} tokens a second (predicted; {speed.low:.1f} to {speed.high:.1f})"]
    if found.prefill_energy_j and found.energy_j_per_token:
        lines.append(f"energy  {found.prefill_energy_j.value:.3g} J to the first token, {found.energy_j_per_token.value:.3g} J for each further one "
                     f"(predicted; {found.energy_j_per_token.constants.rpartition(' x ')[0]})")
    lines.append(f"memory  {_size(memory.value)} (predicted; {_size(memory.low)} to {_size(memory.high)}): {parts}\n        {memory.constants}")
    return (f"{found.device}, {found.engine}, weights in {found.weights}; all numbers are predicted\n\n"
            f"{columns(rows, right=lambda column: 0 < column < 3)}\n\n" + "\n".join(lines) + "\n"
            f"{found.verdict.capitalize()}: {found.device} has {found.usable_bytes / 2**30:.2f} GiB beside its system; "
            + (found.way_out or f"the largest part is {found.largest}"))


def _size(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
