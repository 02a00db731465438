"""Laying a prompt out as decoder rows: what each row is, its embedding, its position, and what it sees both ways."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecomp_runtime.manifest import DecoderInfo, PlanInfo, VisionInfo


@dataclass(frozen=True)
class VisualTokens:
    """One picture's visual tokens: [K, D], their places [K] among the unpruned ones, and deepstack features [layers, K, D]."""
    name: str
    tokens: NDArray[Any]
    kept: NDArray[np.int64]
    deepstack: NDArray[Any] | None = None


@dataclass(frozen=True)
class Rows:
    """A prompt for the decoder. `sources` says what each row was made from: equal sources at equal places are equal rows.

    positions: [axes, rows]. segments: [rows], 0 or a number whose rows see each other both ways. deepstack: [layers, rows, D].
    runs: [rows], 0 for text, else which of the prompt's runs of visual tokens, from 1.
    """
    sources: list[object]
    embeddings: NDArray[Any]
    positions: NDArray[np.int64]
    segments: NDArray[np.int64]
    runs: NDArray[np.int64]
    deepstack: NDArray[Any] | None
    next_position: int

    def since(self, row: int) -> Rows:
        """The rows from this one on."""
        return Rows(self.sources[row:], self.embeddings[row:], self.positions[:, row:], self.segments[row:], self.runs[row:],
                    None if self.deepstack is None else self.deepstack[:, row:], self.next_position)

    def then(self, ids: Sequence[int], embeddings: NDArray[Any]) -> Rows:
        """These rows and those of an answer's ids behind them."""
        new = following(ids, embeddings, self.next_position, len(self.positions))
        deepstack = self.deepstack
        if deepstack is not None:
            deepstack = np.concatenate([deepstack, np.zeros_like(deepstack[:, :1]).repeat(len(ids), 1)], 1)
        return Rows([*self.sources, *ids], np.concatenate([self.embeddings, new.embeddings]), np.concatenate([self.positions, new.positions], 1),
                    np.concatenate([self.segments, new.segments]), np.concatenate([self.runs, new.runs]), deepstack, new.next_position)

    def feeds(self, start: int, end: int, length: int, logit_rows: NDArray[np.int64], stacked: int) -> dict[str, NDArray[Any]]:
        """What a decoder graph takes for rows start to end behind `length` rows of its cache, by role and layer.

        Args:
            start, end: of these rows.
            length: rows in the cache.
            logit_rows: those of the fed rows whose logits are asked for.
            stacked: decoder layers that take deepstack features.
        """
        embeddings, positions = self.embeddings[None, start:end], self.positions[:, None, start:end]
        found = {"embeddings": embeddings, "positions": positions if len(positions) > 1 else positions[0], "length": np.array([length], np.int64),
                 "logit_rows": logit_rows, "segments": self.segments[None, start:end]}
        for layer in range(stacked):
            found[f"deepstack.{layer}"] = np.zeros_like(embeddings) if self.deepstack is None else self.deepstack[layer, None, start:end]
        return found


def embedded(table: NDArray[Any], scale: float, ids: Sequence[int]) -> NDArray[Any]:
    """The embeddings [n, D] of token ids, multiplied in the table's own precision, as Gemma's embedding module does."""
    found = table[list(ids)]
    return found if scale == 1 else found * np.asarray(scale, found.dtype)


def following(ids: Sequence[int], embeddings: NDArray[Any], position: int, axes: int) -> Rows:
    """Rows of text at a position and after."""
    places = np.arange(position, position + len(ids))[None].repeat(axes, 0)
    none = np.zeros(len(ids), np.int64)
    return Rows(list(ids), embeddings, places, none, none, None, position + len(ids))


@dataclass(frozen=True)
class Run:
    """A stretch of a picture's visual tokens in a prompt: `kept` of the unpruned ones `first` to `first + span`."""
    first: int
    span: int
    kept: int


@dataclass(frozen=True)
class Layout:
    """What rows and positions each picture takes; constant, as all shapes are.

    offsets: [axes, N], from the start of its run to each unpruned visual token: its raster number, or its temporal, row and
    column places for M-RoPE (arXiv 2409.12191, section 2.1; still pictures have one temporal place).
    compact: kept tokens are numbered anew on each axis, so that no place is left out; otherwise they stay where they were.
    """
    runs: tuple[Run, ...]
    offsets: NDArray[np.int64]
    compact: bool
    first_position: int
    bidirectional: str

    @staticmethod
    def of(vision: VisionInfo, decoder: DecoderInfo, plan: PlanInfo) -> Layout:
        """The layout of a plan."""
        if vision.runs == 1:
            runs = [Run(0, vision.tokens, plan.visual_tokens)]
        else:
            runs = [Run(t.start, t.tokens, kept) for t, kept in zip(vision.tiles, plan.tile_tokens)]
        if decoder.position_axes == 1:
            offsets = np.concatenate([np.arange(run.span) for run in runs])[None]
        else:
            tile, = vision.tiles
            offsets = np.stack([np.zeros(tile.tokens, np.int64), *np.divmod(np.arange(tile.tokens), tile.columns)])
        return Layout(tuple(runs), offsets.astype(np.int64), plan.position == "compact", decoder.first_position, decoder.bidirectional)

    @property
    def rows(self) -> int:
        """Rows of a picture."""
        return sum(run.kept for run in self.runs)

    @property
    def positions(self) -> int:
        """Positions that a picture takes at most."""
        if self.compact and len(self.offsets) == 1:
            return self.rows
        return sum(int(self.offsets[:, run.first:run.first + run.span].max()) + 1 for run in self.runs)

    def place(self, run: Run, kept: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """Offsets [axes, K] of a run's kept tokens, and how many positions the run takes."""
        every = self.offsets[:, run.first:run.first + run.span]
        if not self.compact:
            return self.offsets[:, kept], int(every.max()) + 1
        anew = np.stack([np.unique(axis, return_inverse=True)[1].reshape(-1) for axis in self.offsets[:, kept]])
        return anew, int(anew.max()) + 1


def lay_out(ids: Sequence[int], image_id: int, images: Sequence[VisualTokens], embed: Callable[[Sequence[int]], NDArray[Any]],
            layout: Layout) -> Rows:
    """Puts each picture's visual tokens where its image ids stand, one id a run.

    Args:
        ids: the prompt's token ids.
        image_id: the id that stands for a run of visual tokens.
        images: one for every `len(layout.runs)` such ids, in order.
        embed: the embeddings [n, D] of n token ids.
        layout: of the plan.
    """
    sources: list[object] = []
    embeddings: list[NDArray[Any]] = []
    positions: list[NDArray[np.int64]] = []
    runs: list[NDArray[np.int64]] = []
    features: list[tuple[int, NDArray[Any]]] = []  # deepstack: the first row, and [layers, K, D]
    at, number, axes = layout.first_position, 0, len(layout.offsets)
    for is_image, run_ids in _runs(ids, image_id):
        if not is_image:
            text = following(run_ids, embed(run_ids), at, axes)
            sources += text.sources
            embeddings.append(text.embeddings)
            positions.append(text.positions)
            runs.append(text.runs)
            at = text.next_position
            continue
        image, place = images[number // len(layout.runs)], number % len(layout.runs)
        start = sum(run.kept for run in layout.runs[:place])
        part = slice(start, start + layout.runs[place].kept)
        offsets, span = layout.place(layout.runs[place], image.kept[part])
        if image.deepstack is not None:
            features.append((len(sources), image.deepstack[:, part]))
        sources += [(image.name, n) for n in range(part.start, part.stop)]
        embeddings.append(image.tokens[part])
        positions.append(at + offsets)
        runs.append(np.full(part.stop - part.start, number + 1))
        at, number = at + span, number + 1
    rows = np.concatenate(embeddings)
    of = np.concatenate(runs)
    both_ways = of if layout.bidirectional == "images" else np.full(len(rows), int(layout.bidirectional == "prompt"))
    return Rows(sources, rows, np.concatenate(positions, 1).astype(np.int64), both_ways.astype(np.int64), of, _spread(features, len(rows)), at)


def _spread(features: Sequence[tuple[int, NDArray[Any]]], rows: int) -> NDArray[Any] | None:
    """Deepstack features of all rows [layers, rows, D], zero at text; None where no picture has any."""
    if not features:
        return None
    layers, _, width = features[0][1].shape
    found = np.zeros((layers, rows, width), features[0][1].dtype)
    for first, part in features:
        found[:, first:first + part.shape[1]] = part
    return found


def _runs(ids: Sequence[int], image_id: int) -> list[tuple[bool, list[int]]]:
    """Stretches of text ids, and each image id by itself."""
    runs: list[tuple[bool, list[int]]] = []
    for token in ids:
        if token == image_id or not runs or runs[-1][0]:
            runs.append((token == image_id, [token]))
        else:
            runs[-1][1].append(token)
    return runs
