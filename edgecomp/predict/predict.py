"""Latency and memory of a model on a device that need not be at hand: each number predicted, with a 90 % interval and the constants it rests on."""
from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecomp.devices import RTX_CAPABILITIES, Device
from edgecomp.predict import efficiency
from edgecomp.predict.fits import kept_by_system, way_out
from edgecomp.predict.model import Shape
from edgecomp.predict.work import CACHE_BYTES, FORMATS, STATE_BYTES, Work, work
from edgecomp_runtime.errors import EdgecompError, InputError, UnknownNameError

KIND = "predicted"


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

    usable_bytes: what the device has beside its system. verdict: 'fits' (with all of the interval), 'tight' (with a part of it) or 'does
    not fit'; largest: the largest part of the memory.
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
    kind: str = KIND

    @property
    def largest(self) -> str:
        return max(self.memory_parts, key=lambda part: self.memory_parts[part])

    @property
    def way_out(self) -> str:
        """What would make it fit; '' where it does."""
        return "" if self.verdict == "fits" else way_out(self.largest)


@dataclass(frozen=True)
class Request:
    """What is asked of a model. Rows are counted as they enter, the visual tokens of its pictures among them; `keep` of these go on."""
    prompt_tokens: int = 2048
    context: int = 2048
    visual_tokens: int = 0
    keep: int | None = None
    cut_layer: int = 0
    batch: int = 1

    def __post_init__(self) -> None:
        for name, least in (("prompt_tokens", 1), ("context", 1), ("batch", 1), ("visual_tokens", 0), ("cut_layer", 0)):
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}: at least {least} is needed")
        if self.keep is not None and not 0 < self.keep <= self.visual_tokens:
            raise InputError(f"--keep {self.keep} of {self.visual_tokens} visual tokens: choose 1 to {self.visual_tokens}" if self.visual_tokens
                             else f"--keep {self.keep} without --visual-tokens: say how many a picture has")
        if self.visual_tokens > self.prompt_tokens:
            raise InputError(f"--visual-tokens {self.visual_tokens} exceeds --prompt-tokens {self.prompt_tokens}, which counts them")
        if self.context < self.prompt_tokens:
            raise InputError(f"--context {self.context} is less than --prompt-tokens {self.prompt_tokens}: the window holds the prompt, too")


def default_engine(device: Device) -> str:
    """What edgecomp would run on a device: TensorRT on a Jetson, TensorRT for RTX on other GPUs that it builds for.

    Raises InputError for a CPU: none was measured, and a GPU's constants say nothing of it.
    """
    if device.gpu is None:
        raise InputError(f"{device.id} is a CPU, and no CPU has been measured to predict from: `edgecomp profile` measures on the machine at hand")
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


def predict(shape: Shape, device: Device, request: Request, *, weights: str = "fp16", engine: str | None = None) -> Prediction:
    """Predicts from a config's shape alone.

    Raises UnknownNameError for an engine or a format that is not there, InputError for a request that the model cannot take.
    """
    engine = default_engine(device) if engine is None or device.gpu is None else engine
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
    works = {phase: work(shape, phase, prompt_tokens=request.prompt_tokens, context=request.context, weights=format_, **asked)
             for phase in ("vision", "selector", "prefill", "decode")}
    return of_works(works, device, request.batch, engine, format_, parts_of(shape, request, format_))


def parts_of(shape: Shape, request: Request, weights: str) -> dict[str, float]:
    """Bytes of the weights (every expert, the token embeddings in fp16) and of the cache of the whole window."""
    format_ = FORMATS[weights]
    layers = sum((layer.mixer_weights + layer.mlp_weights(layer.experts)) * format_.bits / 8 + (layer.biases + 2 * layer.hidden) * 2
                 for layer in shape.layers)
    tables = shape.head_weights * (max(format_.head_bits, 16) / 8 + (0 if shape.tied and format_.head_bits >= 16 else format_.head_bits / 8))
    gone = request.visual_tokens - (request.visual_tokens if request.keep is None else request.keep)
    cache = sum(layer.rows(request.context - (gone if at >= request.cut_layer else 0)) * layer.cache_elements * CACHE_BYTES
                + layer.state * STATE_BYTES for at, layer in enumerate(shape.layers)) * request.batch
    parts = {"weights": layers + tables, "cache": cache}
    if shape.tower and request.visual_tokens:
        parts["vision tower"] = 2.0 * shape.tower.parameters
    return parts


def of_works(works: dict[str, Work], device: Device, batch: int, engine: str, weights: str, parts: dict[str, float]) -> Prediction:
    """Predicts from the work of each phase and the parts of the memory, counted from a config or from a bundle's graphs. The runtime's share of
    the memory is added, as it was measured."""
    def time(phase: str, form: str, format_: str) -> Estimate:
        known = efficiency.constants(form, device, engine, format_)
        took = 1000 * efficiency.seconds(known.values, efficiency.terms(works[phase], device, form, engine, batch))
        return Estimate(took, took * math.exp(-known.spread), took * math.exp(known.spread), known.of)

    vision = time("vision", "vision", "fp16") if works["vision"].flops else None
    prefill, step = time("prefill", "prefill", weights), time("decode", "decode", weights)
    choosing = 1000 * sum(count / efficiency.peak(device, precision) for precision, count in works["selector"].flops.items())
    first = [prefill, *([vision] if vision else [])]
    ttft = sum(each.value for each in first) + choosing
    # errors of vision and prefill need not go together: their widths add as squares
    down, up = (math.hypot(*(each.value - each.low for each in first)), math.hypot(*(each.high - each.value for each in first)))
    used = sum(parts.values())
    runtime = efficiency.table()["memory"]
    memory = Estimate(used + runtime["value"], used + runtime["low"], used + runtime["high"], runtime["of"])
    parts = {**parts, "runtime": runtime["value"]}
    usable = (device.memory.usable_gib or device.memory.total_gib) * 2**30 - kept_by_system(device)[0]
    verdict = "fits" if memory.high <= usable else "tight" if memory.low <= usable else "does not fit"
    return Prediction(device.id, engine, weights, vision, prefill, Estimate(ttft, ttft - down, ttft + up, "; ".join(e.constants for e in first)),
                      step, Estimate(1000 * batch / step.value, 1000 * batch / step.high, 1000 * batch / step.low, step.constants), memory,
                      parts, usable, verdict)
