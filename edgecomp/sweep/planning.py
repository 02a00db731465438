"""From combinations to cells: what each needs beside it, what cannot be made, and one bundle with all that can."""
from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path

from edgecomp import methods
from edgecomp.budget import nearest, tokens_of
from edgecomp.compress import Cut, Recipe, Stage, compress, plan_name, planned
from edgecomp.methods.base import BudgetError, Method
from edgecomp.sweep.job import FILE, Cell, Skipped
from edgecomp_runtime.bundle import MANIFEST, Bundle
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import Manifest

EXPORTER, CHECKPOINT = "edgecomp_export.export", "edgecomp_export.checkpoint"  # names only: the compiler does not depend on torch
SEEDS = (0, 1, 2)
Say = Callable[[str], None]


def combinations(chosen: Sequence[Method], keeps: Sequence[str], sites: Sequence[str] = ("",), positions: Sequence[str] = ("keep",),
                 windows: Sequence[tuple[int, int] | None] = (None,), seeds: Sequence[int] = SEEDS) -> list[Recipe]:
    """Every method at every site with every budget; those with a seed once for each seed."""
    seeded = [one for method in chosen for one in with_seeds(method, seeds)]
    return [Recipe.of(method, keep, site, position, None if window == (1, 1) else window)
            for method, site, window, position, keep in product(seeded, sites, windows, positions, keeps)]


def with_seeds(method: Method, seeds: Sequence[int]) -> list[Method]:
    """A method once for each seed, or as it is where it has none."""
    return [methods.make(method.name, **{**_values(method), "seed": seed}) for seed in seeds] if hasattr(method, "seed") else [method]


class Plans:
    """Plans to make for a model, in order, each once.

    Attributes:
        cells: what is to be measured, by plan; 'full' first.
        recipes: how each is made.
        skipped: combinations that cannot be made.
    """

    def __init__(self, manifest: Manifest, seeds: Sequence[int] = SEEDS):
        self._manifest, self._seeds = manifest, seeds
        self.recipes: dict[str, Recipe] = {}
        self.timing: dict[str, Recipe] = {}  # made for the timing of others only
        self.skipped: list[Skipped] = []
        self.cells = {"full": Cell("full", "none", {}, None, "", (), "keep", "", manifest.vision.tokens, (), "", "", "", False, None)}

    def add(self, recipes: Iterable[Recipe]) -> None:
        """Adds combinations, each with `random` and `pool` at its budget and site, and `pool` at the projector."""
        for recipe in recipes:
            try:
                made, cuts, budget = fitted(recipe, self._manifest)
            except EdgecompError as error:
                self._skip(combination(recipe), error)
                continue
            self._cell(made, cuts, budget)
            site = next(cut.label for cut in cuts if cut.stage is made.stages[-1])
            beside = [(one, site) for one in with_seeds(methods.make("random"), self._seeds)]
            for method, where in [*beside, *((methods.make("pool"), at) for at in dict.fromkeys((site, "projector")))]:
                baseline = Recipe.of(method, str(budget), where, recipe.position)
                try:
                    self._cell(*fitted(baseline, self._manifest))
                except EdgecompError as error:
                    self._skip(combination(baseline), error)

    def _skip(self, what: str, error: EdgecompError) -> None:
        said = Skipped(what, str(error))
        self.skipped += [said] if said not in self.skipped else []

    def _cell(self, recipe: Recipe, cuts: Sequence[Cut], budget: int) -> None:
        name, keep, last = plan_name(recipe, cuts), cuts[-1].step.keep, recipe.stages[-1]
        twin = as_constants(cuts, recipe.position, self._seeds[0])
        try:
            timing = plan_name(twin, planned(twin, self._manifest))
            self.timing[timing] = twin
        except EdgecompError:
            timing = None
        budgets = {*(self.cells[name].budgets if name in self.cells else ()), budget}
        facts = last.method.taxonomy
        values = {key: value for key, value in _values(last.method).items() if key != "seed"}
        self.recipes[name] = recipe
        self.cells[name] = Cell(
            name, "+".join(dict.fromkeys(stage.method.name for stage in recipe.stages)), values, getattr(last.method, "seed", None),
            next(cut.label for cut in cuts if cut.stage is last), tuple(cut.label for cut in cuts), recipe.position,
            "x".join(map(str, recipe.stages[0].windows or ())), keep, () if budgets == {keep} else tuple(sorted(budgets)),
            facts.summary, facts.paper, facts.kind, facts.parametric, timing)


def fitted(recipe: Recipe, manifest: Manifest) -> tuple[Recipe, list[Cut], int]:
    """A recipe that can be made with its cuts, and the budget that was asked for.

    A method that makes certain budgets of a grid only gets the nearest. Raises EdgecompError where that does not help.
    """
    try:
        cuts = planned(recipe, manifest)
        return recipe, cuts, cuts[-1].step.keep
    except BudgetError:
        only = recipe.stages[0]
        if len(recipe.stages) > 1 or not only.method.taxonomy.grid:
            raise
        budget = tokens_of(only.keep, manifest.vision.tokens)
        near = dataclasses.replace(recipe, stages=(dataclasses.replace(only, keep=str(nearest(manifest, only.method, budget))),))
        return near, planned(near, manifest), budget


def as_constants(cuts: Sequence[Cut], position: str, seed: int) -> Recipe:
    """A recipe that keeps as many tokens at the same sites by chance, in the same graph: beside it a plan's own nodes show."""
    random = methods.make("random", seed=seed)
    return Recipe(tuple(Stage(random, str(cut.step.keep), f"decoder:{cut.layer}" if cut.in_decoder else cut.label) for cut in cuts), position)


def combination(recipe: Recipe) -> str:
    """A recipe in words, before it is known whether it can be made."""
    def one(stage: Stage) -> str:
        defaults = methods.parameters(type(stage.method))
        values = ",".join(f"{key}={value}" for key, value in _values(stage.method).items() if value != defaults[key])
        windows = f" in {stage.windows[0]}x{stage.windows[1]} windows" if stage.windows else ""
        return f"{stage.method.name}{':' + values if values else ''} to {stage.keep}{' at ' + stage.site if stage.site else ''}{windows}"
    return ", then ".join(map(one, recipe.stages)) + (", compact" if recipe.position == "compact" else "")


def neutral(model: str, folder: Path, say: Say) -> Bundle:
    """The sweep's bundle, without new plans: exported, copied from another bundle, or the one that is there if it is of the same model.

    Raises EdgecompError where the folder holds something else.
    """
    if folder.exists() and not (folder.is_dir() and ((folder / FILE).is_file() or (folder / "bundle").exists() or not any(folder.iterdir()))):
        raise EdgecompError(f"{folder} exists and is no sweep: choose another name, or remove it first")
    path, source = folder / "bundle", Path(model)
    there = Bundle.open(path) if (path / MANIFEST).is_file() else None
    if (source / MANIFEST).is_file():
        given = Bundle.open(source)
        if there is None or _neutral_files(there.manifest) != _neutral_files(given.manifest):
            _renewed(there, say)
            compress(source, path, [], say=say)
    else:
        checkpoint = importlib.import_module(CHECKPOINT)
        if there is None or there.manifest.source.sha256 != checkpoint.fingerprint(checkpoint.find(model)):
            _renewed(there, say)
            importlib.import_module(EXPORTER).export(model, path, say=say)
    return Bundle.open(path)


def make(bundle: Bundle, plans: Plans, say: Say, timed: bool = True) -> None:
    """Adds the plans to the bundle, one at a time: what is made stays made. Those that turn out to be impossible become skipped ones."""
    wanted = plans.recipes | ({name: recipe for name, recipe in plans.timing.items() if name not in plans.recipes} if timed else {})
    for name, recipe in {"": None, **wanted}.items():
        manifest = Bundle.open(bundle.path).manifest
        there = manifest.plans.get(name or "full")
        if there is not None and "onnxruntime" in there.variants:
            continue
        try:
            compress(bundle.path, bundle.path, [recipe] if recipe else [], say=say)
        except EdgecompError as error:
            if plans.cells.pop(name, None):
                plans.skipped.append(Skipped(combination(wanted[name]), str(error)))
            plans.cells = {n: dataclasses.replace(c, timing=None) if c.timing == name else c for n, c in plans.cells.items()}


def _renewed(there: Bundle | None, say: Say) -> None:
    if there is not None:
        say(f"{there.path} is of another model than the one given: it is made again")


def _neutral_files(manifest: Manifest) -> list[str]:
    """Hashes of all that the uncompressed model is made of."""
    files = {*manifest.plans["full"].variants["neutral"].values(), manifest.text.tokenizer, manifest.embeddings.file, manifest.text.chat_template}
    files |= {name for name in manifest.files if name.endswith(".bin")}
    return [manifest.files[name].sha256 for name in sorted(f for f in files if f)]


def _values(method: Method) -> dict[str, int | float | str]:
    return {name: getattr(method, name) for name in methods.parameters(type(method))}
