"""What meets all limits, best first; where nothing does, what comes closest, and what to relax by how much."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgecomp.fit.limits import NO, SURELY, Limit
from edgecomp.fit.plans import Plan
from edgecomp.predict.work import FORMATS


@dataclass(frozen=True)
class Relax:
    """A limit, and what it would have to be for `plan` to meet it. alone: that is enough; else all that are named have to give together."""
    limit: Limit
    value: float
    plan: Plan
    alone: bool

    @property
    def text(self) -> str:
        """The new limit, as its option takes it."""
        return self.limit.words(self.value)


@dataclass(frozen=True)
class Answer:
    """meets: plans that meet all limits, best first. closest, relax: where there are none."""
    meets: tuple[Plan, ...]
    closest: Plan | None
    relax: tuple[Relax, ...]


def answer(plans: Sequence[Plan], limits: Sequence[Limit]) -> Answer:
    """Ranks plans. There must be at least one."""
    meets = tuple(sorted((plan for plan in plans if sure(plan, limits) != NO), key=lambda plan: order(plan, limits)))
    if meets:
        return Answer(meets, None, ())
    closest = min(plans, key=lambda plan: (sum(limit.excess(plan) for limit in limits), order(plan, limits)))
    return Answer((), closest, tuple(relax(plans, limits, closest)))


def sure(plan: Plan, limits: Sequence[Limit]) -> str:
    """'surely' where a plan surely meets every limit, 'likely' where it meets every one, or 'no'."""
    found = {limit.met(plan) for limit in limits}
    return NO if NO in found else SURELY if found <= {SURELY} else "likely"


def order(plan: Plan, limits: Sequence[Limit]) -> tuple[float, ...]:
    """By measured accuracy, then surely before likely, then time to the first token; behind them plans whose accuracy is not known, by
    precision, then the accuracy in another, then tokens, of which more lose less."""
    took = plan.prediction.ttft_ms.value
    if plan.measured is None:
        elsewhere = plan.choice.measured
        return (1, -FORMATS[plan.precision].bits, -elsewhere.accuracy if elsewhere else 0.0, -plan.choice.mean, took)
    return (0, -plan.measured.accuracy, sure(plan, limits) != SURELY, took)


def relax(plans: Sequence[Plan], limits: Sequence[Limit], closest: Plan) -> list[Relax]:
    """For each limit by which alone all could be met the least that it has to give; where there is none, all that `closest` does not meet."""
    found = []
    for limit in limits:
        others = [other for other in limits if other is not limit]
        values = [(value, plan) for plan in plans if sure(plan, others) != NO and (value := limit.of(plan)) is not None]
        if values:
            value, plan = min(values, key=lambda one: (-one[0] if limit.least else one[0], order(one[1], limits)))
            found.append(Relax(limit, value, plan, alone=True))
    return found or [Relax(limit, value, closest, alone=False) for limit in limits
                     if limit.met(closest) == NO and (value := limit.of(closest)) is not None]
