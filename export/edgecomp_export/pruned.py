"""Hugging Face's model pruned live: while inside, its layers from a cut on see only the rows that are imposed on them."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Turn = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]  # rotary tables like a state, for positions [axes, 1, rows]
Seen = Callable[[int, torch.Tensor], torch.Tensor]  # the mask [1, 1, rows, rows] of a layer for rows that are left, by their first numbers


@dataclass(frozen=True)
class LiveCut:
    """Before a layer of a stack, rows [S'] of the S that arrive go on.

    weights: [S', S], where the rows are sums of those that arrive; None: they are the rows themselves.
    positions: [axes, S'] of those rows, where they are numbered anew.
    """
    layer: int
    rows: torch.Tensor
    weights: torch.Tensor | None = None
    positions: torch.Tensor | None = None

    def hidden(self, state: torch.Tensor) -> torch.Tensor:
        """[B, S, D] -> [B, S', D]."""
        return state[:, self.rows] if self.weights is None else self.weights.to(state.dtype) @ state


@contextmanager
def pruned(layers: torch.nn.ModuleList, cuts: Sequence[LiveCut], seen: Seen | None = None, turn: Turn | None = None) -> Iterator[None]:
    """Cuts the rows between layers: hidden states, rotary embeddings, and masks, which `seen` makes anew where layers have any.

    Positions numbered anew need `turn` where they have several axes; on one axis, the tables have them already.
    """
    handles, cuts = [], sorted(cuts, key=lambda cut: cut.layer)
    for index, layer in enumerate(layers):
        before = [cut for cut in cuts if cut.layer <= index]
        if before:
            handles.append(layer.register_forward_pre_hook(_hook(index, before, seen, turn), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(index: int, cuts: Sequence[LiveCut], seen: Seen | None, turn: Turn | None) -> Any:
    rows, anew = cuts[0].rows, cuts[-1].positions
    for cut in cuts[1:]:
        rows = rows[cut.rows]
    # row n of the tables turns by the n-th position, so that numbered anew on one axis the first ones are right for any rows
    turned = rows if anew is None else torch.arange(len(rows))

    def hook(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        hidden, *others = args or (kwargs["hidden_states"],)
        found = dict(kwargs)
        for cut in cuts:
            if cut.layer == index:  # the states that arrive at later layers have been cut already
                hidden = cut.hidden(hidden)
        if anew is not None and turn is not None:
            found["position_embeddings"] = turn(hidden, anew[:, None])
        elif kwargs.get("position_embeddings") is not None:
            found["position_embeddings"] = tuple(table.index_select(-2, turned) for table in kwargs["position_embeddings"])
        for name in ("position_ids", "cache_position"):
            if kwargs.get(name) is not None:
                found[name] = kwargs[name].index_select(-1, rows)
        if seen is not None:
            found["attention_mask"] = seen(index, rows)
        return ((hidden, *others), found) if args else (args, {**found, "hidden_states": hidden})
    return hook
