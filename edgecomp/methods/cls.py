"""CLS attention: the tokens that the vision tower's CLS token looks at most (FasterVLM, arXiv 2412.01818)."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgecomp.methods.base import Op, Place, Rule, Selection, Step, Taxonomy


@dataclass(frozen=True)
class Cls(Selection):
    """The K largest of a = mean over heads of softmax(q_cls K^T), in raster order.

    The row comes from the layer whose output the projector takes, as in the authors' code (`attentions[select_layer]`).
    It is computed beside the fused attention from that layer's own query and keys, so nothing else materialises.
    """

    name = "cls"
    taxonomy = Taxonomy("largest attention from the CLS token (FasterVLM)", "arXiv 2412.01818", "pruning", signals=("cls_attention",))

    def choose(self, op: Op, place: Place, features: ir.Value, *signals: ir.Value) -> ir.Value:
        _, order = op.TopK(signals[0], [place.keep], axis=1, _outputs=2)
        return order  # type: ignore[no-any-return]

    def rule(self, place: Place, features: NDArray[np.float64], *signals: NDArray[np.float64]) -> Rule:
        yield Step(signals[0], place.keep)
