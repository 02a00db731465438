"""Qwen2.5-VL: Qwen2-VL with a tower that looks through windows in most of its layers (arXiv 2502.13923)."""
from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgecomp_export.families.qwen2_vl import Qwen2VL, Vision


class Qwen2_5VL(Qwen2VL):
    """`Qwen2_5_VLForConditionalGeneration` at one size of pictures."""

    def vision(self, model: Any) -> torch.nn.Module:
        grid, found, config = self.grid(), by_length(self.windows()), self.config.vision_config
        inside = [(len(list(equal)), length * grid.merge ** 2) for length, equal in groupby(map(len, found))]
        whole = [(1, grid.rows * grid.columns)]
        segments = [whole if layer in config.fullatt_block_indexes else inside for layer in range(config.depth)]
        return Vision(model, grid, np.concatenate(found), segments)

    def windows(self) -> list[NDArray[np.int64]]:
        """The visual tokens in each window of HF's, in its order."""
        grid = self.grid()
        return windows(grid.tokens, self.config.vision_config.window_size // (grid.patch * grid.merge))

    def hf_hidden(self, hidden: NDArray[np.float32], images: int) -> NDArray[np.float32]:
        found = self.windows()
        at = np.argsort(np.concatenate(found))[np.concatenate(by_length(found))]  # where HF has the token that the graph has here
        by_token = hidden.reshape(images, len(at), self.grid().merge ** 2, hidden.shape[-1])
        return by_token[:, at].reshape(images, -1, hidden.shape[-1])


def windows(grid: tuple[int, int], side: int) -> list[NDArray[np.int64]]:
    """Cuts a grid of visual tokens into windows of `side` x `side`, smaller ones at the right and bottom edge: the tokens of each."""
    raster = np.arange(grid[0] * grid[1]).reshape(grid)
    return [raster[row:row + side, column:column + side].reshape(-1) for row in range(0, grid[0], side) for column in range(0, grid[1], side)]


def by_length(found: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Windows of equal length behind each other, so that each length is one batch.

    There are four at most: of the inner windows, of those at the right and bottom edges, and of the corner.
    """
    return sorted(found, key=len, reverse=True)
