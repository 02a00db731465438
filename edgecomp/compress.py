"""Adding plans to a bundle: methods at their sites with their budgets, spliced into the neutral graphs and lowered."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from edgecomp.budget import Reduction, Tokens, tokens_of
from edgecomp.ir.graphs import describe, load, save
from edgecomp.lowering import with_dialect
from edgecomp.methods import parameters
from edgecomp.methods.base import Method
from edgecomp.passes.decoder import in_decoder
from edgecomp.passes.encoder import in_encoder
from edgecomp.passes.merge_layers import in_every_layer
from edgecomp.passes.signals import OF_LAYER_BEFORE, needs_prompt
from edgecomp.passes.splice import at_projector
from edgecomp.writer import copy_files, writing
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import SCHEMA, CutInfo, GraphInfo, Manifest, PlanInfo, StepInfo

POSITIONS = ("keep", "compact")
KINDS = ("encoder", "projector", "decoder")  # of sites, in the order in which a picture passes them


@dataclass(frozen=True)
class Stage:
    """One step to make: a method, a budget ('64', or '25%' of a picture's tokens there), a site, and windows with equal shares.

    site: 'encoder:L', 'projector' or 'decoder:L'; without a layer, or empty, where the method stands by default.
    """
    method: Method
    keep: str
    site: str = ""
    windows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Recipe:
    """One plan to make: its stages in the order in which a picture meets them, and what happens to positions."""
    stages: tuple[Stage, ...]
    position: str = "keep"

    @staticmethod
    def of(method: Method, keep: str, site: str = "", position: str = "keep", windows: tuple[int, int] | None = None) -> Recipe:
        """A plan of one step."""
        return Recipe((Stage(method, keep, site, windows),), position)


@dataclass(frozen=True)
class Cut:
    """A step as it will be made: where, before which layer (of encoder or decoder), and what. `label` is the site for people."""
    stage: Stage
    kind: str
    layer: int
    step: Reduction

    @property
    def label(self) -> str:
        return self.kind if self.kind == "projector" else f"{self.kind}:{self.layer}"

    @property
    def in_decoder(self) -> bool:
        """Whether it is made in the decoder's graph: at the projector, a method that reads the prompt stands at the decoder's entrance."""
        return self.kind == "decoder" or needs_prompt(self.stage.method.signals(self.kind))


def planned(recipe: Recipe, manifest: Manifest) -> list[Cut]:
    """A recipe's steps for a model, checked. Raises BudgetError or EdgecompError for what cannot be made, before anything is."""
    if recipe.position not in POSITIONS:
        raise EdgecompError(f"position {recipe.position!r} is none of {', '.join(POSITIONS)}")
    tokens, cuts = Tokens.of(manifest), list[Cut]()
    for stage in recipe.stages:
        kind, layer = _site(stage, manifest)
        budget = tokens_of(stage.keep, tokens.count)
        if stage.windows and kind == "encoder" and stage.method.every_layer:
            raise EdgecompError(f"--windows has no effect on {stage.method.name!r} inside the tower: leave it out")
        made = [(0, budget)] if kind == "projector" else stage.method.stages(layer, layers_of(kind, manifest), tokens.count, budget)
        for where, keep in made:
            step = Reduction.of(stage.method, tokens, keep, kind, stage.windows)
            cuts.append(Cut(stage, kind, where, step))
            tokens = step.after()
    order = [(KINDS.index(cut.kind), cut.layer) for cut in cuts]
    if any(a > b or (a == b and a[0] != 1) for a, b in pairwise(order)):
        raise EdgecompError(f"the steps {', '.join(cut.label for cut in cuts)} do not follow each other as a picture meets them: "
                            "encoder, projector, decoder, each layer later than the one before")
    at_entrance = [cut for cut in cuts if cut.in_decoder and cut.kind == "projector"]
    if at_entrance and cuts.index(at_entrance[0]) != max(n for n, cut in enumerate(cuts) if cut.kind == "projector"):
        raise EdgecompError(f"method {at_entrance[0].stage.method.name!r} reads the prompt, so it is the last step at the projector")
    _by_tile([cut for cut in cuts if not cut.in_decoder], manifest)
    for layer, keep in enumerate(tokens_by_layer(cuts, manifest)):
        if cache_rows(keep, manifest) < 1:
            raise EdgecompError(f"a window of {manifest.decoder.context} rows does not hold one picture's {manifest.vision.tokens} visual tokens "
                                f"(layer {layer}): compile with a larger --context")
    return cuts


def _site(stage: Stage, manifest: Manifest) -> tuple[str, int]:
    """Kind and layer of a stage's site. Raises EdgecompError where there is no such site, or the method cannot stand there."""
    sites = stage.method.taxonomy.sites
    kind, _, number = (stage.site or next(iter(sites))).partition(":")
    if kind not in sites or (kind == "projector" and number) or (number and not number.isdecimal()):
        having = ", ".join(site if site == "projector" else f"{site}:LAYER" for site in sites)
        raise EdgecompError(f"method {stage.method.name!r} cannot stand at {stage.site!r}; it can at {having}")
    if kind == "projector":
        return kind, 0
    layers = layers_of(kind, manifest)
    layer, most = int(number) if number else stage.method.first_layer(kind, layers), layers if kind == "encoder" else layers - 1
    if layer == 0 and not stage.method.every_layer and set(stage.method.signals(kind)) & set(OF_LAYER_BEFORE):
        raise EdgecompError(f"method {stage.method.name!r} reads the layer before its site, and there is none before {kind}:0: use {kind}:1 or later")
    if layer > most:
        raise EdgecompError(f"{kind}:{layer} is behind the last place for a cut, {kind}:{most}, of this model")
    return kind, layer


def layers_of(kind: str, manifest: Manifest) -> int:
    """Layers of the encoder that the projector reads, or of the decoder."""
    return manifest.vision.select_layer + 1 if kind == "encoder" else manifest.decoder.layers


def tokens_by_layer(cuts: Sequence[Cut], manifest: Manifest) -> list[int]:
    """Visual tokens of a picture in each decoder layer."""
    found = [manifest.vision.tokens] * manifest.decoder.layers
    for cut in cuts:
        first = cut.layer if cut.kind == "decoder" else 0
        found[first:] = [cut.step.keep] * (len(found) - first)
    return found


def plan_name(recipe: Recipe, cuts: Sequence[Cut]) -> str:
    """A plan's name: each stage's method, last budget, and whatever differs from the defaults."""
    names = []
    for stage in recipe.stages:
        mine = [cut for cut in cuts if cut.stage is stage]
        parts = [stage.method.name, str(mine[-1].step.keep)]
        for name, default in parameters(type(stage.method)).items():
            if (value := getattr(stage.method, name)) != default:
                parts.append(f"{name}{value}")
        if mine[0].kind != "projector":
            parts.append(mine[0].label.replace(":", ""))
        if stage.windows:
            parts.append(f"windows{stage.windows[0]}x{stage.windows[1]}")
        names.append("-".join(parts))
    return "+".join(names) + ("-compact" if recipe.position == "compact" else "")


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
    wanted = [(recipe, planned(recipe, manifest)) for recipe in recipes]
    if manifest.calibrated and any(cut.kind == "encoder" for _, cuts in wanted for cut in cuts):
        raise EdgecompError(f"the vision tower of {source} is in {manifest.calibrated.activations}, measured without a cut inside it: compress the "
                            "bundle that it was made from, then quantize")
    names = [plan_name(*one) for one in wanted]
    plans, graphs = dict(manifest.plans), dict(manifest.graphs)
    with writing(out) as (partial, finish):
        copy_files(bundle, partial)
        for name, (recipe, cuts) in zip(names, wanted):
            if name not in plans:
                budgets = " and ".join(str(cut.step.keep) + (f" at {cut.label}" if cut.kind != "projector" else "") for cut in cuts)
                say(f"compressing to {budgets} of {manifest.vision.tokens} visual tokens: {name}")
                plans[name] = _plan(name, recipe, cuts, manifest, graphs, partial)
        for dialect in dialects:
            plans = with_dialect(plans, plans, dialect, graphs, partial, say)
        finish(dataclasses.replace(manifest, schema=SCHEMA, plans=plans, graphs=graphs, default_plan=names[0] if names else manifest.default_plan))
    return names


def _plan(name: str, recipe: Recipe, cuts: Sequence[Cut], manifest: Manifest, graphs: dict[str, GraphInfo], partial: Path) -> PlanInfo:
    """Splices one plan's graphs, writes those that differ from the full model's and adds them to `graphs`."""
    files = dict(manifest.plans["full"].variants["neutral"])
    outside, inside = [cut for cut in cuts if not cut.in_decoder], [cut for cut in cuts if cut.in_decoder]
    if outside:
        model = load(partial / files["vision"])
        for cut in outside:
            if cut.kind == "encoder" and cut.stage.method.every_layer:
                in_every_layer(model, manifest.vision, cut.stage.method, cut.layer, cut.step.keep)
            elif cut.kind == "encoder":
                in_encoder(model, manifest.vision, cut.layer, cut.step)
            else:
                at_projector(model, manifest.vision, cut.step)
        files["vision"] = f"graphs/vision.{name}.onnx"
        save(model, partial / files["vision"])
        graphs[files["vision"]] = describe(model)
    if inside:
        model = load(partial / files["prefill"])
        for cut in inside:
            in_decoder(model, manifest.decoder, cut.layer, cut.step, compact=recipe.position == "compact")
        files["prefill"] = files["decode"] = f"graphs/decoder.{name}.onnx"
        save(model, partial / files["prefill"])
        graphs[files["prefill"]] = describe(model)
    steps = tuple(StepInfo(method.name, cut.label, cut.step.keep, {p: getattr(method, p) for p in parameters(type(method))}, cut.stage.windows,
                           needs_prompt(method.signals(cut.kind))) for cut in cuts for method in [cut.stage.method])
    entering = outside[-1].step if outside else None
    tiles = _by_tile(outside, manifest)
    return PlanInfo(steps, recipe.position, entering.keep if entering else manifest.vision.tokens, tiles,
                    tuple(cache_rows(keep, manifest) for keep in tokens_by_layer(cuts, manifest)), {"neutral": files},
                    tuple(CutInfo(cut.layer, by_tile if sum(by_tile) == cut.step.keep else (cut.step.keep,))  # all that came, separators too
                          for cut in inside for by_tile in [cut.step.tile_tokens]))


def _by_tile(cuts: Sequence[Cut], manifest: Manifest) -> tuple[int, ...]:
    """How many tokens of each tile leave the vision graph: known as long as each step knew which tile its tokens were of."""
    found = tuple(tile.tokens for tile in manifest.vision.tiles)
    for cut in cuts:
        if len(cut.step.tile_tokens) == len(found):
            found = cut.step.tile_tokens
        else:
            raise EdgecompError(f"a second step before the decoder needs to know the tile of each token, and this model's {len(found)} tiles are "
                                "packed into one grid: compress once there")
    return found


def cache_rows(keep: int, manifest: Manifest) -> int:
    """Rows of a layer's cache: the window less what one picture saves."""
    return manifest.decoder.context - (manifest.vision.tokens - keep)
