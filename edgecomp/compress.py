"""Adding plans to a bundle: a method at a site with a budget, spliced into the neutral graph and lowered."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgecomp.budget import places, tokens_of
from edgecomp.dialects import lowering
from edgecomp.ir.graphs import describe, load, save
from edgecomp.methods import parameters
from edgecomp.methods.base import Method, Place
from edgecomp.passes.splice import at_projector
from edgecomp.writer import copy_files, writing
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import GraphInfo, Manifest, PlanInfo, StepInfo

POSITIONS = ("keep", "compact")


@dataclass(frozen=True)
class Recipe:
    """One plan to make: `keep` is a count ('64') or a part ('25%') of a picture's visual tokens."""
    method: Method
    keep: str
    site: str = "projector"
    position: str = "keep"


def plan_name(recipe: Recipe, keep: int) -> str:
    """A plan's name: method, budget, and whatever differs from the defaults."""
    parts = [recipe.method.name, str(keep)]
    for name, default in parameters(type(recipe.method)).items():
        if (value := getattr(recipe.method, name)) != default:
            parts.append(f"{name}{value}")
    return "-".join(parts + ([recipe.position] if recipe.position != "keep" else []))


def compress(source: Path, out: Path, recipes: Sequence[Recipe], *, dialects: Sequence[str] = ("onnxruntime",),
             say: Callable[[str], None] = lambda line: None) -> list[str]:
    """Writes a bundle with one more plan a recipe, each lowered to the dialects. Weights are shared, not copied.

    Args:
        source: a bundle with neutral graphs.
        out: where the new one goes; may be the same folder.
        recipes: the plans to make; one that the bundle has already is kept as it is.
        dialects: what to lower all plans to.
        say: is told what is being done.

    Returns:
        The plans' names, in order; the first one is the new bundle's default.

    Raises:
        BudgetError, EdgecompError: a budget or site that does not fit, before anything is written.
    """
    bundle = Bundle.open(source)
    manifest = bundle.manifest
    planned = [(recipe, *_budget(recipe, manifest)) for recipe in recipes]
    names = [plan_name(recipe, keep) for recipe, keep, _ in planned]
    plans, graphs = dict(manifest.plans), dict(manifest.graphs)
    with writing(out) as (partial, finish):
        copy_files(bundle, partial)
        for name, (recipe, keep, parts) in zip(names, planned):
            if name not in plans:
                say(f"compressing to {keep} of {manifest.vision.tokens} visual tokens: {name}")
                plans[name] = _plan(name, recipe, keep, parts, manifest, graphs, partial)
        for name, plan in plans.items():
            for dialect in dialects:
                if dialect not in plan.variants:
                    say(f"lowering {name} for {dialect}")
                    variant = {part: _lowered(file, dialect, graphs, partial) for part, file in plan.variants["neutral"].items()}
                    plans[name] = plan = dataclasses.replace(plan, variants={**plan.variants, dialect: variant})
        finish(dataclasses.replace(manifest, plans=plans, graphs=graphs, default_plan=names[0] if names else manifest.default_plan))
    return names


def _budget(recipe: Recipe, manifest: Manifest) -> tuple[int, tuple[Place, ...]]:
    """A recipe's visual tokens, in all and by tile, once it is known that the method can make them of this model."""
    if recipe.site not in recipe.method.taxonomy.sites:
        raise EdgecompError(f"method {recipe.method.name!r} cannot stand at {recipe.site!r}; it can at {', '.join(recipe.method.taxonomy.sites)}")
    if recipe.position not in POSITIONS:
        raise EdgecompError(f"position {recipe.position!r} is none of {', '.join(POSITIONS)}")
    keep = tokens_of(recipe.keep, manifest.vision.tokens)
    parts = places(manifest, keep)
    for place in parts:
        recipe.method.check(place)
    if cache_rows(keep, manifest) < 1:
        raise EdgecompError(f"a window of {manifest.decoder.context} rows does not hold one picture's {manifest.vision.tokens} visual tokens: "
                            "compile with a larger --context")
    if "cls_attention" in recipe.method.taxonomy.signals and not manifest.vision.has_cls:
        raise EdgecompError(f"method {recipe.method.name!r} reads the CLS token's attention, and this tower has none beside its visual tokens")
    return keep, parts


def _plan(name: str, recipe: Recipe, keep: int, parts: tuple[Place, ...], manifest: Manifest, graphs: dict[str, GraphInfo],
          partial: Path) -> PlanInfo:
    """Splices one plan's vision graph, writes it and adds it to `graphs`."""
    neutral = manifest.plans["full"].variants["neutral"]
    model = load(partial / neutral["vision"])
    at_projector(model, manifest.vision, recipe.method, parts, whole=keep > sum(place.keep for place in parts))
    file = f"graphs/vision.{name}.onnx"
    save(model, partial / file)
    graphs[file] = describe(model)
    step = StepInfo(recipe.method.name, recipe.site, keep, {p: getattr(recipe.method, p) for p in parameters(type(recipe.method))})
    return PlanInfo((step,), recipe.position, keep, tuple(place.keep for place in parts),
                    (cache_rows(keep, manifest),) * manifest.decoder.layers, {"neutral": {**neutral, "vision": file}})


def cache_rows(keep: int, manifest: Manifest) -> int:
    """Rows of each layer's cache: the window less what one picture saves."""
    return manifest.decoder.context - (manifest.vision.tokens - keep)


def _lowered(file: str, dialect: str, graphs: dict[str, GraphInfo], partial: Path) -> str:
    """The file of a neutral graph in a dialect; written and added to `graphs` unless another plan has had it lowered."""
    lowered = f"{file.removesuffix('.onnx')}.{dialect}.onnx"
    if lowered not in graphs:
        model = load(partial / file)
        lowering(dialect)(model)
        save(model, partial / lowered)
        graphs[lowered] = describe(model)
    return lowered
