"""`edgecomp predict`: latency and memory of a model on a device, before anything is built."""
from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgecomp.commands.options import JSON, PLAN, columns, print_json
from edgecomp_runtime.errors import InputError

if TYPE_CHECKING:
    from edgecomp.devices import Device
    from edgecomp.predict.predict import Prediction, Request
    from edgecomp_runtime import Bundle

WITHIN = 0.1  # onnxruntime's memory: benchmarks/results/memory.md has it within 6.7 % on 23 plans
ROWS = {"vision_ms": "vision", "prefill_ms": "prefill", "ttft_ms": "to the first token", "tpot_ms": "each further token"}


@click.command("predict")
@click.argument("model", metavar="CONFIG_OR_MODEL", type=click.Path(path_type=Path))
@click.option("--device", "device_name", required=True, help="A device by its id; see `edgecomp devices`.")
@click.option("--engine", help="A kernel path by the name of its measurements, such as 'TensorRT Edge-LLM'. [default: what edgecomp builds]")
@click.option("--weights", help="How the decoder's weights are stored: fp16, int8, int4, nvfp4 ... [default: fp16, or the bundle's]")
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
    from edgecomp.predict.predict import Request, predict, read_config
    device = devices.load(device_name)
    context = prompt_tokens if context is None else context
    if (model / "edgecomp.json").is_file():
        own = {"weights": weights, "keep": keep, "visual-tokens": visual_tokens, "cut-layer": cut_layer}
        if given := [name for name, value in own.items() if value]:
            raise InputError(f"--{given[0]} is not for a bundle, which has its own: choose a plan with --plan, or give a config.json")
        if device.gpu is None and engine in (None, "onnxruntime"):
            _memory_alone(model, plan, device, prompt_tokens, as_json)
            return
        found = _of_bundle(model, plan, device, Request(prompt_tokens, context, batch=batch), engine)
    else:
        if plan:
            raise InputError(f"--plan {plan} is for a bundle: {model} is none")
        request = Request(prompt_tokens, context, visual_tokens or 0, keep, cut_layer, batch)
        found = predict(Shape.of_config(read_config(model)), device, request, weights=weights or "fp16", engine=engine)
    if as_json:
        print_json({key: value for key, value in dataclasses.asdict(found).items() if value is not None})
    else:
        click.echo(_text(found))


def _memory_alone(path: Path, plan: str | None, device: Device, prompt_tokens: int, as_json: bool) -> None:
    """Of a bundle on a CPU: what it takes under onnxruntime, and whether it fits. Times are not predicted, for no CPU was measured."""
    from edgecomp.predict.fits import judge
    from edgecomp.predict.memory import memory_of
    from edgecomp.predict.predict import Estimate
    from edgecomp_runtime import Bundle
    bundle = Bundle.open(path)
    parts = memory_of(bundle, bundle.plan(plan)[0], text_rows=_text_rows(bundle, prompt_tokens))
    found, needed = judge(parts, device), sum(parts.values())
    memory = Estimate(needed, needed * (1 - WITHIN), needed * (1 + WITHIN), "onnxruntime on x86-64")
    if as_json:
        print_json({"device": device.id, "engine": "onnxruntime", "memory_bytes": dataclasses.asdict(memory), "memory_parts": parts,
                    "verdict": found.verdict, "way_out": found.way_out, "kind": memory.kind})
        return
    shares = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in parts.items())
    click.echo(f"{device.id}, onnxruntime; all numbers are predicted, times are not: no CPU was measured to predict them from\n\n"
               f"memory  {needed / 2**20:.0f} MiB (predicted; {memory.low / 2**20:.0f} to {memory.high / 2**20:.0f}): {shares}\n"
               f"{found.verdict.capitalize()}: {device.id} has {found.usable_bytes / 2**30:.2f} GiB in all; "
               f"the largest part is {found.largest}" + (f"; {found.way_out}" if found.way_out else ""))


def _text_rows(bundle: Bundle, prompt_tokens: int) -> int:
    """Rows of a prompt beside one picture's. Raises InputError where there are none."""
    visual = bundle.manifest.vision.tokens
    if prompt_tokens <= visual:
        raise InputError(f"--prompt-tokens {prompt_tokens} must hold the picture's {visual} visual tokens and text")
    return prompt_tokens - visual


def _of_bundle(path: Path, plan: str | None, device: Device, request: Request, engine: str | None) -> Prediction:
    """Counts the graphs of a bundle's plan."""
    from edgecomp.build.jobs import engine_weights
    from edgecomp.footprint import cache_bytes, weight_bytes
    from edgecomp.predict import efficiency
    from edgecomp.predict.graph import counted
    from edgecomp.predict.predict import default_engine, of_works
    from edgecomp.predict.work import Work
    from edgecomp_runtime import Bundle
    bundle = Bundle.open(path)
    manifest, (plan, info) = bundle.manifest, bundle.plan(plan)
    if request.batch != 1:
        raise InputError(f"--batch {request.batch}: a bundle's graphs are for one sequence; give a config.json for more")
    text_rows = _text_rows(bundle, request.prompt_tokens)
    if request.context > manifest.decoder.context:
        raise InputError(f"--context {request.context} exceeds the bundle's window of {manifest.decoder.context} rows: compile with --context")
    rows = request.context - (manifest.vision.tokens - info.visual_tokens)
    works = {phase: counted(bundle, plan, phase, text_rows=text_rows, context=rows) for phase in ("vision", "prefill", "decode")}
    engine = default_engine(device) if engine is None or device.gpu is None else engine
    held = weight_bytes(manifest) if engine == "onnxruntime" else engine_weights(bundle, info)
    parts = {"weights": float(held), "cache": float(cache_bytes(manifest, info))}
    # what choosing takes is in the graphs' own work
    return of_works({**works, "selector": Work({}, 0, 0, 0, 0, 0)}, device, 1, engine, efficiency.stored(engine, manifest.precision), parts)


def _text(found: Prediction) -> str:
    rows: list[tuple[str, ...]] = [("predicted", "ms", "90 % interval", "constants")]
    for name, title in ROWS.items():
        if estimate := getattr(found, name):
            why = "" if name == "ttft_ms" else estimate.constants
            rows.append((title, f"{estimate.value:.1f}", f"{estimate.low:.1f} to {estimate.high:.1f}", why))
    speed, memory = found.decode_tokens_per_s, found.memory_bytes
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in found.memory_parts.items())
    return (f"{found.device}, {found.engine}, weights in {found.weights}; all numbers are predicted\n\n"
            f"{columns(rows, right=lambda column: 0 < column < 3)}\n\n"
            f"decode  {speed.value:.1f} tokens a second (predicted; {speed.low:.1f} to {speed.high:.1f})\n"
            f"memory  {memory.value / 2**30:.2f} GiB (predicted; {memory.low / 2**30:.2f} to {memory.high / 2**30:.2f}): {parts}\n"
            f"{found.verdict.capitalize()}: {found.device} has {found.usable_bytes / 2**30:.2f} GiB beside its system; "
            f"the largest part is {found.largest}" + (f"; what helps: {found.way_out}" if found.way_out else ""))
