"""Laying a prompt out as decoder rows: what each row is, its embedding, and its position."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class VisualTokens:
    """One picture's visual tokens: [K, D], and their places [K] in the unpruned raster."""
    name: str
    tokens: NDArray[Any]
    kept: NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """A prompt for the decoder. `sources` says what each row was made from: equal sources at equal places are equal rows."""
    sources: list[object]
    embeddings: NDArray[Any]
    positions: NDArray[np.int64]
    next_position: int


def lay_out(ids: Sequence[int], image_id: int, images: Sequence[VisualTokens], table: NDArray[Any], span: int | None) -> Rows:
    """Puts each picture's visual tokens where its one image id stands.

    Args:
        ids: the prompt's token ids.
        image_id: the id that stands for a picture.
        images: one for each such id, in order.
        table: the token embeddings [vocabulary, D].
        span: positions that a picture takes: the unpruned count under the policy 'keep' (kept tokens stay where they
            were), None under 'compact' (as many as it has tokens, one after the other).
    """
    sources: list[object] = []
    embeddings: list[NDArray[Any]] = []
    positions: list[NDArray[np.int64]] = []
    at, rest = 0, iter(images)
    for is_image, run in _runs(ids, image_id):
        if not is_image:
            sources += run
            embeddings.append(np.asarray(table[run]))
            positions.append(np.arange(at, at + len(run)))
            at += len(run)
            continue
        image = next(rest)
        sources += [(image.name, n) for n in range(len(image.tokens))]
        embeddings.append(image.tokens.astype(table.dtype))
        positions.append(at + (np.arange(len(image.tokens)) if span is None else image.kept))
        at += len(image.tokens) if span is None else span
    return Rows(sources, np.concatenate(embeddings), np.concatenate(positions).astype(np.int64), at)


def _runs(ids: Sequence[int], image_id: int) -> list[tuple[bool, list[int]]]:
    """Stretches of text ids, and each image id by itself."""
    runs: list[tuple[bool, list[int]]] = []
    for token in ids:
        if token == image_id or not runs or runs[-1][0]:
            runs.append((token == image_id, [token]))
        else:
            runs[-1][1].append(token)
    return runs
