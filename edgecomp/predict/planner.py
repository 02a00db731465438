"""Buffers for the values that a graph computes, planned as onnxruntime's CPU provider plans them, from the steps alone.

onnxruntime decides before the first run which values share a buffer: one takes over that of another with the same shape and type that is
read no more, so that a buffer which is taken over lives on.
"""
from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Made:
    """A value: what names it, its kind (values of one kind can share a buffer), its bytes."""
    name: Hashable
    kind: Hashable
    size: float


@dataclass(frozen=True)
class Step:
    """One node: the values that it makes, the names of those that it reads, and over which of these it may write.

    view: the value that it makes is another look at the bytes of the first that it reads. copied: bytes that it takes for itself.
    """
    made: tuple[Made, ...]
    reads: tuple[Hashable, ...]
    over: tuple[Hashable, ...] = ()
    view: bool = False
    copied: float = 0.0


@dataclass
class _Buffer:
    """Bytes that are taken from step `start` to step `end`, and by how many values now."""
    size: float
    start: int
    end: int
    readers: int = 0


def most_bytes(steps: Sequence[Step]) -> float:
    """The most bytes that values take at a time, with the most that a step takes for itself. Values that nothing reads take none, and neither
    do those that no step makes."""
    buffers = _planned(steps)
    change = [0.0] * (len(steps) + 1)
    for buffer in buffers:
        change[buffer.start] += buffer.size
        change[buffer.end + 1] -= buffer.size
    peak = taken = 0.0
    for each in change:
        taken += each
        peak = max(peak, taken)
    return peak + max((step.copied for step in steps), default=0.0)


def _planned(steps: Sequence[Step]) -> list[_Buffer]:
    last = {name: at for at, step in enumerate(steps) for name in step.reads}
    found: list[_Buffer] = []
    holding: dict[Hashable, _Buffer] = {}
    kinds: dict[Hashable, Hashable] = {}
    free: dict[Hashable, list[_Buffer]] = {}
    for at, step in enumerate(steps):
        for value in step.made:
            if value.name not in last or (step.view and step.reads[0] not in holding):
                continue  # a look at what is outside takes nothing
            buffer = _taken_over(step, value, at, last, holding) or (free[value.kind].pop() if free.get(value.kind) else None)
            if buffer is None:
                buffer = _Buffer(value.size, at, at)
                found.append(buffer)
            holding[value.name], kinds[value.name] = buffer, value.kind
            buffer.readers += 1
            buffer.end = max(buffer.end, last[value.name])
        for name in dict.fromkeys(step.reads):
            if name in holding and last[name] == at:
                holding[name].readers -= 1
                if not holding[name].readers:
                    free.setdefault(kinds[name], []).append(holding[name])
    return found


def _taken_over(step: Step, value: Made, at: int, last: dict[Hashable, int], holding: dict[Hashable, _Buffer]) -> _Buffer | None:
    """The buffer of an input that the result lies in."""
    if step.view:
        return holding[step.reads[0]]
    for name in step.over:
        buffer = holding.get(name)
        if buffer and last[name] == at and buffer.readers == 1 and buffer.size == value.size:
            return buffer
    return None
