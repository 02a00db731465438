"""What a compression method is: a rule, written twice (as graph operators and in numpy), and facts about it as data."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import onnxscript
from numpy.typing import NDArray

from edgecomp_runtime.errors import EdgecompError

OPSETS = {"": 23}
DOMAIN = "edgecomp.methods"
TAKEN = -1e30  # the score of a token that cannot be chosen (again); every real score is far above


class BudgetError(EdgecompError):
    """A budget that is no count, is outside 1..N, or that a method cannot make of this grid."""


Op = Any  # onnxscript's OpBuilder finds operators by attribute, so it has no static type to offer


@dataclass(frozen=True)
class Place:
    """Where a method stands, all of it static: the token grid (rows, columns) and how many of its tokens go on."""
    grid: tuple[int, int]
    keep: int

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Taxonomy:
    """How the literature would file a method (arXiv 2505.19147, section 4), and what it needs.

    kind: 'pruning' or 'merging'. parametric: it has trained weights of its own. needs_prompt: its result cannot be
    cached an image. sites: where it can stand. signals: graph values it reads beside the features.
    """
    summary: str
    paper: str
    kind: str
    parametric: bool = False
    needs_prompt: bool = False
    sites: tuple[str, ...] = ("projector",)
    signals: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One choice of a rule: the `count` best of `scores` [N] (float64; -inf: cannot be chosen), ties to the lower index."""
    scores: NDArray[np.float64]
    count: int


Rule = Generator[Step, NDArray[np.int64], None]


class Method(ABC):
    """One way to make K visual tokens of N. Subclasses are frozen dataclasses of their parameters."""

    name: ClassVar[str]
    taxonomy: ClassVar[Taxonomy]

    def check(self, place: Place) -> None:  # noqa: B027 - most methods take any budget
        """Raises BudgetError where the method cannot make this many tokens."""

    @abstractmethod
    def build(self, op: Op, place: Place, features: ir.Value, *signals: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Adds the rule's operators: features [B, N, D] and signals -> tokens [B, K, D], kept [B, K] ascending, order [B, K]."""

    def function(self, place: Place) -> ir.Function:
        """The method as an ONNX function of the features and its signals."""
        inputs = [ir.Value(name=name) for name in ("features", *self.taxonomy.signals)]
        return onnxscript.build_function(lambda op, *values: self.build(op, place, *values), inputs, domain=DOMAIN,
                                         name=f"{type(self).__name__}{place.grid[0]}x{place.grid[1]}to{place.keep}", opset_imports=OPSETS)


class Selection(Method):
    """A method whose tokens are some of the features, unchanged and in raster order."""

    @abstractmethod
    def choose(self, op: Op, place: Place, features: ir.Value, *signals: ir.Value) -> ir.Value:
        """Adds the rule's operators. features [B, N, D] float32 -> indices [B, K] int64, in the order of choice."""

    @abstractmethod
    def rule(self, place: Place, features: NDArray[np.float64], *signals: NDArray[np.float64]) -> Rule:
        """The same rule in numpy, for one image: yields each Step, is sent the indices that were chosen."""

    def build(self, op: Op, place: Place, features: ir.Value, *signals: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        wide = op.Cast(features, to=ir.DataType.FLOAT)
        order = self.choose(op, place, wide, *signals)
        # ONNX has no sort; indices below 2^24 are exact as floats, which every backend's TopK takes
        ascending, _ = op.TopK(op.Cast(order, to=ir.DataType.FLOAT), [place.keep], axis=1, largest=0, sorted=1, _outputs=2)
        kept = op.Cast(ascending, to=ir.DataType.INT64)
        return gather(op, features, kept), kept, order


class Merging(Method):
    """A method whose tokens are averages of features by constant weights; each takes the position of one of its sources."""

    @abstractmethod
    def weights(self, place: Place) -> NDArray[np.float64]:
        """The averaging matrix [K, N]: rows sum to 1, columns to K / N."""

    @abstractmethod
    def places(self, place: Place) -> NDArray[np.int64]:
        """The raster place [K] that each token takes: one of its sources, ascending."""


def gather(op: Op, features: ir.Value, indices: ir.Value) -> ir.Value:
    """features [B, N, D], indices [B, K] -> [B, K, D]."""
    return op.GatherND(features, op.Unsqueeze(indices, [2]), batch_dims=1)  # type: ignore[no-any-return]


def fixed(op: Op, features: ir.Value, indices: NDArray[np.int64]) -> ir.Value:
    """The same indices [K] for every image of the batch: [B, K]."""
    batch = op.Shape(features, start=0, end=1)
    return op.Expand(op.Constant(value=ir.tensor(indices[None])), op.Concat(batch, [1], axis=0))  # type: ignore[no-any-return]
