"""A bundle's plan on a device: predicted from its own graphs."""
from __future__ import annotations

from collections.abc import Mapping

from edgecomp.build.jobs import engine_weights
from edgecomp.devices import Device
from edgecomp.footprint import cache_bytes, weight_bytes
from edgecomp.predict import efficiency
from edgecomp.predict.graph import counted
from edgecomp.predict.memory import Planned
from edgecomp.predict.parts import AT_ONCE, TWO_ENGINES
from edgecomp.predict.predict import WITHIN, Prediction, Request, default_engine, of_works, whole
from edgecomp.predict.work import TIMED, Work
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.errors import InputError
from edgecomp_runtime.limits import ENGINE_PREFILL_ROWS


def of_bundle(bundle: Bundle, plan: str | None, device: Device, request: Request, engine: str | None = None) -> Prediction:
    """Counts the graphs of a bundle's plan for one sequence with one picture; of the request, `prompt_tokens` and `context` are looked at.

    Raises:
        UnknownNameError: no such plan or engine.
        InputError: a prompt without text, a window larger than the bundle's, or more than one sequence.
    """
    manifest, (plan, info) = bundle.manifest, bundle.plan(plan)
    if request.batch != 1:
        raise InputError(f"--batch {request.batch}: a bundle's graphs are for one sequence; give a config.json for more")
    text = text_rows(bundle, request.prompt_tokens)
    if request.context > manifest.decoder.context:
        raise InputError(f"--context {request.context} exceeds the bundle's window of {manifest.decoder.context} rows: compile with --context")
    rows = request.context - (manifest.vision.tokens - info.visual_tokens)
    return of_counted(bundle, plan, count_phases(bundle, plan, text, rows), device, engine, memory=Planned(bundle, plan, text))


def count_phases(bundle: Bundle, plan: str, text: int, context: int) -> dict[str, Work]:
    """What each phase of a plan asks for, whatever the device: a prompt of one picture and so many rows of text, a step behind `context` rows."""
    return {phase: counted(bundle, plan, phase, text_rows=text, context=context) for phase in TIMED}


def of_counted(bundle: Bundle, plan: str, works: Mapping[str, Work], device: Device, engine: str | None = None, *,
               memory: Planned) -> Prediction:
    """`of_bundle` from what was counted and planned already, for one device after another."""
    manifest, info = bundle.manifest, bundle.manifest.plans[plan]
    engine = default_engine(device) if engine is None else engine
    works = {**works, "selector": Work({}, 0, 0, 0, 0, 0)}  # what choosing takes is in the graphs' own work
    weights, tower = (efficiency.format_of(phase, engine, manifest) for phase in ("decode", "vision"))
    if device.gpu is None:
        own = memory.on_a_cpu()
        return of_works(works, device, 1, engine, weights, tower, {part: float(size) for part, size in own.items()}, whole(own, WITHIN))
    held = engine_weights(bundle, info) if engine in TWO_ENGINES else weight_bytes(manifest)
    parts = {"weights": float(held), "cache": float(cache_bytes(manifest, info)),
             **memory.activations(AT_ONCE.get(engine, ENGINE_PREFILL_ROWS))}
    return of_works(works, device, 1, engine, weights, tower, parts)


def text_rows(bundle: Bundle, prompt_tokens: int) -> int:
    """Rows of a prompt beside one picture's. Raises InputError where there are none."""
    visual = bundle.manifest.vision.tokens
    if prompt_tokens <= visual:
        raise InputError(f"--prompt-tokens {prompt_tokens} must hold the picture's {visual} visual tokens and text")
    return prompt_tokens - visual
