"""Profiling a bundle on the machine at hand: every plan beside its baselines, measured, as one result for the report."""
from __future__ import annotations

import base64
import dataclasses
import datetime as dt
import importlib.metadata
import io
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgecomp import __version__, methods
from edgecomp.budget import nearest
from edgecomp.compress import Recipe, compress, plan_name
from edgecomp.doctor import machine
from edgecomp.evaluate import normal, read_questions
from edgecomp.footprint import cache_bytes, weight_bytes
from edgecomp.measure import Spec, measure
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.manifest import Manifest, PlanInfo

RANDOM_SEEDS = (0, 1, 2)


def profile(path: Path, plans: Sequence[str], *, image: str | None, prompt: str, data: Path | None, images: int | None, repeats: int,
            threads: int | None, command: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures plans of a bundle (all where none is named) and, at each budget, `random` with three seeds and `pool`.

    Baselines that the bundle has not are compiled into a temporary copy that shares its weights.

    Args:
        path: the bundle.
        plans: names; 'full' is always measured.
        image: a picture for the latency; by default the first of the questions, or a made-up one.
        prompt: the question for the latency.
        data: questions for the accuracy, or None.
        images: only those about the first so many pictures.
        repeats: of the latency, after one to warm up.
        threads: for one operator.
        command: how the caller was called, for the report.
        say: is told what is being done.

    Returns:
        The result that `edgecomp.report.page.render` takes.
    """
    bundle = Bundle.open(path)
    chosen = ["full", *(n for n in plans or bundle.manifest.plans if bundle.plan(n)[0] != "full")]
    beside = path.resolve().parent  # on one disk with the bundle, for hard links, where that can be written to
    with tempfile.TemporaryDirectory(prefix=f".{path.resolve().name}.profile.", dir=beside if os.access(beside, os.W_OK) else None) as folder:
        wanted = baselines([bundle.manifest.plans[n] for n in chosen], bundle.manifest)
        names = {plan_name(recipe, keep): near for recipe, keep, near in wanted}
        if missing := [recipe for recipe, keep, _ in wanted if plan_name(recipe, keep) not in bundle.manifest.plans]:
            say(f"compiling {len(missing)} baselines")
            compress(path, Path(folder) / "bundle", missing, say=lambda line: None)
            bundle = Bundle.open(Path(folder) / "bundle")
        picture = image or _first_picture(data) or _made_up(Path(folder))
        every = list(dict.fromkeys([*chosen, *names]))
        measured = {}
        for number, name in enumerate(every, 1):
            say(f"measuring {name} ({number} of {len(every)})")
            measured[name] = measure(Spec(str(bundle.path), name, picture, prompt, repeats, threads=threads, images=images,
                                          data=str(data) if data else None))
        return {"edgecomp": __version__, "created": dt.date.today().isoformat(), "command": command,
                "machine": {**machine(), "backend": f"onnxruntime {_version()}, CPUExecutionProvider", "threads": threads},
                "bundle": _about(path, bundle.manifest),
                "plans": [_row(n, bundle.manifest, measured[n], names.get(n)) for n in every],
                "example": _example(picture, prompt, data, measured, bundle.manifest)}


def baselines(plans: Sequence[PlanInfo], manifest: Manifest) -> list[tuple[Recipe, int, int | None]]:
    """For each budget and position policy: random with three seeds, and pool at the budget or, where it cannot make that,
    at the nearest. Returns (recipe, budget, the budget it stands in for where that is another)."""
    found: list[tuple[Recipe, int, int | None]] = []
    for keep, position in dict.fromkeys((p.visual_tokens, p.position) for p in plans if p.steps):
        found += [(Recipe(methods.make("random", seed=seed), str(keep), position=position), keep, None) for seed in RANDOM_SEEDS]
        can = nearest(manifest, methods.make("pool"), keep)
        found.append((Recipe(methods.make("pool"), str(can), position=position), can, keep if can != keep else None))
    return found


def _row(name: str, manifest: Manifest, measured: dict[str, Any], near: int | None) -> dict[str, Any]:
    plan = manifest.plans[name]
    step = plan.steps[0] if plan.steps else None
    facts = dataclasses.asdict(methods.method_type(step.method).taxonomy) if step else {}
    return {"name": name, "method": step.method if step else "none", "keep": plan.visual_tokens, "nearest_to": near,
            "parameters": step.parameters if step else {}, "site": step.site if step else "", "position": plan.position,
            **{key: facts.get(key, "") for key in ("summary", "paper", "kind")},
            **{key: facts.get(key, False) for key in ("needs_prompt", "parametric")},
            # at the projector every layer of the decoder sees the same rows
            "counts": {"enter": plan.visual_tokens, "after_cut": plan.visual_tokens, "mean_over_layers": float(plan.visual_tokens)},
            "memory": {"weights_bytes": weight_bytes(manifest), "cache_bytes": cache_bytes(manifest, plan),
                       "cache_used_bytes": cache_bytes(manifest, plan, measured["latency"]["prompt_rows"]),
                       "peak_bytes": measured["peak_bytes"], "meter": measured["meter"]},
            "latency": measured["latency"], "accuracy": measured["accuracy"]}


def _about(path: Path, manifest: Manifest) -> dict[str, Any]:
    vision, decoder = manifest.vision, manifest.decoder
    return {"name": path.resolve().name, "source": manifest.source.model, "family": manifest.source.family, "precision": manifest.precision,
            "context": decoder.context, "tokens": vision.tokens, "grid": list(on_canvas(manifest, [])[0]), "vision_layers": vision.layers,
            "decoder_layers": decoder.layers, "hidden": decoder.hidden, "weights_bytes": weight_bytes(manifest)}


def _example(picture: str, prompt: str, data: Path | None, measured: dict[str, Any], manifest: Manifest) -> dict[str, Any]:
    from edgecomp_runtime.images import fit, load
    buffer = io.BytesIO()
    fit(load(picture), manifest.image).save(buffer, "JPEG", quality=85)
    shown = {name: {"kept": on_canvas(manifest, m["kept"])[1], "said": m["said"],
                    "pooled": _merges(manifest.plans[name]) and len(manifest.vision.tiles) == 1} for name, m in measured.items()}
    return {"image": "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), "question": prompt,
            "answer": _answer(picture, prompt, data), "plans": shown}


def on_canvas(manifest: Manifest, kept: Sequence[int]) -> tuple[tuple[int, int], list[int]]:
    """The token grid (rows, columns) that covers a picture once, and the raster places there of kept tokens.

    Tokens of an overview beside tiles, and separators, have no place of their own there.
    """
    tiles, (rows, columns) = list(manifest.vision.tiles), manifest.image.tiles
    if manifest.image.overview:
        tiles.pop(0 if manifest.image.overview == "first" else -1)
    if len(tiles) != rows * columns:  # of one packed grid: scaled, or without those that were nothing but black
        columns = len({(t.start - tiles[0].start) % t.stride for t in tiles})
        rows = len(tiles) // columns
    wide, high = sum(t.columns for t in tiles[:columns]), sum(t.rows for t in tiles[::columns])
    places: dict[int, int] = {}
    down = 0
    for row in range(rows):
        across = 0
        for tile in tiles[row * columns:(row + 1) * columns]:
            for r in range(tile.rows):
                for c in range(tile.columns):
                    places[tile.start + r * tile.stride + c] = (down + r) * wide + across + c
            across += tile.columns
        down += tiles[row * columns].rows
    return (high, wide), [places[k] for k in kept if k in places]


def _answer(picture: str, prompt: str, data: Path | None) -> str:
    """The right answer to the prompt about the picture, where the questions have it."""
    asked = [q for q in read_questions(data) if str(q.image) == picture and normal(q.question) == normal(prompt)] if data else []
    return asked[0].answer if asked else ""


def _merges(plan: PlanInfo) -> bool:
    return any(methods.method_type(step.method).taxonomy.kind == "merging" for step in plan.steps)


def _first_picture(data: Path | None) -> str | None:
    return str(read_questions(data)[0].image) if data else None


def _made_up(folder: Path) -> str:
    from PIL import Image
    path = folder / "picture.png"
    Image.radial_gradient("L").resize((640, 480)).convert("RGB").save(path)
    return str(path)


def _version() -> str:
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
