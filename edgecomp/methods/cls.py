"""CLS attention: the tokens that the vision tower's CLS token looks at most (FasterVLM, arXiv 2412.01818)."""
from __future__ import annotations

from dataclasses import dataclass

from edgecomp.methods.base import Largest, Taxonomy


@dataclass(frozen=True)
class Cls(Largest):
    """The K largest of a = mean over heads of softmax(q_cls K^T), in raster order.

    The row comes from the layer whose output the projector takes, as in the authors' code (`attentions[select_layer]`).
    It is computed beside the fused attention from that layer's own query and keys, so nothing else materialises.
    """

    name = "cls"
    taxonomy = Taxonomy("largest attention from the CLS token (FasterVLM)", "arXiv 2412.01818", "pruning",
                        sites={"projector": ("cls_attention",), "encoder": ("cls_attention",)})
