"""Adding plans to a bundle: a method at a site with a budget, spliced into the neutral graph and lowered."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from edgecomp.dialects import lowering
from edgecomp.ir.graphs import describe, load, save
from edgecomp.methods import parameters
from edgecomp.methods.base import BudgetError, Method, Place
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


def tokens_of(keep: str, tokens: int) -> int:
    """'64' is 64; '25%' is max(1, floor(N p / 100 + 1/2)). Raises BudgetError for anything outside 1..N."""
    text = keep.strip()
    try:  # decimal, for 2.51% of 5000 is exactly 125.5 and in binary a little less
        number = Decimal(text[:-1]) * tokens / 100 if text.endswith("%") else Decimal(int(text))
    except (ValueError, ArithmeticError):
        number = Decimal("nan")
    if not number.is_finite():
        raise BudgetError(f"a budget of {keep!r} is neither a count such as 64 nor a part such as 25%")
    if not 0 < number <= tokens:
        raise BudgetError(f"a budget of {keep} is outside what this model has: choose 1 to {tokens} visual tokens, or a part up to 100%")
    return max(1, math.floor(number + Decimal("0.5")))


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
    planned = [(recipe, _place(recipe, manifest)) for recipe in recipes]
    names = [plan_name(recipe, place.keep) for recipe, place in planned]
    plans, graphs = dict(manifest.plans), dict(manifest.graphs)
    with writing(out) as (partial, finish):
        copy_files(bundle, partial)
        for name, (recipe, place) in zip(names, planned):
            if name not in plans:
                say(f"compressing to {place.keep} of {place.tokens} visual tokens: {name}")
                plans[name] = _plan(name, recipe, place, manifest, graphs, partial)
        for name, plan in plans.items():
            for dialect in dialects:
                if dialect not in plan.variants:
                    say(f"lowering {name} for {dialect}")
                    variant = {part: _lowered(file, dialect, graphs, partial) for part, file in plan.variants["neutral"].items()}
                    plans[name] = plan = dataclasses.replace(plan, variants={**plan.variants, dialect: variant})
        finish(dataclasses.replace(manifest, plans=plans, graphs=graphs, default_plan=names[0] if names else manifest.default_plan))
    return names


def _place(recipe: Recipe, manifest: Manifest) -> Place:
    if recipe.site not in recipe.method.taxonomy.sites:
        raise EdgecompError(f"method {recipe.method.name!r} cannot stand at {recipe.site!r}; it can at {', '.join(recipe.method.taxonomy.sites)}")
    if recipe.position not in POSITIONS:
        raise EdgecompError(f"position {recipe.position!r} is none of {', '.join(POSITIONS)}")
    place = Place(manifest.vision.grid, tokens_of(recipe.keep, manifest.vision.tokens))
    recipe.method.check(place)
    if cache_rows(place, manifest) < 1:
        raise EdgecompError(f"a window of {manifest.decoder.context} rows does not hold one picture's {place.tokens} visual tokens: "
                            "compile with a larger --context")
    if "cls_attention" in recipe.method.taxonomy.signals and not manifest.vision.has_cls:
        raise EdgecompError(f"method {recipe.method.name!r} reads the CLS token's attention, and this vision tower has no CLS token")
    return place


def _plan(name: str, recipe: Recipe, place: Place, manifest: Manifest, graphs: dict[str, GraphInfo], partial: Path) -> PlanInfo:
    """Splices one plan's vision graph, writes it and adds it to `graphs`."""
    neutral = manifest.plans["full"].variants["neutral"]
    model = load(partial / neutral["vision"])
    at_projector(model, manifest.vision, recipe.method, place)
    file = f"graphs/vision.{name}.onnx"
    save(model, partial / file)
    graphs[file] = describe(model)
    step = StepInfo(recipe.method.name, recipe.site, place.keep, {p: getattr(recipe.method, p) for p in parameters(type(recipe.method))})
    return PlanInfo((step,), recipe.position, place.keep, (cache_rows(place, manifest),) * manifest.decoder.layers,
                    {"neutral": {**neutral, "vision": file}})


def cache_rows(place: Place, manifest: Manifest) -> int:
    """Rows of each layer's cache: the window less what one picture saves."""
    return manifest.decoder.context - (place.tokens - place.keep)


def _lowered(file: str, dialect: str, graphs: dict[str, GraphInfo], partial: Path) -> str:
    """The file of a neutral graph in a dialect; written and added to `graphs` unless another plan has had it lowered."""
    lowered = f"{file.removesuffix('.onnx')}.{dialect}.onnx"
    if lowered not in graphs:
        model = load(partial / file)
        lowering(dialect)(model)
        save(model, partial / lowered)
        graphs[lowered] = describe(model)
    return lowered
