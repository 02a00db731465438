"""A method on a batch of pictures, cut up into tiles and windows: what all sites share."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgecomp.budget import Reduction, places_of
from edgecomp.ir.rewrite import dims
from edgecomp.methods.base import DOMAIN, Averaging, Place
from edgecomp.passes.tape import Tape


@dataclass(frozen=True)
class Signal:
    """A value that a method reads, and which of its axes runs over a picture's tokens: 1, 2, or 0 where it is about the prompt."""
    value: ir.Value
    tokens: int = 1


@dataclass(frozen=True)
class Applied:
    """What a method made of pictures [B]: tokens [B, K, D], their places [B, K], and for one part the order of choice [B, K]."""
    tokens: ir.Value
    kept: ir.Value
    order: ir.Value | None


class Application:
    """One method on pictures whose N tokens form `parts`.

    Tiles and windows of one shape and budget go through it as one batch. What is kept of all of them goes on in the order
    that it had; separators between tiles (row newlines) go.
    """

    def __init__(self, model: ir.Model, step: Reduction):
        self.tape, self.method, self.parts, self.tokens, self.nothing = Tape(model), step.method, step.parts, step.tokens.count, step.nothing

    def __call__(self, features: ir.Value, signals: Sequence[Signal] = ()) -> Applied:
        """Adds the method's nodes: features [B, N, D] and signals -> tokens and places. Nothing is done where all goes on, separators too."""
        if self.nothing:
            return Applied(features, every_place(self.tape.model, features), None)
        if len(self.parts) == 1 and self.parts[0].place.tokens == self.tokens:
            return Applied(*self._call(self.parts[0].place, features, signals))
        groups = [self._group(features, signals, place) for place in dict.fromkeys(part.place for part in self.parts)]
        tokens, kept = (self.tape.add("Concat", *values, axis=1) for values in zip(*groups))
        # ONNX has no sort; places below 2^24 are exact as floats, which every backend's TopK takes
        count = self.tape.ints([sum(part.place.keep for part in self.parts)])
        ascending, order = self.tape.add_many("TopK", 2, self.tape.add("Cast", kept, to=ir.DataType.FLOAT), count, axis=1, largest=0, sorted=1)
        return Applied(self.gather(tokens, order), self.tape.add("Cast", ascending, to=ir.DataType.INT64), None)

    def follow(self, stacked: ir.Value, applied: Applied) -> ir.Value:
        """Other features [B, N, D] of what is kept: the same constant averages, or the rows of the places."""
        return self(stacked).tokens if self.nothing or isinstance(self.method, Averaging) else self.gather(stacked, applied.kept)

    def gather(self, features: ir.Value, indices: ir.Value) -> ir.Value:
        """features [B, N, D], indices [B, K] -> [B, K, D]."""
        return self.tape.add("GatherND", features, self.tape.add("Unsqueeze", indices, self.tape.ints([2])), batch_dims=1)

    def _call(self, place: Place, features: ir.Value, signals: Sequence[Signal]) -> Sequence[ir.Value]:
        function = self.method.function(place)
        self.tape.model.functions[function.identifier()] = function
        self.tape.model.opset_imports[DOMAIN] = 1
        return self.tape.add_many(function.name, 3, features, *(s.value for s in signals), domain=DOMAIN)

    def _group(self, features: ir.Value, signals: Sequence[Signal], place: Place) -> tuple[ir.Value, ir.Value]:
        """What is kept of the parts of one shape and budget: tokens [B, parts * k, D] and places [B, parts * k]."""
        ints, add = self.tape.ints, self.tape.add
        every = np.stack([places_of(part.tile) for part in self.parts if part.place == place])  # [parts, n]
        width = dims(features)[-1]
        mine = add("Reshape", add("Gather", features, ints(every.reshape(-1)), axis=1), ints([-1, place.tokens, width]))
        tokens, kept, _ = self._call(place, mine, [self._part(signal, every) for signal in signals])  # [B * parts, k, D], [B * parts, k]
        by_part = add("Reshape", kept, ints([-1, len(every), place.keep]))
        flat = add("Add", by_part, ints((np.arange(len(every)) * place.tokens)[None, :, None]))
        places = add("Gather", ints(every.reshape(-1)), flat, axis=0)
        return (add("Reshape", tokens, ints([-1, len(every) * place.keep, width])),
                add("Reshape", places, ints([-1, len(every) * place.keep])))

    def _part(self, signal: Signal, every: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> Signal:
        """A signal of pictures [B] as one of their parts [B * parts]."""
        ints, add = self.tape.ints, self.tape.add
        (count, n), value = every.shape, signal.value
        if signal.tokens == 1:  # [B, N] or [B, N, d]
            mine = add("Gather", value, ints(every.reshape(-1)), axis=1)
            tail = dims(value)[2:]
            return Signal(add("Reshape", mine, ints([-1, n, *tail])))
        rows = add("Shape", value, start=1, end=2)  # of the prompt
        if signal.tokens == 2:  # [B, T, N]
            mine = add("Gather", value, ints(every.reshape(-1)), axis=2)
            split = add("Reshape", mine, ints([0, 0, count, n]))
            by_part, last = add("Transpose", split, perm=[0, 2, 1, 3]), n
        else:  # [B, T, D]
            last = dims(value)[-1]  # type: ignore[assignment]
            by_part = add("Expand", add("Unsqueeze", value, ints([1])), ints([1, count, 1, 1]))
        return Signal(add("Reshape", by_part, add("Concat", ints([-1]), rows, ints([last]), axis=0)), signal.tokens)


def every_place(model: ir.Model, features: ir.Value) -> ir.Value:
    """All places of each image [images, N], for features [images, N, D]."""
    tape, count = Tape(model), dims(features)[1]
    assert isinstance(count, int)
    shape = tape.add("Concat", tape.add("Shape", features, start=0, end=1), tape.ints([1]), axis=0)
    return tape.add("Expand", tape.ints(np.arange(count)[None]), shape)
