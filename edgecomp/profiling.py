"""Profiling a bundle on the machine at hand: every plan beside its baselines, measured, and predicted on devices, as one result for the report."""
from __future__ import annotations

import dataclasses
import datetime as dt
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgecomp import __version__, beside, gauges, methods
from edgecomp.budget import nearest
from edgecomp.compress import Recipe, compress, plan_name, planned
from edgecomp.datasets.base import Question
from edgecomp.detect import detect
from edgecomp.devices import Device
from edgecomp.doctor import machine
from edgecomp.evaluate import normal, read_questions
from edgecomp.measure import Spec, measure
from edgecomp.predict import calibration, efficiency
from edgecomp.predict.predict import default_engine
from edgecomp.report import facts
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.manifest import Manifest, PlanInfo

RANDOM_SEEDS = (0, 1, 2)


def profile(path: Path, plans: Sequence[str], *, image: str | None, prompt: str, data: Path | None, reading: Mapping[str, Any], images: int | None,
            repeats: int, threads: int | None, devices: Sequence[Device], save: str | None, command: str,
            say: Callable[[str], None]) -> dict[str, Any]:
    """Measures plans of a bundle (all where none is named) and, at each budget, `random` with three seeds and `pool`, and predicts them on devices.

    The machine at hand is predicted, too, as a device that nobody has seen, so that predicted can be held against measured.

    Baselines that the bundle has not are compiled into a temporary copy that shares its weights.

    Args:
        path: the bundle.
        plans: names; 'full' is always measured.
        image: a picture for the latency; by default the first of the questions, or a made-up one.
        prompt: the question for the latency.
        data: questions for the accuracy, or None.
        reading: how they are read: layout, image_folder and suffix of `read_questions`.
        images: only those about the first so many pictures.
        repeats: of the latency, after one to warm up.
        threads: for one operator.
        devices: to predict, beside the machine at hand.
        save: keep what was measured as the calibration of this device, see `edgecomp.beside.save`.
        command: how the caller was called, for the report.
        say: is told what is being done.

    Returns:
        The result that `edgecomp.report.page.render` takes.

    Raises:
        EdgecompError: the bundle cannot be read or measured, or this machine is not the device that is to be calibrated.
    """
    bundle, here = Bundle.open(path), detect()
    calibrated = beside.device_to_save(save, here) if save else None
    for device in [*devices, *([calibrated] if calibrated else [])]:
        efficiency.calibrated(device, default_engine(device))  # one that is broken is said now, and not behind all measurements
    chosen = ["full", *(n for n in plans or bundle.manifest.plans if bundle.plan(n)[0] != "full")]
    parent = path.resolve().parent  # on one disk with the bundle, for hard links, where that can be written to
    with tempfile.TemporaryDirectory(prefix=f".{path.resolve().name}.profile.", dir=parent if os.access(parent, os.W_OK) else None) as folder:
        wanted = baselines([bundle.manifest.plans[n] for n in chosen], bundle.manifest)
        names = {plan_name(recipe, planned(recipe, bundle.manifest)): near for recipe, near in wanted}
        if missing := [recipe for name, (recipe, _) in zip(names, wanted) if name not in bundle.manifest.plans]:
            say(f"compiling {len(missing)} baselines")
            compress(path, Path(folder) / "bundle", missing, say=lambda line: None)
            bundle = Bundle.open(Path(folder) / "bundle")
        questions = read_questions(data, **reading) if data else []
        picture = image or (str(questions[0].image) if questions else _made_up(Path(folder)))
        every = list(dict.fromkeys([*chosen, *names]))
        measured, before = {}, gauges.read()
        for number, name in enumerate(every, 1):
            say(f"measuring {name} ({number} of {len(every)})")
            measured[name] = measure(Spec(str(bundle.path), name, picture, prompt, repeats, threads=threads, images=images,
                                          data=str(data) if data else None, **_plain(reading)))
        told = gauges.between(before, gauges.read())
        rows = [_row(n, bundle.manifest, measured[n], names.get(n)) for n in every]
        say(f"predicting this machine{''.join(f', {device.id}' for device in devices)}")
        asked = [beside.asked(bundle, n, measured[n]["latency"]) for n in every]
        predicted = [beside.on_device(bundle, asked, beside.unseen(here), True), *(beside.on_device(bundle, asked, d, False) for d in devices)]
        result = {"edgecomp": __version__, "created": dt.date.today().isoformat(), "command": command,
                  "machine": {**machine(), "backend": f"onnxruntime {calibration.version('onnxruntime')}, CPUExecutionProvider", "threads": threads,
                              "gauges": told},
                  "bundle": facts.about(path.resolve().name, bundle.manifest), "plans": rows, "devices": predicted,
                  "compared": beside.compared(predicted[0], rows),
                  "example": facts.example(picture, prompt, _answer(picture, prompt, questions),
                                           {n: (m["kept"], m["said"]) for n, m in measured.items()}, bundle.manifest)}
        if calibrated is not None:
            say(f"the calibration is {beside.save(calibrated, bundle.manifest, asked, rows)}")
        return result


def baselines(plans: Sequence[PlanInfo], manifest: Manifest) -> list[tuple[Recipe, int | None]]:
    """For each budget, position policy and site: random there with three seeds, and pool at the projector with the budget or, where it
    cannot make that, the nearest. Returns (recipe, the budget it stands in for where that is another)."""
    found: dict[Recipe, int | None] = {}
    for keep, position, site in dict.fromkeys((p.steps[-1].keep, p.position, p.steps[-1].site) for p in plans if p.steps):
        found |= {Recipe.of(methods.make("random", seed=seed), str(keep), site, position): None for seed in RANDOM_SEEDS}
        can = nearest(manifest, methods.make("pool"), keep)
        found[Recipe.of(methods.make("pool"), str(can), "projector", position)] = keep if can != keep else None
    return list(found.items())


def _row(name: str, manifest: Manifest, measured: dict[str, Any], near: int | None) -> dict[str, Any]:
    plan, latency = manifest.plans[name], measured["latency"]
    step = plan.steps[-1] if plan.steps else None
    filed = dataclasses.asdict(methods.method_type(step.method).taxonomy) if step else {}
    return {"name": name, "method": "+".join(dict.fromkeys(s.method for s in plan.steps)) or "none", "keep": plan.tokens_at(manifest.decoder.layers),
            "nearest_to": near, "parameters": step.parameters if step else {}, "site": "+".join(s.site for s in plan.steps),
            "position": plan.position,
            **{key: filed.get(key, "") for key in ("summary", "paper", "kind")},
            "needs_prompt": plan.needs_prompt, "parametric": filed.get("parametric", False), "counts": facts.counts(manifest, plan),
            "memory": facts.memory(manifest, plan, latency["prompt_rows"]), "peak": facts.peak(measured),
            "latency": latency, "accuracy": measured["accuracy"]}


def _plain(reading: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON takes it."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in reading.items()}


def _answer(picture: str, prompt: str, questions: Sequence[Question]) -> str:
    """The right answer to the prompt about the picture, where the questions have it."""
    asked = [q for q in questions if str(q.image) == picture and normal(q.question) == normal(prompt)]
    return asked[0].answer if asked else ""


def _made_up(folder: Path) -> str:
    from PIL import Image
    path = folder / "picture.png"
    Image.radial_gradient("L").resize((640, 480)).convert("RGB").save(path)
    return str(path)

