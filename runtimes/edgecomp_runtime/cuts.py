"""What a decoder with cuts is fed at each of them. All counts are constants of the plan, so the host knows every row beforehand."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecomp_runtime.manifest import DecoderInfo, PlanInfo, VisionInfo

TEXT_ROWS = 8  # that a method gets to read at least; a shorter text is repeated


@dataclass(frozen=True)
class Cuts:
    """A plan's cuts: `layers`, and for each the visual tokens of each of a picture's runs behind it; `before` the first one.

    compact: 'host', where rows are numbered anew by counting them, 'graph', where rows and columns of what was kept close up, or ''.
    """
    layers: tuple[int, ...]
    runs: tuple[tuple[int, ...], ...]
    before: tuple[int, ...]
    compact: str
    first_position: int

    @staticmethod
    def of(vision: VisionInfo, decoder: DecoderInfo, plan: PlanInfo) -> Cuts:
        """The cuts of a plan."""
        def by_run(tokens: Sequence[int]) -> tuple[int, ...]:
            return tuple(tokens) if vision.runs > 1 else (sum(tokens),)
        compact = "" if plan.position == "keep" else "host" if decoder.position_axes == 1 else "graph"
        return Cuts(tuple(cut.layer for cut in plan.cuts), tuple(by_run(cut.tile_tokens) for cut in plan.cuts),
                    by_run(plan.tile_tokens if vision.runs > 1 else [plan.visual_tokens]), compact, decoder.first_position)

    def lengths(self, rows: int, pictures: int) -> list[int]:
        """Rows of each later cache, where the first has so many rows with so many whole pictures among them."""
        return [rows - pictures * (sum(self.before) - sum(runs)) for runs in self.runs]

    def starts(self) -> tuple[int, ...]:
        """The first layer of each stretch between cuts."""
        return tuple(dict.fromkeys((0, *self.layers)))

    def feeds(self, runs: NDArray[np.int64], lengths: Sequence[int], moved: Sequence[int]) -> tuple[dict[str, NDArray[Any]], list[int]]:
        """What the graph takes for new rows, by role and layer, and how many of them there are before the cuts and behind each.

        Args:
            runs: of the new rows, as in `Rows`; whole pictures.
            lengths: rows in the caches behind each cut.
            moved: positions that pictures in the cache gave up at each cut, where the graph numbers rows anew.
        """
        found: dict[str, NDArray[Any]] = {}
        counts, rows = self.before, [len(runs)]
        for layer, kept, length, up in zip(self.layers, self.runs, lengths, moved):
            visual, text = np.flatnonzero(runs), np.flatnonzero(runs == 0)
            pictures = len(visual) // sum(counts)
            row_map, behind, at = [], [], 0
            for run in _stretches(runs):
                if runs[run.start]:
                    here = kept[(runs[run.start] - 1) % len(kept)]
                    row_map.append(len(runs) + at + np.arange(here))
                    behind.append(np.full(here, runs[run.start]))
                    at += here
                else:
                    row_map.append(np.arange(run.start, run.stop))
                    behind.append(np.zeros(run.stop - run.start, np.int64))
            question = text[text > visual[-1]] if len(visual) else text
            question = question if len(question) else text if len(text) else np.array([len(runs) - 1])
            found |= {f"visual_rows.{layer}": visual.reshape(pictures, sum(counts)), f"row_map.{layer}": np.concatenate(row_map),
                      f"text_rows.{layer}": np.resize(question, max(TEXT_ROWS, len(question))), f"length.{layer}": np.array([length])}
            runs, counts = np.concatenate(behind), kept
            rows.append(len(runs))
            if self.compact == "graph":
                found[f"moved.{layer}"] = np.array([up])
            elif self.compact:
                found[f"positions.{layer}"] = self.first_position + length + np.arange(len(runs))[None]
        return {key: value.astype(np.int64) for key, value in found.items()}, rows


def _stretches(runs: NDArray[np.int64]) -> list[slice]:
    """The stretches of equal numbers."""
    edges = [0, *(np.flatnonzero(np.diff(runs)) + 1), len(runs)]
    return [slice(start, stop) for start, stop in pairwise(edges)]
