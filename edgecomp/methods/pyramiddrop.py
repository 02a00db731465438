"""PyramidDrop: FastV's choice in stages, each a fraction of the last (arXiv 2410.17247)."""
from __future__ import annotations

import math
from dataclasses import dataclass

from edgecomp.methods.base import Taxonomy
from edgecomp.methods.fastv import FastV
from edgecomp_runtime.errors import EdgecompError


@dataclass(frozen=True)
class PyramidDrop(FastV):
    """Each stage: the K' largest of a [N'] = mean over heads of the last row of the layer behind the cut, visual columns.

    Unlike FastV's, the row is computed from the hidden state before the cut with the query and key weights of the layer behind it.
    The authors cut a decoder of M layers before M/4, M/2 and 3M/4 and keep N/2, N/4 and N/8. In general: from the first cut on the
    layers left are divided into equal parts, and each cut keeps the same fraction (K/N)^(1/cuts) of what came to it, rounded down
    as in their code; the last keeps exactly K. With layer M/4 and K = N/8 that is theirs.

    K is what the last layers see: the mean over layers is far higher (at the authors' setting 270 of 576), and figures "at 64
    tokens" in the literature are often of schedules with that mean. The authors' code numbers positions anew after each
    stage; here that is the plan's `compact`, and by default tokens keep theirs.

    Attributes:
        cuts: how many stages; fewer where two would fall on one layer or keep the same number.
    """

    name = "pyramiddrop"
    taxonomy = Taxonomy("largest attention from the prompt's last row, in stages (PyramidDrop)", "arXiv 2410.17247", "pruning",
                        sites={"decoder": ("own_attention",)})
    cuts: int = 3

    def __post_init__(self) -> None:
        if self.cuts < 1:
            raise EdgecompError(f"pyramiddrop needs at least one cut, not {self.cuts}")

    def first_layer(self, site: str, layers: int) -> int:
        return layers // 4

    def stages(self, layer: int, layers: int, tokens: int, keep: int) -> list[tuple[int, int]]:
        kept: dict[int, int] = {}
        for cut in range(self.cuts):
            left = tokens * (keep / tokens) ** ((cut + 1) / self.cuts)
            kept[layer + cut * (layers - layer) // self.cuts] = math.floor(left + 1e-6)  # a root that is whole, but for rounding, is whole
        pairs = list(kept.items())
        return [pair for at, pair in enumerate(pairs) if at == 0 or pair[1] < pairs[at - 1][1]]
