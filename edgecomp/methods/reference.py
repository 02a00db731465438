"""Running a method's numpy rule: by itself, or along the choices that a graph made, to see where the two could part."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecomp.methods.base import Merging, Method, Place, Rule, Selection, Step


@dataclass(frozen=True)
class StepCheck:
    """One step of a graph's trajectory against the rule given the same history.

    margin: by how much the rule's worst choice is better than the best that it leaves, or than the graph's worst where the two differ,
    relative to the larger of the two in size, in float64; or that of a decision which the scores rest on. The smaller, the nearer to a tie.
    """
    agrees: bool
    margin: float


def best(step: Step) -> NDArray[np.int64]:
    """The step's choice by the rule: highest first, ties to the lower index."""
    return np.argsort(-step.scores, kind="stable")[:step.count]


def select(rule: Rule) -> NDArray[np.int64]:
    """The rule's own trajectory: indices [K] in the order of choice."""
    return np.concatenate([choice for _, choice in _run(rule, None)])


def follow(rule: Rule, order: NDArray[np.int64]) -> list[StepCheck]:
    """Checks a trajectory [K] step by step, each step given the trajectory's own choices so far."""
    checks = []
    for step, choice in _run(rule, order):
        mine = best(step)
        ranked = np.sort(step.scores)[::-1]
        agrees = set(mine) == set(choice)
        worst, left = ranked[step.count - 1], ranked[step.count] if step.count < len(ranked) else -np.inf
        left = left if agrees else step.scores[choice].min()
        margin = (worst - left) / max(abs(worst), abs(left), step.size) if np.isfinite(left) else np.inf
        checks.append(StepCheck(agrees, float(min(margin, step.margin))))
    return checks


def compress(method: Method, place: Place, features: NDArray[Any], *signals: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The method in numpy, for one image: features [N, D] -> tokens [K, D] and the positions [K] they take, ascending."""
    wide = [values.astype(np.float64) for values in (features, *signals)]
    if isinstance(method, Merging):
        weights, places = method.matrix(place, *wide)
        return weights @ features, places
    assert isinstance(method, Selection)
    rule = method.rule(place, *wide)
    kept = np.sort(select(rule))
    return features[kept], kept


def _run(rule: Rule, order: NDArray[np.int64] | None) -> Iterator[tuple[Step, NDArray[np.int64]]]:
    at, step = 0, next(rule, None)
    while step is not None:
        choice = best(step) if order is None else order[at: at + step.count]
        at += step.count
        yield step, choice
        try:
            step = rule.send(choice)
        except StopIteration:
            step = None
