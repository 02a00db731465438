"""FastV: the tokens that the prompt's last row attends to most (An Image is Worth 1/2 Tokens After Layer 2, arXiv 2403.06764)."""
from __future__ import annotations

from dataclasses import dataclass

from edgecomp.methods.base import Largest, Taxonomy


@dataclass(frozen=True)
class FastV(Largest):
    """The K largest of a [N] = mean over heads of the last row of the layer before the cut, softmax(q_last K^T), visual columns.

    The paper speaks of the attention that a token receives averaged over rows; the authors' code reads the prompt's last row
    alone, and so do we: one row beside the fused attention, which stays whole. Their accuracy figures come from a path that masks
    tokens and saves nothing; here tokens are gone from every later layer and its cache, in raster order. They are cut once, when
    the prompt is read, where the first version of their code chose again at each step. Theirs is decoder:2.
    """

    name = "fastv"
    taxonomy = Taxonomy("largest attention from the prompt's last row (FastV)", "arXiv 2403.06764", "pruning",
                        sites={"decoder": ("last_attention",)})
