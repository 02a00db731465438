"""A bundle's plans predicted on devices, beside what was measured here: the parts `devices` and `compared` of a profile's result."""
from __future__ import annotations

import dataclasses
import datetime as dt
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecomp import __version__, devices
from edgecomp.detect import to_toml
from edgecomp.devices import Device
from edgecomp.predict import calibration, efficiency
from edgecomp.predict.bundles import count_phases, of_counted
from edgecomp.predict.fits import GIB, kept_by_system
from edgecomp.predict.memory import Planned
from edgecomp.predict.predict import default_engine
from edgecomp.predict.work import FORMATS, Work
from edgecomp.report.phases import PEAK, PHASES
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.errors import EdgecompError, InputError

HERE, ENGINE = "here", "onnxruntime"  # the machine at hand, and what measures on it
ESTIMATES = ("vision_ms", "prefill_ms", "ttft_ms", "tpot_ms", "decode_tokens_per_s", "memory_bytes")


@dataclass(frozen=True)
class Asked:
    """A bundle's plan as it was measured, and what its graphs ask for by phase. name: in the result. memory: of that run, on any device."""
    bundle: Bundle
    plan: str
    name: str
    memory: Planned
    works: Mapping[str, Work]


def asked(bundle: Bundle, plan: str, name: str, latency: Mapping[str, Any]) -> Asked:
    """Counts a plan's graphs at the sizes that it was measured at; decode is the step in the middle of the answer."""
    rows, new = latency["prompt_rows"], latency["new_tokens"]
    text = rows - bundle.manifest.plans[plan].visual_tokens
    return Asked(bundle, plan, name, Planned(bundle, plan, text, new), count_phases(bundle, plan, text, rows + new // 2))


def unseen(here: Device) -> Device:
    """The machine at hand under a name that no calibration has: held against what was measured is what was known before."""
    return dataclasses.replace(here, id=HERE)


def on_device(plans: Sequence[Asked], device: Device, here: bool) -> dict[str, Any]:
    """One entry of a result's `devices`; what cannot be predicted is refused in its place, in one line. Its peak is that of the first plan's bits."""
    engine, has = default_engine(device), device.memory.usable_gib or device.memory.total_gib
    weights = list(dict.fromkeys(efficiency.stored(engine, plan.bundle.manifest.weights) for plan in plans))
    saved = efficiency.calibrated(device, engine)
    about: dict[str, Any] = {
        "id": device.label, "name": device.name, "here": here, "engine": engine, "weights": " and ".join(weights),
        "sources": [line for field in ("spec", "peaks", "power", "usable_memory", "software") for line in getattr(device.sources, field)],
        "uncertain": list(device.sources.uncertain), "usable_bytes": has * GIB - kept_by_system(device)[0], **_peak(device, engine, weights[0]),
        "bandwidth_bytes_per_s": device.memory.bandwidth_gb_per_s * 1e9, "calibrated": saved.words(len(saved.rows)) if saved else None, "plans": {}}
    for plan in plans:
        try:
            found = of_counted(plan.bundle, plan.plan, plan.works, device, engine, memory=plan.memory)
        except EdgecompError as error:
            about["plans"][plan.name] = {"refused": str(error)}
            continue
        about["plans"][plan.name] = {
            "kind": found.kind, **{name: dataclasses.asdict(value) for name in ESTIMATES if (value := getattr(found, name))},
            "memory_parts": found.memory_parts, "verdict": found.verdict, "way_out": found.way_out,
            "work": {phase: {"flops": sum(work.flops.values()), "bytes": work.bytes} for phase, work in plan.works.items()}}
    return about


def _peak(device: Device, engine: str, weights: str) -> dict[str, Any]:
    """What an engine computes in there, and how fast at most; None where the profile has no such number."""
    try:
        precision, peak = efficiency.named_peak(device, efficiency.precision_of(engine, FORMATS[weights].compute))
    except EdgecompError:
        return {"peak_flops_per_s": None, "peak_precision": None}
    return {"peak_flops_per_s": peak, "peak_precision": precision}


def compared(here: Mapping[str, Any], plans: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each phase and the peak of memory of each plan on the machine at hand: predicted, with the interval, and measured."""
    found = []
    for plan in plans:
        guess = here["plans"].get(plan["name"], {})
        times = [(phase, plan["latency"][phase.measured]["median"]) for phase in PHASES.values()]
        for phase, measured in [*times, (PEAK, plan["peak"][PEAK.measured])]:
            if measured and (estimate := guess.get(phase.predicted)):
                found.append({"plan": plan["name"], "phase": phase.measured, "predicted": {end: estimate[end] for end in ("value", "low", "high")},
                              "measured": measured})
    return found


def device_to_save(name: str, here: Device) -> Device:
    """The device of that id, which this machine is said to be; where there is none, the machine as it was detected, under that id.

    Raises InputError where this machine is not that device, or the name is no id.
    """
    if name in devices.names():
        found = devices.load(name)
        assert here.cpu is not None
        if found.cpu is None:
            raise InputError(f"--save {name}: {name} is a GPU, and what is measured here runs on the CPU: choose another id")
        if (found.cpu.cores, efficiency.family(found)) != (here.cpu.cores, efficiency.family(here)):
            raise InputError(f"--save {name}: {name} has {found.cpu.cores} cores, {efficiency.family(found)}, and this machine {here.cpu.cores}, "
                             f"{efficiency.family(here)}: choose another id, and a profile is written for it")
        return found
    if name == HERE or not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", name):
        raise InputError(f"--save {name}: an id has small letters, digits, '-' and '.', and is not {HERE!r}, such as {here.id}")
    return dataclasses.replace(here, id=name)


def save(device: Device, plans: Sequence[Asked], measured: Sequence[Mapping[str, Any]]) -> Path:
    """Keeps what was measured as the device's calibration, and its profile where there is none yet. Returns the calibration's file."""
    rows = []
    for plan, took in zip(plans, (each["latency"] for each in measured), strict=True):
        manifest = plan.bundle.manifest
        for phase, named in PHASES.items():
            # an answer of one token has no time a token, and a tower in whole numbers no format
            if (seconds := took[named.measured]["median"] / 1000) > 0 and not (phase == "vision" and manifest.calibrated):
                format_ = efficiency.format_of(phase, ENGINE, manifest)
                rows.append(calibration.Measured(phase, format_, manifest.source.model, plan.plan, took["prompt_rows"],
                                                 plan.works[phase], seconds))
    if device.id not in devices.names():
        profile = devices.own_folder() / f"{device.id}.toml"
        profile.parent.mkdir(parents=True, exist_ok=True)
        profile.write_text(to_toml(device), encoding="utf-8")
    today = dt.date.today().isoformat()
    return calibration.save(calibration.Calibration(device.id, ENGINE, today, __version__, calibration.version(ENGINE), tuple(rows)))
