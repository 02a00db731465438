"""Hugging Face's whole model, pruned while it runs: the oracle of every site.

It gets a prompt that nothing was cut out of. Hooks on its own layers shorten what arrives there: the vision tower's states, and the
decoder's, where a cut at the projector is one before its first layer. All that is imposed is which tokens go on, or of which sums they
are made. Nothing here is edgecomp's but the loading of the model.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgecomp_export.reference import Reference


@dataclass(frozen=True)
class Cut:
    """Before a layer of 'encoder' or 'decoder': for each picture the weights [K, n] of the n tokens that arrive in the K that go on, and
    the places [K] of those among them. `follow`: deepstack features are made by the weights too, else they are taken at the places."""
    kind: str
    layer: int
    weights: list[np.ndarray]
    places: list[np.ndarray]
    follow: bool = False


class State:
    """The rows that a decoder layer has: each one's number in the whole prompt, and for each picture where its tokens are among them;
    M-RoPE positions [3, rows], where they are numbered anew."""
    positions: np.ndarray | None = None

    def __init__(self, rows: int, pictures: Sequence[np.ndarray]):
        self.rows, self.pictures = np.arange(rows), list(pictures)
        self.made = np.eye(rows)  # of deepstack features of the whole prompt

    def cut(self, cut: Cut, hidden: torch.Tensor) -> torch.Tensor:
        goes_on = np.ones(len(self.rows), bool)
        matrix = np.eye(len(self.rows))
        stacked = np.eye(len(self.rows))
        for tokens, weights, places in zip(self.pictures, cut.weights, cut.places, strict=True):
            goes_on[np.delete(tokens, places)] = False
            matrix[tokens[places]] = 0
            matrix[np.ix_(tokens[places], tokens)] = weights
            if cut.follow:
                stacked[tokens[places]] = matrix[tokens[places]]
        if self.positions is not None:
            self.positions = self.renumbered(cut)[:, goes_on]
        now = np.cumsum(goes_on) - 1
        self.pictures = [now[tokens[places]] for tokens, places in zip(self.pictures, cut.places)]
        self.rows, self.made = self.rows[goes_on], (stacked @ self.made)[goes_on]
        return torch.from_numpy(matrix[goes_on].astype(np.float32)) @ hidden

    def renumbered(self, cut: Cut) -> np.ndarray:
        """Text counts on from the highest place before it; a picture's rows and columns of which nothing is left close up."""
        assert self.positions is not None
        found = self.positions.copy()
        starts = {int(tokens[0]): (tokens, kept) for tokens, kept in zip(self.pictures, cut.places)}
        following, row = 0, 0
        while row < found.shape[1]:
            if row not in starts:
                found[:, row] = following
                following, row = following + 1, row + 1
                continue
            tokens, kept = starts[row]
            for axis in range(3):
                used = sorted(set(self.positions[axis, tokens[kept]].tolist()))
                for token in tokens[kept]:
                    found[axis, token] = following + used.index(self.positions[axis, token])
            following, row = int(found[:, tokens[kept]].max()) + 1, int(tokens[-1]) + 1
        return found


class Live:
    """A checkpoint with eager attention, whose masks are all written out."""

    def __init__(self, reference: Reference):
        self.reference, self.family, self.model = reference, reference.family, reference.model
        self.decoder = self.family.text_model(self.model)
        self.text = self.family.config.get_text_config()

    def pixels(self, pictures: Sequence[Any]) -> torch.Tensor:
        """HF's own, in the bundle's layout [pictures, ...]."""
        found = [self.reference.pixels(picture) for picture in pictures]
        assert all(one is not None for one in found)
        return torch.cat(found)  # type: ignore[arg-type]

    @torch.no_grad()
    def masks(self, ids: list[int], pixels: torch.Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each decoder layer which rows see which, HF's own and `seen`'s."""
        found: list[np.ndarray] = []
        with ExitStack() as hooks:
            for layer in self.decoder.layers:
                def look(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
                    mask = kwargs["attention_mask"]
                    assert mask is not None
                    found.append((mask[0, 0] > -1e30).numpy() if mask.dtype != torch.bool else mask[0, 0].numpy())
                hooks.callback(layer.register_forward_pre_hook(look, with_kwargs=True).remove)
            self._forward(torch.tensor([ids]), pixels)
        return [(theirs, self.seen(ids, np.arange(len(ids)), layer)) for layer, theirs in enumerate(found)]

    @torch.no_grad()
    def logits(self, ids: list[int], pixels: torch.Tensor, pictures: Sequence[np.ndarray], cuts: Sequence[Cut], answer: list[int], *,
               compact: bool = False) -> np.ndarray:
        """The logits [len(answer) + 1, V] of the prompt's last row and the answer's.

        Args:
            ids: HF's of the whole prompt.
            pixels: `pixels`.
            pictures: the rows of each picture's tokens.
            cuts: in the order in which a picture meets them.
            answer: ids behind the prompt.
            compact: rows that are left are numbered anew after each cut.
        """
        every = torch.tensor([ids + answer])
        state, inside = State(every.shape[1], pictures), [cut for cut in cuts if cut.kind == "decoder"]
        if compact and self.family.position_axes > 1:
            theirs = self.reference.positions(ids, len(pictures))
            state.positions = np.concatenate([theirs, np.tile(theirs.max() + 1 + np.arange(len(answer)), (3, 1))], 1)
        with ExitStack() as hooks:
            self._cut_tower([cut for cut in cuts if cut.kind == "encoder"], hooks)
            for index, layer in enumerate(self.decoder.layers):
                hook = self._before(index, state, [cut for cut in inside if cut.layer == index], ids, compact)
                hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if hasattr(self.decoder, "_deepstack_process"):
                self.decoder._deepstack_process = self._add_deepstack(state)
                hooks.callback(delattr, self.decoder, "_deepstack_process")
            found = self._forward(every, pixels)[0, -len(answer) - 1:]
        return found.numpy()

    def _forward(self, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **self.family.hf_pixels(pixels),
                                         **self.family.hf_prompt(ids)).logits
        return found

    def _before(self, index: int, state: State, cuts: Sequence[Cut], ids: list[int], compact: bool) -> Callable[..., Any]:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            hidden, = args or (kwargs.pop("hidden_states"),)
            for cut in cuts:
                hidden = state.cut(cut, hidden)
            # where positions count from the first row on, the table's row n is the position of row n whatever it was before
            at = torch.arange(len(state.rows)) if compact else torch.from_numpy(state.rows)
            turned = tuple(table[..., at, :] for table in kwargs["position_embeddings"])
            if state.positions is not None:
                turned = self.decoder.rotary_emb(hidden, torch.from_numpy(state.positions)[:, None])
            seen = torch.from_numpy(self.seen(ids, state.rows, index))
            mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
            return (hidden,), {**kwargs, "position_embeddings": turned, "attention_mask": mask}
        return hook

    def seen(self, ids: list[int], rows: np.ndarray, layer: int) -> np.ndarray:
        """Which of these rows see which in a layer: those before them, and those of their segment; windows count the rows that are there."""
        segments, number = np.zeros(max(rows.max() + 1, len(ids)), int), 0
        for row, token in enumerate(ids if self.family.bidirectional else ()):
            inside = token == self.reference.image_id or self.family.bidirectional == "prompt"
            number += inside and (row == 0 or segments[row - 1] == 0)
            segments[row] = number if inside else 0
        at, own = np.arange(len(rows)), segments[rows]
        before, near = at <= at[:, None], np.ones((len(rows), len(rows)), bool)
        both = (own == own[:, None]) & (own > 0)
        if self._windowed(layer):
            near = at > at[:, None] - self.text.sliding_window
        found: np.ndarray = (before & near) | (both & (near if self.family.segments_bounded else True))
        return found

    def _windowed(self, layer: int) -> bool:
        kinds = getattr(self.text, "layer_types", None)
        if kinds is not None:
            return bool(kinds[layer] == "sliding_attention")
        return getattr(self.text, "sliding_window", None) is not None

    def _add_deepstack(self, state: State) -> Callable[..., torch.Tensor]:
        def process(hidden: torch.Tensor, visual: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
            whole = torch.zeros(visual.shape[1], hidden.shape[-1])
            whole[visual[0]] = features
            return hidden + torch.from_numpy(state.made.astype(np.float32)) @ whole
        return process

    def _cut_tower(self, cuts: Sequence[Cut], hooks: ExitStack) -> None:
        """Cuts between the tower's layers, or before the projector. What is missing behind the projector is filled with zeros, which the
        decoder's first cut takes out, so that HF finds as many features as the prompt has places."""
        if not cuts:
            return
        layers, select = self.family.encoder_layers(self.model), self.family.tower()[1]
        projector, tower = self.model.model.multi_modal_projector, self.model.model.vision_tower
        last = getattr(tower, "vision_model", tower).post_layernorm if self.family.config.model_type == "paligemma" else projector
        cls = int(self.family.tower()[2])
        widths: list[int] = []

        def shorten(cut: Cut, cls: int) -> Callable[..., Any]:
            def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
                hidden = args[0]
                widths.append(hidden.shape[1] - cls)
                parts = [torch.from_numpy(weights.astype(np.float32)) @ hidden[n, cls:] for n, weights in enumerate(cut.weights)]
                return (torch.cat([hidden[:, :cls], torch.stack(parts)], 1), *args[1:]), kwargs
            return hook

        for cut in cuts:
            behind = cut.layer > select
            module = last if behind else layers[cut.layer]
            hooks.callback(module.register_forward_pre_hook(shorten(cut, 0 if behind else cls), with_kwargs=True).remove)

        def fill(_: Any, __: Any, found: torch.Tensor) -> torch.Tensor:
            whole = torch.zeros(found.shape[0], widths[0], found.shape[2])
            for n in range(len(found)):
                at = np.arange(widths[0])
                for cut in cuts:
                    at = at[cut.places[n]]
                whole[n, at] = found[n]
            return whole
        hooks.callback(projector.register_forward_hook(fill).remove)
