"""Hugging Face's model pruned live: while inside, its layers from a cut on see only the rows that are imposed on them."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class LiveCut:
    """Before a layer of a stack, rows [S'] of the S that arrive go on.

    weights: [S', S], where the rows are sums of those that arrive; None: they are the rows themselves.
    positions: [1, S'] anew, where the policy is 'compact'.
    """
    layer: int
    rows: torch.Tensor
    weights: torch.Tensor | None = None
    positions: torch.Tensor | None = None

    def hidden(self, state: torch.Tensor) -> torch.Tensor:
        """[B, S, D] -> [B, S', D]."""
        return state[:, self.rows] if self.weights is None else self.weights.to(state.dtype) @ state


@contextmanager
def pruned(layers: torch.nn.ModuleList, cuts: Sequence[LiveCut], rotary: torch.nn.Module | None = None) -> Iterator[None]:
    """Cuts the rows between layers: hidden states, masks, and rotary embeddings, which are computed anew by `rotary` for new positions."""
    handles, cuts = [], sorted(cuts, key=lambda cut: cut.layer)
    for index, layer in enumerate(layers):
        before = [cut for cut in cuts if cut.layer <= index]
        if before:
            handles.append(layer.register_forward_pre_hook(_hook(index, before, rotary), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(index: int, cuts: Sequence[LiveCut], rotary: torch.nn.Module | None) -> Any:
    def hook(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        hidden = args[0] if args else kwargs["hidden_states"]
        if cuts[-1].layer == index:  # the states that arrive at later layers have been cut already
            hidden = cuts[-1].hidden(hidden)
        found = {name: _rows(name, value, cuts, rotary, hidden) for name, value in kwargs.items()}
        if args:
            return (hidden, *(_rows("attention_mask", value, cuts, rotary, hidden) for value in args[1:])), found
        return args, {**found, "hidden_states": hidden}
    return hook


def _rows(name: str, value: Any, cuts: Sequence[LiveCut], rotary: torch.nn.Module | None, hidden: torch.Tensor) -> Any:
    """An argument of a layer, for the rows that are left."""
    if name == "position_embeddings" and cuts[-1].positions is not None:
        assert rotary is not None
        return rotary(hidden, cuts[-1].positions)
    if name in ("position_embeddings", "position_ids", "attention_mask", "cache_position"):
        for cut in cuts:
            value = _taken(value, cut.rows, name)
    return value


def _taken(value: Any, rows: torch.Tensor, name: str) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_taken(one, rows, name) for one in value)
    if not isinstance(value, torch.Tensor):
        return value
    if name == "attention_mask" and value.ndim == 4:  # [B, 1, rows, rows]
        return value[:, :, rows][:, :, :, rows]
    if name == "position_embeddings":  # [.., rows, d]
        return value.index_select(-2, rows)
    return value.index_select(-1, rows)
