"""What a compression method is: a rule, written twice (as graph operators and in numpy), and facts about it as data."""
from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import onnxscript
from numpy.typing import NDArray

from edgecomp_runtime.errors import EdgecompError

OPSETS = {"": 23}
DOMAIN = "edgecomp.methods"
EVERYWHERE: Mapping[str, tuple[str, ...]] = {"projector": (), "encoder": (), "decoder": ()}  # sites of methods that read nothing but features
DECODER_LAYER = 2  # where FastV, DART and most after them cut
TAKEN = -1e30  # the score of a token that cannot be chosen (again); every real score is far above


class BudgetError(EdgecompError):
    """A budget that is no count, is outside 1..N, or that a method cannot make of this grid."""


Op = Any  # onnxscript's OpBuilder finds operators by attribute, so it has no static type to offer


@dataclass(frozen=True)
class Place:
    """Where a method stands, all of it static: the token grid (rows, columns), how many of its tokens go on, and the kind of site.

    Tokens that an earlier step has chosen have no grid any more: they are one row.
    """
    grid: tuple[int, int]
    keep: int
    site: str = "projector"

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Taxonomy:
    """How the literature would file a method (arXiv 2505.19147, section 4), and what it needs.

    kind: 'pruning' or 'merging'. parametric: it has trained weights of its own. sites: each kind of place where it can stand
    ('encoder', 'projector', 'decoder'; the first is its default), with the graph values that it reads there beside the features:
    names of `edgecomp.passes.signals`. grid: it needs tokens that form a grid.
    """
    summary: str
    paper: str
    kind: str
    parametric: bool = False
    sites: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"projector": ()})
    grid: bool = False


@dataclass(frozen=True)
class Step:
    """One choice of a rule: the `count` best of `scores` [N] (float64; -inf: cannot be chosen), ties to the lower index.

    size: of the numbers that scores near zero are differences of, as cosines are; what margins are relative to at least.
    margin: of the closest decision that the scores rest on, where there was one.
    """
    scores: NDArray[np.float64]
    count: int
    size: float = 1e-30
    margin: float = np.inf


Rule = Generator[Step, NDArray[np.int64], None]


class Method(ABC):
    """One way to make K visual tokens of N. Subclasses are frozen dataclasses of their parameters."""

    name: ClassVar[str]
    taxonomy: ClassVar[Taxonomy]
    every_layer: ClassVar[bool] = False  # in the encoder it works in each layer from its site on

    def check(self, place: Place) -> None:  # noqa: B027 - most methods take any budget
        """Raises BudgetError where the method cannot make this many tokens."""

    def cells(self, place: Place) -> tuple[int, int] | None:
        """The grid (rows, columns) that the tokens form which are left; None where they form none."""
        return None

    def signals(self, site: str) -> tuple[str, ...]:
        """The graph values that the method reads at a kind of site, beside the features."""
        return self.taxonomy.sites[site]

    def first_layer(self, site: str, layers: int) -> int:
        """Where the method stands by default in an encoder or decoder of so many layers: behind the one, early in the other."""
        return layers if site == "encoder" else min(DECODER_LAYER, layers - 1)

    def stages(self, layer: int, layers: int, tokens: int, keep: int) -> list[tuple[int, int]]:
        """The cuts (layer, keep) that the method makes in a stack of so many layers when it is to cut before `layer`; the last keeps K.

        Raises:
            BudgetError: it cannot make so many.
        """
        return [(layer, keep)]

    @abstractmethod
    def build(self, op: Op, place: Place, features: ir.Value, *signals: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Adds the rule's operators: features [B, N, D] and signals -> tokens [B, K, D], kept [B, K] ascending, order [B, K].

        `kept` are the places of the tokens, `order` the same in the order of choice.
        """

    def function(self, place: Place) -> ir.Function:
        """The method as an ONNX function of the features and its signals."""
        inputs = [ir.Value(name=name) for name in ("features", *(s.replace(":", "_") for s in self.signals(place.site)))]
        name = re.sub(r"\W+", "_", f"{self!r}{place.site}{place.grid[0]}x{place.grid[1]}to{place.keep}")
        return onnxscript.build_function(lambda op, *values: self.build(op, place, *values), inputs, domain=DOMAIN, name=name, opset_imports=OPSETS)


class Selection(Method):
    """A method whose tokens are some of the features, unchanged and in raster order."""

    @abstractmethod
    def choose(self, op: Op, place: Place, features: ir.Value, *signals: ir.Value) -> ir.Value:
        """Adds the rule's operators. features [B, N, D] float32 -> indices [B, K] int64, in the order of choice."""

    @abstractmethod
    def rule(self, place: Place, features: NDArray[np.float64], *signals: NDArray[np.float64]) -> Rule:
        """The same rule in numpy, for one image: yields each Step, is sent the indices that were chosen."""

    def build(self, op: Op, place: Place, features: ir.Value, *signals: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        order = self.choose(op, place, wide(op, features), *(wide(op, s) for s in signals))
        kept = ascending(op, order, place.keep)
        return gather(op, features, kept), kept, order


class Largest(Selection):
    """A selection of the K largest of its one signal [B, N]."""

    def choose(self, op: Op, place: Place, features: ir.Value, *signals: ir.Value) -> ir.Value:
        return top(op, signals[0], place.keep)

    def rule(self, place: Place, features: NDArray[np.float64], *signals: NDArray[np.float64]) -> Rule:
        yield Step(signals[0], place.keep)


class Merging(Method):
    """A method whose tokens are weighted sums of features; each takes the place of one of its sources."""

    @abstractmethod
    def matrix(self, place: Place, features: NDArray[np.float64], *signals: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The rule in numpy, for one image: the weights [K, N] of the sources in each token, and the places [K] they take, ascending."""


class Averaging(Merging):
    """A merging whose weights are constants of the grid: rows sum to 1, columns to K / N."""

    @abstractmethod
    def weights(self, place: Place) -> NDArray[np.float64]:
        """The averaging matrix [K, N]."""

    @abstractmethod
    def places(self, place: Place) -> NDArray[np.int64]:
        """The raster place [K] that each token takes: one of its sources, ascending."""

    def matrix(self, place: Place, features: NDArray[np.float64], *signals: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        return self.weights(place), self.places(place)


def wide(op: Op, value: ir.Value) -> ir.Value:
    """A value in fp32: rules are computed in it whatever the model's precision."""
    return op.Cast(value, to=ir.DataType.FLOAT)  # type: ignore[no-any-return]


def ascending(op: Op, indices: ir.Value, count: int) -> ir.Value:
    """Indices [B, K] in ascending order. ONNX has no sort; below 2^24 they are exact as floats, which every backend's TopK takes."""
    found, _ = op.TopK(op.Cast(indices, to=ir.DataType.FLOAT), [count], axis=1, largest=0, sorted=1, _outputs=2)
    return op.Cast(found, to=ir.DataType.INT64)  # type: ignore[no-any-return]


def gather(op: Op, features: ir.Value, indices: ir.Value) -> ir.Value:
    """features [B, N, D], indices [B, K] -> [B, K, D]."""
    return op.GatherND(features, op.Unsqueeze(indices, [2]), batch_dims=1)  # type: ignore[no-any-return]


def fixed(op: Op, features: ir.Value, indices: NDArray[np.int64]) -> ir.Value:
    """The same indices [K] for every image of the batch: [B, K]."""
    batch = op.Shape(features, start=0, end=1)
    return op.Expand(op.Constant(value=ir.tensor(indices[None])), op.Concat(batch, [1], axis=0))  # type: ignore[no-any-return]


def top(op: Op, scores: ir.Value, count: int) -> ir.Value:
    """The indices [B, count] of the largest scores [B, N], highest first, ties to the lower index."""
    _, found = op.TopK(scores, [count], axis=1, _outputs=2)
    return found  # type: ignore[no-any-return]


def exclude(op: Op, penalty: ir.Value, indices: ir.Value) -> ir.Value:
    """Marks the indices [B, k] as taken in penalty [B, N]."""
    return op.ScatterElements(penalty, indices, op.Expand(TAKEN, op.Shape(indices)), axis=1)  # type: ignore[no-any-return]


def units(op: Op, features: ir.Value) -> ir.Value:
    """Features [B, N, D] scaled to length 1; zeros stay zeros."""
    return op.Div(features, op.Max(op.ReduceL2(features, [2], keepdims=1), 1e-12))  # type: ignore[no-any-return]


def units_of(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """`units` in numpy: features [N, D]."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)  # type: ignore[no-any-return]
