"""Latency and memory of a model on a device that need not be at hand: each number predicted, with a 90 % interval and the constants it rests on."""
from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecomp.devices import RTX_CAPABILITIES, Device
from edgecomp.power_modes import not_published
from edgecomp.predict import efficiency
from edgecomp.predict.fits import judge
from edgecomp.predict.model import Shape
from edgecomp.predict.parts import on_a_cpu, parts_of
from edgecomp.predict.request import Request as Request  # part of what this module offers
from edgecomp.predict.share import Share, share_of
from edgecomp.predict.work import FORMATS, Work, work
from edgecomp_runtime.errors import EdgecompError, InputError, UnknownNameError

KIND = "predicted"
WITHIN = 0.1  # onnxruntime's memory on a CPU from a bundle: benchmarks/results/memory.md has it within 7.9 % on 51 plans
WITHIN_FROM_CONFIG = 0.15  # from a config alone: 14 of those plans are within 8 %


@dataclass(frozen=True)
class Estimate:
    """A predicted number, the ends of its 90 % interval, and what it rests on."""
    value: float
    low: float
    high: float
    constants: str
    kind: str = KIND


@dataclass(frozen=True)
class Prediction:
    """What a model will take on a device. ttft_ms is vision, choosing and prefill; tpot_ms one decode step, decode_tokens_per_s of all sequences.

    usable_bytes, verdict and way_out: see `edgecomp.predict.fits.Verdict`. prefill_energy_j is of all before the first token, energy_j_per_token
    of a further one: of devices in a power mode whose watts are known.
    """
    device: str
    engine: str
    weights: str
    vision_ms: Estimate | None
    prefill_ms: Estimate
    ttft_ms: Estimate
    tpot_ms: Estimate
    decode_tokens_per_s: Estimate
    memory_bytes: Estimate
    memory_parts: dict[str, float]
    usable_bytes: float
    verdict: str
    way_out: str = ""
    prefill_energy_j: Estimate | None = None
    energy_j_per_token: Estimate | None = None
    kind: str = KIND

    @property
    def largest(self) -> str:
        """The largest part of the memory."""
        return max(self.memory_parts, key=lambda part: self.memory_parts[part])


def default_engine(device: Device) -> str:
    """What edgecomp would run on a device: TensorRT on a Jetson, TensorRT for RTX on other GPUs that it builds for, onnxruntime on a CPU."""
    if device.gpu is None:
        return "onnxruntime"
    return "TensorRT for RTX" if device.family != "Jetson" and device.compute_capability in RTX_CAPABILITIES else "TensorRT"


def read_config(path: Path) -> dict[str, Any]:
    """The config.json at a path, or in the folder at it. Raises EdgecompError where there is none, or it is not one."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EdgecompError(f"{path}: no config.json there; give one, a folder that has one, or a bundle") from None
    except (ValueError, RecursionError) as error:
        raise EdgecompError(f"{file}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise EdgecompError(f"{file}: not a Hugging Face config, which is a JSON object")
    return config


def weights_of(config: dict[str, Any], device: Device) -> str:
    """The format of a checkpoint's decoder if nobody says otherwise: what GPTQ or AWQ made of it, else fp16, on a CPU fp32."""
    made = config.get("quantization_config")
    if isinstance(made, dict) and made.get("quant_method") in ("gptq", "awq") and made.get("bits") in (4, 8):
        return f"int{made['bits']}"
    return "fp16" if device.gpu else "fp32"


def predict(shape: Shape, device: Device, request: Request, *, weights: str = "fp16", engine: str | None = None) -> Prediction:
    """Predicts from a config's shape alone.

    Raises UnknownNameError for an engine or a format that is not there, InputError for a request that the model cannot take.
    """
    engine = default_engine(device) if engine is None else engine
    if engine not in efficiency.engines():
        raise UnknownNameError("engine", engine, efficiency.engines())
    if weights not in FORMATS:
        raise UnknownNameError("weight format", weights, FORMATS)
    if not shape.layers:
        raise EdgecompError(f"{shape.family} is a vision tower without a decoder: give the config.json of a language model")
    if request.visual_tokens and shape.tower is None:
        raise InputError(f"--visual-tokens {request.visual_tokens}, but {shape.family} has no vision tower: leave it out")
    if shape.context and request.context > shape.context:
        raise InputError(f"--context {request.context} exceeds the {shape.context} positions of the model: choose a smaller one")
    if request.cut_layer >= len(shape.layers):
        raise InputError(f"the cut is before layer {request.cut_layer}, but the decoder has {len(shape.layers)}: choose 0 to {len(shape.layers) - 1}")
    format_ = efficiency.stored(engine, weights)
    asked: dict[str, Any] = {"visual_tokens": request.visual_tokens, "keep": request.keep, "cut_layer": request.cut_layer, "batch": request.batch}
    counted = efficiency.counted_as(device, format_)
    works = {phase: work(shape, phase, prompt_tokens=request.prompt_tokens, context=request.context, weights=counted, **asked)
             for phase in ("vision", "selector", "prefill", "decode")}
    tower = FORMATS[counted].plain
    if device.gpu is None:
        parts = on_a_cpu(shape, request, counted)
        return of_works(works, device, request.batch, engine, format_, tower, parts, whole(parts, WITHIN_FROM_CONFIG))
    parts = parts_of(shape, request, format_, engine)
    again = parts["weights"] if any(layer.experts for layer in shape.layers) else 0.0
    return of_works(works, device, request.batch, engine, format_, tower, parts, share=share_of(device, engine, again))


def whole(parts: Mapping[str, float], within: float) -> Estimate:
    """Memory whose parts are known to so much, the engine's own among them: onnxruntime's on a CPU."""
    total = sum(parts.values())
    return Estimate(total, total * (1 - within), total * (1 + within), "peak resident memory under onnxruntime, as measured on x86-64")


def of_works(works: Mapping[str, Work], device: Device, batch: int, engine: str, weights: str, tower: str, parts: Mapping[str, float],
             memory: Estimate | None = None, share: Share | None = None) -> Prediction:
    """Predicts from the work of each phase and the parts of the memory, counted from a config or from a bundle's graphs.

    weights, tower: formats of the decoder and of the vision tower. memory: the whole of it, where the engine's own share is among the parts; else
    `share` is added, or what published peaks left.
    """
    saved = efficiency.calibrated(device, engine)
    lacking = not_published(device.mode) if device.mode else []
    at_best = f"; at best, for {' and '.join(lacking)} of the power mode are not published" if lacking else ""

    def time(phase: str, format_: str) -> Estimate:
        known = efficiency.constants(phase, device, engine, format_, saved)
        took = 1000 * efficiency.seconds(known.values, efficiency.terms(works[phase], device, phase, engine, batch))
        return Estimate(took, took * math.exp(-known.spread), took * math.exp(known.spread), known.of + at_best)

    vision = time("vision", tower) if works["vision"].flops else None
    prefill, step = time("prefill", weights), time("decode", weights)
    choosing = 1000 * sum(count / efficiency.peak(device, precision) for precision, count in works["selector"].flops.items())
    first = [prefill, *([vision] if vision else [])]
    took = sum(each.value for each in first) + choosing
    # errors of vision and prefill need not go together: their widths add as squares
    down, up = (math.hypot(*(each.value - each.low for each in first)), math.hypot(*(each.high - each.value for each in first)))
    ttft = Estimate(took, took - down, took + up, "; ".join(each.constants for each in first))
    if memory is None:
        share, used = share or share_of(device, engine), sum(parts.values())
        parts, memory = {**parts, "runtime": share.value}, Estimate(used + share.value, used + share.low, used + share.high, share.of)
    fits = judge(parts, device, memory.low, memory.high)
    return Prediction(device.label, engine, weights, vision, prefill, ttft, step,
                      Estimate(1000 * batch / step.value, 1000 * batch / step.high, 1000 * batch / step.low, step.constants), memory,
                      dict(parts), fits.usable_bytes, fits.verdict, fits.way_out, _energy(device, ttft, 1, "ttft_ms"),
                      _energy(device, step, batch, "tpot_ms"))


def _energy(device: Device, took: Estimate, tokens: int, name: str) -> Estimate | None:
    """Joules that a power mode lets through in a time, for each of so many tokens. The module may take less: its mode is a cap."""
    if device.mode is None or device.mode.watts is None:
        return None
    watts = device.mode.watts
    value, low, high = (watts * each / 1000 / tokens for each in (took.value, took.low, took.high))
    return Estimate(value, low, high, f"at most: all of the {watts:g} W of power mode {device.mode.name} x {name}")
