"""A model, a device and limits: the plans that there are, predicted, and the answer."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgecomp.devices import Device
from edgecomp.fit.answer import Answer, answer, order, sure
from edgecomp.fit.limits import NO, Limit
from edgecomp.fit.plans import Plan, budgets, of_plan, of_sweeps, predicted
from edgecomp.fit.sweeps import Sweep, check
from edgecomp.predict.model import Shape
from edgecomp.predict.predict import Request, read_config
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.errors import EdgecompError, InputError

TEXT_ROWS = 64  # of a question beside the picture, where --prompt-tokens does not say


@dataclass(frozen=True)
class Found:
    """What was found.

    tokens: of a picture. limits: with the device's own memory. looked_at: how many plans the answer is from. bundle: whether they are a
    bundle's own, whose graphs were counted. answer: of the plans whose accuracy is known, or, where none is, of all. not_measured: beside
    these, plans whose accuracy is not known and that meet all other limits. refused: precisions or plans that cannot be predicted, and
    why. absent: how many plans of the sweeps a bundle does not have.
    """
    device: Device
    request: Request
    tokens: int
    sweeps: tuple[Sweep, ...]
    limits: tuple[Limit, ...]
    looked_at: int
    bundle: bool
    answer: Answer
    not_measured: tuple[Plan, ...]
    refused: dict[str, str]
    absent: int = 0


def of_config(path: Path, device: Device, limits: Sequence[Limit], sweeps: Sequence[Sweep], *, prompt_tokens: int | None = None,
              context: int | None = None, visual_tokens: int | None = None) -> Found:
    """Plans of a config.json: those of the sweeps, or budgets.

    Args:
        path: the config, or a folder that has it.
        device: where it is to run.
        limits: what it has to meet.
        sweeps: of this model.
        prompt_tokens: rows of the prompt. Default: the pictures' and a question of 64.
        context: rows of the window. Default: the prompt's.
        visual_tokens: of all pictures in the prompt. Default: one picture's of the sweeps.

    Raises:
        EdgecompError: what `predict` raises, a sweep of another model, or a request that contradicts itself.
    """
    _check_measured(path, limits, sweeps)
    shape = Shape.of_config(read_config(path))
    for sweep in sweeps:
        check(sweep, shape.family, len(shape.layers), shape.hidden)
    tokens = sweeps[0].about.tokens if sweeps else visual_tokens or 0
    visual = tokens if visual_tokens is None else visual_tokens
    if shape.tower and not visual:
        raise InputError(f"{shape.family} sees pictures: say with --visual-tokens how many tokens those of a prompt have, or give a --sweep")
    if sweeps and visual % tokens:
        raise InputError(f"--visual-tokens {visual} are no whole pictures: the sweep's have {tokens} each")
    rows = visual + TEXT_ROWS if prompt_tokens is None else prompt_tokens
    request = Request(rows, rows if context is None else context, visual)
    choices = of_sweeps(sweeps) or budgets(tokens)
    plans, refused = predicted(shape, device, request, choices, tokens)
    return found(device, request, tokens, sweeps, limits, plans, refused)


def of_bundle(bundle: Bundle, device: Device, limits: Sequence[Limit], sweeps: Sequence[Sweep], *, prompt_tokens: int | None = None,
              context: int | None = None, done: Callable[[], None] = lambda: None) -> Found:
    """A bundle's own plans, by its graphs; accuracy where a sweep has measured a plan of that name and size. Seeds are one.

    Args:
        bundle: an open bundle.
        device: where it is to run.
        limits: what it has to meet.
        sweeps: of this model.
        prompt_tokens: rows of the prompt. Default: a picture's and a question of 64.
        context: rows of the window. Default: the prompt's.
        done: called for each plan.

    Raises:
        EdgecompError: what predicting raises for all plans, or a sweep of another model.
    """
    from edgecomp.predict.bundles import of_bundle as predicted_of
    manifest = bundle.manifest
    _check_measured(bundle.path, limits, sweeps)
    for sweep in sweeps:
        check(sweep, manifest.source.family, manifest.decoder.layers, manifest.decoder.hidden, manifest.vision.tokens)
    tokens = manifest.vision.tokens
    rows = tokens + TEXT_ROWS if prompt_tokens is None else prompt_tokens
    request = Request(rows, rows if context is None else context, tokens)
    stored = manifest.weights
    swept = of_sweeps(sweeps)
    measured = {name: choice for choice in reversed(swept) if stored in choice.measured_in for name in choice.plans}
    plans: list[Plan] = []
    refused: dict[str, str] = {}
    for name, info in manifest.plans.items():
        choice = of_plan(name, info, manifest.decoder.layers)
        same = measured.get(name)
        if same and (same.keep, same.entering, round(same.mean, 6)) == (choice.keep, choice.entering, round(choice.mean, 6)):
            choice = same
        if not any(choice is plan.choice for plan in plans):  # else another seed
            try:
                predicted = predicted_of(bundle, name, device, request)
                plans.append(Plan(choice, stored, predicted, choice.measured))
            except EdgecompError as error:
                refused[name] = str(error)
        done()
    if not plans:
        raise EdgecompError(next(iter(refused.values())))
    known = {name for plan in plans for name in plan.choice.plans}
    absent = sum(known.isdisjoint(choice.plans) for choice in swept)
    return found(device, request, tokens, sweeps, limits, plans, refused, bundle=True, absent=absent)


def to_sweep(model: Path) -> str:
    """What `edgecomp sweep` takes for a model, which a config.json alone is not."""
    return str(model) if model.is_dir() else "MODEL"


def _check_measured(model: Path, limits: Sequence[Limit], sweeps: Sequence[Sweep]) -> None:
    """Raises InputError where accuracy is asked for and none is known."""
    if not sweeps and (lacking := [limit for limit in limits if limit.least]):
        raise InputError(f"{lacking[0].name} {lacking[0].text} needs accuracies, which only a sweep has: `edgecomp sweep {to_sweep(model)} -o FOLDER "
                         "--method NAME --keep K --data QUESTIONS` measures them; then add --sweep FOLDER")


def found(device: Device, request: Request, tokens: int, sweeps: Sequence[Sweep], limits: Sequence[Limit], plans: Sequence[Plan],
          refused: dict[str, str], *, bundle: bool = False, absent: int = 0) -> Found:
    """Puts the answer together."""
    limits = (*limits, own_memory(device, limits, plans[0].prediction.usable_bytes))
    known = [plan for plan in plans if plan.measured]
    if sweeps and not known and (asked := [limit for limit in limits if limit.least]):
        reasons = [refused[precision] for sweep in sweeps for precision in sweep.precisions if precision in refused]
        raise InputError(f"{asked[0].name} {asked[0].text}: none of the plans was measured in {plans[0].precision}, but in "
                         f"{' and '.join(dict.fromkeys(sweep.precision for sweep in sweeps))}"
                         + (f", which cannot be predicted ({reasons[0]})" if reasons else "")
                         + f": sweep {'this bundle' if bundle else f'the model in {plans[0].precision}'}, or leave the limit out")
    known = known or list(plans)
    rest = [limit for limit in limits if not limit.least]
    others = [plan for plan in plans if known[0].measured and not plan.measured and sure(plan, rest) != NO]
    return Found(device, request, tokens, tuple(sweeps), limits, len(known), bundle, answer(known, limits),
                 tuple(sorted(others, key=lambda plan: order(plan, rest))), refused, absent)


def own_memory(device: Device, limits: Sequence[Limit], usable: float) -> Limit:
    """What a device has beside its system, as a limit. Raises InputError where more than that was asked for, which would have no effect."""
    own = Limit("memory_bytes", f"the memory of {device.label}", f"{usable / 2**30:.2f}GiB", usable)
    for limit in limits:
        if limit.quantity == own.quantity and limit.value > usable * 1.01:  # what is suggested is rounded up to three digits
            raise InputError(f"{limit.name} {limit.text} is more than the {own.text} that {device.label} has beside its system: leave it out, or ask "
                             "for less")
    return own
