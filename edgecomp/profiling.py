"""Profiling bundles on the machine at hand: every plan beside its baselines, measured, and predicted on devices, as one result for the report."""
from __future__ import annotations

import dataclasses
import datetime as dt
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
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
from edgecomp.report.marks import in_bits
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import Manifest, PlanInfo

RANDOM_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Cell:
    """A plan to measure. name: in the result. near: the budget that it stands in for as a baseline, where that is another."""
    bundle: Bundle
    plan: str
    name: str
    near: int | None


def profile(paths: Sequence[Path], plans: Sequence[str], *, image: str | None, prompt: str, data: Path | None, reading: Mapping[str, Any],
            images: int | None, repeats: int, threads: int | None, devices: Sequence[Device], save: str | None, command: str,
            say: Callable[[str], None]) -> dict[str, Any]:
    """Measures plans of a bundle (all where none is named) and, at each budget, `random` with three seeds and `pool`, and predicts them on devices.

    Of several bundles, each in other bits, the plans of each are measured beside baselines in the same bits, and are predicted. The machine at
    hand is predicted, too, as a device that nobody has seen, so that predicted can be held against measured.

    Baselines that a bundle has not are compiled into a temporary copy that shares its weights.

    Args:
        paths: bundles of one model; the first one's full model is what all plans are held against, and the picture shows its plans.
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
        EdgecompError: a bundle cannot be read or measured, or not beside the first; this machine is not the device that is to be calibrated.
    """
    bundles, here = side_by_side(paths), detect()
    calibrated = beside.device_to_save(save, here) if save else None
    for device in [*devices, *([calibrated] if calibrated else [])]:
        efficiency.calibrated(device, default_engine(device))  # one that is broken is said now, and not behind all measurements
    chosen = [["full", *(n for n in plans or bundle.manifest.plans if bundle.plan(n)[0] != "full")] for bundle in bundles]
    with ExitStack() as stack:
        folders = [_folder(path, stack) for path in paths]
        cells = [cell for bundle, names, folder in zip(bundles, chosen, folders) for cell in _cells(bundle, names, folder, len(paths) > 1, say)]
        questions = read_questions(data, **reading) if data else []
        picture = image or (str(questions[0].image) if questions else _made_up(folders[0]))
        measured, before = {}, gauges.read()
        for number, cell in enumerate(cells, 1):
            say(f"measuring {cell.name} ({number} of {len(cells)})")
            measured[cell.name] = measure(Spec(str(cell.bundle.path), cell.plan, picture, prompt, repeats, threads=threads, images=images,
                                               data=str(data) if data else None, **_plain(reading)))
        told = gauges.between(before, gauges.read())
        rows = [_row(cell, measured[cell.name]) for cell in cells]
        say(f"predicting this machine{''.join(f', {device.id}' for device in devices)}")
        asked = [beside.asked(cell.bundle, cell.plan, cell.name, measured[cell.name]["latency"]) for cell in cells]
        predicted = [beside.on_device(asked, beside.unseen(here), True), *(beside.on_device(asked, device, False) for device in devices)]
        manifest = cells[0].bundle.manifest
        seen = {cell.name: (manifest.plans[cell.plan], found["kept"], found["said"])
                for cell in cells if cell.bundle is cells[0].bundle for found in [measured[cell.name]]}
        result = {"edgecomp": __version__, "created": dt.date.today().isoformat(), "command": command,
                  "machine": {**machine(), "backend": f"onnxruntime {calibration.version('onnxruntime')}, CPUExecutionProvider", "threads": threads,
                              "gauges": told},
                  "bundles": [facts.about(path.resolve().name, bundle.manifest) for path, bundle in zip(paths, bundles)], "plans": rows,
                  "devices": predicted, "compared": beside.compared(predicted[0], rows),
                  "example": facts.example(picture, prompt, _answer(picture, prompt, questions), seen, manifest)}
        if calibrated is not None:
            say(f"the calibration is {beside.save(calibrated, asked, rows)}")
        return result


def side_by_side(paths: Sequence[Path]) -> list[Bundle]:
    """Opens bundles. Raises EdgecompError where they are not of one model that takes pictures alike, each in other bits."""
    found, seen = [Bundle.open(path) for path in paths], dict[str, Path]()
    first = found[0].manifest
    for path, manifest in zip(paths, (bundle.manifest for bundle in found)):
        if manifest.source.sha256 != first.source.sha256:
            raise EdgecompError(f"{path} is of the model {manifest.source.model}, and {paths[0]} of {first.source.model} with other weights: a "
                                "profile compares bundles of one model")
        if (manifest.image, manifest.vision, manifest.decoder) != (first.image, first.vision, first.decoder):
            raise EdgecompError(f"{path} makes {manifest.vision.tokens} visual tokens of a picture in a window of {manifest.decoder.context}, and "
                                f"{paths[0]} {first.vision.tokens} in {first.decoder.context}: compile both with the same pictures and --context")
        bits = facts.bits(manifest)
        if bits in seen:
            raise EdgecompError(f"{seen[bits]} and {path} are both in {bits}: a profile of several bundles compares bits, so leave one out")
        seen[bits] = path
    return found


def _folder(path: Path, stack: ExitStack) -> Path:
    """A temporary folder on one disk with the bundle, for hard links, where that can be written to."""
    parent = path.resolve().parent
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{path.resolve().name}.profile.",
                                                                dir=parent if os.access(parent, os.W_OK) else None)))


def _cells(bundle: Bundle, chosen: Sequence[str], folder: Path, several: bool, say: Callable[[str], None]) -> list[Cell]:
    """A bundle's plans that were chosen and their baselines, which a copy in the folder gets where the bundle has not all of them."""
    manifest = bundle.manifest
    bits = facts.bits(manifest) if several else ""
    wanted = baselines([manifest.plans[name] for name in chosen], manifest)
    names = {plan_name(recipe, planned(recipe, manifest)): near for recipe, near in wanted}
    if missing := [recipe for name, (recipe, _) in zip(names, wanted) if name not in manifest.plans]:
        say(in_bits(f"compiling {len(missing)} baselines", bits))
        compress(bundle.path, folder / "bundle", missing, say=lambda line: None)
        bundle = Bundle.open(folder / "bundle")
    return [Cell(bundle, name, in_bits(name, bits), names.get(name)) for name in dict.fromkeys([*chosen, *names])]


def baselines(plans: Sequence[PlanInfo], manifest: Manifest) -> list[tuple[Recipe, int | None]]:
    """For each budget, position policy and site: random there with three seeds, and pool at the projector with the budget or, where it
    cannot make that, the nearest. Returns (recipe, the budget it stands in for where that is another)."""
    found: dict[Recipe, int | None] = {}
    for keep, position, site in dict.fromkeys((p.steps[-1].keep, p.position, p.steps[-1].site) for p in plans if p.steps):
        found |= {Recipe.of(methods.make("random", seed=seed), str(keep), site, position): None for seed in RANDOM_SEEDS}
        can = nearest(manifest, methods.make("pool"), keep)
        found[Recipe.of(methods.make("pool"), str(can), "projector", position)] = keep if can != keep else None
    return list(found.items())


def _row(cell: Cell, measured: dict[str, Any]) -> dict[str, Any]:
    manifest, latency = cell.bundle.manifest, measured["latency"]
    plan = manifest.plans[cell.plan]
    step = plan.steps[-1] if plan.steps else None
    filed = dataclasses.asdict(methods.method_type(step.method).taxonomy) if step else {}
    return {"name": cell.name, "bits": facts.bits(manifest), "method": "+".join(dict.fromkeys(s.method for s in plan.steps)) or "none",
            "keep": plan.tokens_at(manifest.decoder.layers), "nearest_to": cell.near,
            "parameters": step.parameters if step else {}, "site": "+".join(s.site for s in plan.steps), "position": plan.position,
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
