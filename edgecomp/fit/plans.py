"""What can be chosen from: a sweep's plans with their measured accuracy, or budgets alone, each with its prediction for the device."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from edgecomp.devices import Device
from edgecomp.fit.sweeps import Sweep
from edgecomp.predict.model import Shape
from edgecomp.predict.predict import Prediction, Request, predict
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import PlanInfo

USUAL = (64, 128, 192, 256, 576)  # budgets that papers report at
PARTS = (25, 50, 75)  # percent


@dataclass(frozen=True)
class Measured:
    """Accuracy in percent, mean over seeds and of the least and the best one; share: percent of the full model's."""
    accuracy: float
    low: float
    high: float
    share: float
    loses_to: tuple[str, ...]
    sweep: str


@dataclass(frozen=True)
class Choice:
    """What a plan does to a picture's tokens: `keep` are left behind its last site, `mean` over the decoder's layers. method '': any.

    entering: in the decoder's first layer. plans: what it is called in a bundle. measured: in the precisions that `measured_in` has.
    """
    keep: int
    mean: float
    entering: int
    method: str = ""
    parameters: dict[str, int | float | str] = field(default_factory=dict)
    sites: tuple[str, ...] = ()
    position: str = "keep"
    windows: str = ""
    plans: tuple[str, ...] = ()
    measured: Measured | None = None
    measured_in: tuple[str, ...] = ()

    @property
    def in_tower(self) -> bool:
        """Whether it cuts within the vision tower, whose time is predicted as if it did not: an upper bound."""
        return any(site.startswith("encoder") for site in self.sites)

    def as_one_cut(self, tokens: int, layers: int) -> tuple[int, int]:
        """The tokens kept and the decoder layer of the one cut with the same mean over the layers; several cuts have no other prediction.

        What grows with the tokens is exact by it. Attention, which grows by their square, makes the operations of several cuts differ by less than
        half a percent (tests/commands/test_fit.py). `tokens` are there before, in a decoder of so many layers.
        """
        cuts = [int(site.partition(":")[2]) for site in self.sites if site.startswith("decoder")]
        first = min(cuts) if cuts and self.entering == tokens else 0
        first = min(first, layers - 1)
        behind = (self.mean * layers - first * tokens) / (layers - first)
        return min(max(math.ceil(behind - 1e-6), 1), tokens), first


@dataclass(frozen=True)
class Plan:
    """A choice in a precision, predicted. measured: None where accuracy in that precision is not known."""
    choice: Choice
    precision: str
    prediction: Prediction
    measured: Measured | None = None


def budgets(tokens: int) -> list[Choice]:
    """The budgets worth a look where nothing was measured: all, and parts of the visual tokens, and the usual counts below them."""
    counts = {tokens, *(max(1, tokens * part // 100) for part in PARTS), *(count for count in USUAL if count < tokens)} if tokens else {0}
    return [Choice(count, float(count), count) for count in sorted(counts, reverse=True)]


def of_sweeps(sweeps: Sequence[Sweep]) -> list[Choice]:
    """The plans of sweeps; seeds are one, and of what several sweeps have measured in the same precisions the first one's."""
    found: dict[object, Choice] = {}
    for sweep in sweeps:
        for row in sweep.rows:
            measured = Measured(row.accuracy, row.accuracy_low, row.accuracy_high, 100 * row.accuracy / sweep.full.accuracy, row.loses_to,
                                str(sweep.folder))
            found.setdefault((row.plans[0], sweep.precisions), Choice(
                row.keep, row.tokens_mean, row.tokens_entering, row.method, row.parameters, row.sites, row.position, row.windows, row.plans,
                measured, sweep.precisions))
    return [*found.values()]


def of_plan(name: str, plan: PlanInfo, layers: int) -> Choice:
    """A bundle's plan, in a decoder of so many layers."""
    counts = [plan.tokens_at(layer) for layer in range(layers)]
    steps = plan.steps
    windows = "x".join(map(str, steps[0].windows or ())) if steps else ""
    return Choice(counts[-1], sum(counts) / layers, counts[0], "+".join(dict.fromkeys(step.method for step in steps)) or "none",
                  steps[-1].parameters if steps else {}, tuple(dict.fromkeys(step.site for step in steps)), plan.position, windows, (name,))


def precisions(device: Device) -> tuple[str, ...]:
    """What weights are stored in on a device: a GPU computes fp16, and a CPU fp32."""
    return ("fp16" if device.gpu else "fp32", "int8", "int4")


def predicted(shape: Shape, device: Device, request: Request, choices: Sequence[Choice], tokens: int) -> tuple[list[Plan], dict[str, str]]:
    """Every choice in every precision, and why precisions cannot be predicted.

    In a precision that was not measured, only the most accurate of the choices that take the same time is there.

    Args:
        shape: the model's.
        device: where it is to run.
        request: the prompt; its visual tokens are those of whole pictures, of `tokens` each.
        choices: what can be chosen.
        tokens: of a picture.

    Raises:
        EdgecompError: nothing can be predicted.
    """
    found: list[Plan] = []
    refused: dict[str, str] = {}
    pictures = request.visual_tokens // tokens if tokens else 0
    for precision in precisions(device):
        known: dict[tuple[int, int], Prediction] = {}
        for choice in _ordered(choices, precision):
            kept, layer = choice.as_one_cut(tokens, len(shape.layers)) if tokens else (0, 0)
            measured = choice.measured if precision in choice.measured_in else None
            if choice.measured and not measured and (kept, layer) in known:
                continue
            try:
                if (kept, layer) not in known:
                    asked = Request(request.prompt_tokens, request.context, request.visual_tokens, kept * pictures or None, layer)
                    known[kept, layer] = predict(shape, device, asked, weights=precision)
            except EdgecompError as error:
                refused.setdefault(precision, str(error))
                continue
            found.append(Plan(choice, precision, known[kept, layer], measured))
    if not found:
        raise EdgecompError(next(iter(refused.values())))
    return found, refused


def _ordered(choices: Sequence[Choice], precision: str) -> list[Choice]:
    """What was measured in a precision first, then the most accurate; where nothing was measured, as they are."""
    return sorted(choices, key=lambda choice: (precision not in choice.measured_in, -choice.measured.accuracy if choice.measured else 0.0))
