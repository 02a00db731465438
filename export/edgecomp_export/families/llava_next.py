"""LLaVA-NeXT (LLaVA-1.6; https://llava-vl.github.io/blog/2024-01-30-llava-next): a LLaVA-1.5 whose pictures are cut into tiles.

A picture is fitted to one of the checkpoint's canvases ('anyres'). The model sees an overview first, then the tiles' tokens put
together row by row, without the rows or columns that only show the black around the picture, each row ended by a learned newline.
Which canvas, and what the black takes of it, follows from the picture's shape, which a bundle fixes when it is compiled.
"""
from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.modeling_outputs import BaseModelOutputWithPooling

from edgecomp_export.checkpoint import image_info
from edgecomp_export.families.base import Family
from edgecomp_export.families.llava import grid_side, mark_tower, project, tower, tower_layers
from edgecomp_export.nodes import mark
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import ImageInfo, TileInfo

Size = tuple[int, int]  # height and width, or rows and columns


@dataclass(frozen=True)
class Packing:
    """Which of the tiles' tokens go on, and where to.

    side: tokens on a side of a tile. tiles: rows and columns of tiles beside the overview; (0, 0) for the overview alone.
    first, size: the part that goes on of the tiles' tokens side by side. scaled: what that is scaled to, or None.
    """
    side: int
    tiles: Size = (0, 0)
    first: Size = (0, 0)
    size: Size = (0, 0)
    scaled: Size | None = None

    @property
    def grid(self) -> Size:
        """Rows and columns behind the overview, newlines apart."""
        return self.scaled or self.size

    @property
    def tokens(self) -> int:
        """Overview, grid and newlines. An overview alone is followed by one newline too."""
        rows, columns = self.grid
        return self.side ** 2 + (rows * (columns + 1) or 1)

    def parts(self) -> tuple[TileInfo, ...]:
        """Each tile's tokens among a picture's. A scaled grid is one tile, for scaling mixes the tiles' borders."""
        area, (rows, columns) = self.side ** 2, self.grid
        overview, whole = TileInfo(0, self.side, self.side, self.side), TileInfo(area, rows, columns, columns + 1)
        if self.scaled or not rows:
            return (overview, whole) if rows else (overview,)
        down, across = ([span for n in range(tiles) if (span := range(max(n * self.side - first, 0), min((n + 1) * self.side - first, size)))]
                        for tiles, first, size in zip(self.tiles, self.first, self.size))
        return overview, *(TileInfo(area + y.start * whole.stride + x.start, len(y), len(x), whole.stride) for y in down for x in across)

    def sources(self) -> NDArray[np.int64]:
        """Where each token of the grid [rows, columns], before scaling, stands among those of all tiles, the overview's first."""
        down, across = (np.arange(first, first + size) for first, size in zip(self.first, self.size))
        tile = 1 + (down // self.side)[:, None] * self.tiles[1] + across // self.side
        return (tile * self.side ** 2 + (down % self.side)[:, None] * self.side + across % self.side).astype(np.int64)


class Vision(torch.nn.Module):
    """Tower and projector tile by tile, then the packing, as HF's `get_image_features` and `pack_image_features` have them."""

    def __init__(self, model: Any, packing: Packing):
        super().__init__()
        self.model, self._packing = model, packing

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        tokens = project(self.model, pixels.reshape(-1, *pixels.shape[-3:]))  # [images * tiles, n, D]
        return mark(pack(tokens, self.model.model.image_newline, self._packing), "visual_tokens")


def pack(tokens: torch.Tensor, newline: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Tokens [images * tiles, n, D] of overview and tiles, and the newline [D] -> visual tokens [images, N, D]."""
    rows, columns = packing.tiles
    area, width = packing.side ** 2, tokens.shape[-1]
    tokens = tokens.reshape(-1, (1 + rows * columns) * area, width)
    at = packing.sources()
    if packing.scaled:
        grid = tokens.index_select(1, torch.from_numpy(at.reshape(-1))).reshape(-1, *packing.size, width)
        grid = scale(scale(grid, 1, packing.scaled[0]), 2, packing.scaled[1]).reshape(-1, packing.scaled[0] * packing.scaled[1], width)
        tokens = torch.cat([tokens[:, :area], grid], 1)
        at = area + np.arange(grid.shape[1]).reshape(packing.scaled)
    ends = np.full((len(at) or 1, 1), tokens.shape[1])  # the newline stands behind all the others
    order = np.concatenate([np.arange(area), np.concatenate([at.reshape(len(ends), -1), ends], 1).reshape(-1)])
    every = torch.cat([tokens, newline.expand(tokens.shape[0], 1, width)], 1)
    return every.index_select(1, torch.from_numpy(order))


def scale(grid: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """An axis scaled by linear interpolation between pixel centres, `F.interpolate`'s, of two gathers: backends differ on Resize."""
    length = grid.shape[axis]
    place = np.maximum((np.arange(size) + 0.5) * (length / size) - 0.5, 0)
    low = np.floor(place).astype(np.int64)
    shape = [-1 if n == axis else 1 for n in range(grid.ndim)]
    part = torch.from_numpy(place - low).to(grid.dtype).reshape(shape)
    high = np.minimum(low + 1, length - 1)
    return grid.index_select(axis, torch.from_numpy(low)) * (1 - part) + grid.index_select(axis, torch.from_numpy(high)) * part


class Anyres(Family):
    """What the models with anyres pictures share; towers are those of LLaVA-1.5.

    --image-size is the shape of the pictures expected, of any size: HF's rule gives canvas and packing. --tiles names the canvas by
    its tiles, for pictures of its own shape; by default it is the smallest of those nearest to a square with several tiles. With
    --no-tiles a picture is one tile, whose tokens one newline follows. Pictures of another shape than expected are fitted into the
    part of the canvas that such a picture takes.
    """

    @functools.cached_property
    def side(self) -> int:
        """Pixels on a side of a tile."""
        return int(self.config.vision_config.image_size)

    @functools.cached_property
    def canvases(self) -> list[Size]:
        """The checkpoint's canvases in pixels, in its order, which ties are broken by."""
        found = [(int(high), int(wide)) for high, wide in self.config.image_grid_pinpoints]
        processors = {(int(high), int(wide)) for high, wide in self.processor.get("image_grid_pinpoints") or found}
        if strange := sorted(processors ^ set(found)):
            raise EdgecompError(f"of image_grid_pinpoints the image processor and the model do not both have {strange[0][0]}x{strange[0][1]}: "
                                "this checkpoint does not fit together")
        if odd := [f"{high}x{wide}" for high, wide in found if not high or not wide or high % self.side or wide % self.side]:
            raise EdgecompError(f"image_grid_pinpoints has {odd[0]}, which {self.side}x{self.side} tiles do not fill: "
                                "this checkpoint does not fit together")
        return found

    @functools.cached_property
    def picture(self) -> Size:
        """Height and width of the pictures expected. Raises EdgecompError where --image-size and --tiles do not go together."""
        wanted, size = self.geometry.tiles, self.geometry.image_size
        if wanted == 0:
            if size is not None:
                raise EdgecompError(f"--image-size has no effect with --no-tiles, where every picture becomes one tile of {self.side}x{self.side}: "
                                    "leave one of them out")
            return self.side, self.side
        counts = sorted({self.count(canvas) for canvas in self.canvases})
        if wanted is not None and wanted not in counts:
            raise EdgecompError(f"--tiles {wanted} is none of the numbers of tiles that this model knows: choose {', '.join(map(str, counts))}, "
                                "or --no-tiles")
        if size is None:
            some = [c for c in self.canvases if self.count(c) == wanted or (wanted is None and (self.count(c) > 1 or counts == [1]))]
            # nearest to a square, then small, then landscape
            return min(some, key=lambda c: (max(c) / min(c), c[0] * c[1], c[0]))
        if min(size) < 1:
            raise EdgecompError(f"--image-size {size[0]}x{size[1]} is empty: give the height and width of the pictures expected")
        if wanted is not None and wanted != (found := self.count(choose(size, self.canvases))):
            raise EdgecompError(f"pictures of {size[0]}x{size[1]} have {found} tiles here, not {wanted}: leave out --tiles or --image-size")
        return size

    def count(self, canvas: Size) -> int:
        """Tiles of a canvas."""
        return canvas[0] * canvas[1] // self.side ** 2

    @functools.cached_property
    def packing(self) -> Packing:
        """What becomes of the tiles' tokens. Raises EdgecompError for pictures too long to leave any."""
        packing = Packing(grid_side(self.config)) if self.geometry.tiles == 0 else self.packing_of(self.picture)
        if packing.tiles != (0, 0) and 0 in packing.grid:
            raise EdgecompError(f"pictures of {self.picture[0]}x{self.picture[1]} are so long that no row of tokens is left of their tiles: "
                                "choose another --image-size, or --no-tiles")
        return packing

    def packing_of(self, picture: Size) -> Packing:
        """HF's packing of pictures of a size."""
        canvas, side = choose(picture, self.canvases), grid_side(self.config)
        tiles = canvas[0] // self.side, canvas[1] // self.side
        rows, columns = tiles[0] * side, tiles[1] * side
        if picture[1] / picture[0] > columns / rows:
            # rounded by HF first, for 24.999999999 is 25
            high = int(round(picture[0] * (columns / picture[1]), 7))
            first = (rows - high) // 2, 0
        else:
            wide = int(round(picture[1] * (rows / picture[0]), 7))
            first = 0, (columns - wide) // 2
        size = rows - 2 * first[0], columns - 2 * first[1]
        return Packing(side, tiles, first, size, self.scaled(size))

    def scaled(self, size: Size) -> Size | None:
        """What a grid of tokens of this size is scaled to; None where it stays."""
        return None

    # facts

    def image_info(self) -> ImageInfo:
        info, picture, tiles = image_info(self.processor, (self.side, self.side)), self.picture, self.packing.tiles
        if info.shortest_edge not in (None, self.side):
            raise EdgecompError(f"the image processor resizes tiles to {info.shortest_edge} before it cuts {self.side}x{self.side} out of them: "
                                "this checkpoint does not fit together")
        if self.geometry.tiles == 0:
            return self.alone(dataclasses.replace(info, shortest_edge=None))
        canvas = tiles[0] * self.side, tiles[1] * self.side
        return dataclasses.replace(info, shortest_edge=None, tiles=tiles, overview="first", box=fitted(picture, canvas))

    def alone(self, info: ImageInfo) -> ImageInfo:
        """How a picture is fitted where it becomes one tile: by default as an overview is, whatever its aspect."""
        return info

    def tiles(self) -> tuple[TileInfo, ...]:
        return self.packing.parts()

    def tokens(self) -> int:
        return self.packing.tokens

    def tower(self) -> tuple[int, int, bool]:
        return tower(self.config)

    # modules to trace

    def encoder_layers(self, model: Any) -> torch.nn.ModuleList:
        return tower_layers(model)

    def vision(self, model: Any) -> torch.nn.Module:
        mark_tower(model)
        return Vision(model, self.packing)

    # Hugging Face as the oracle

    def hf_preprocess(self, processor: Any, picture: Any) -> torch.Tensor | None:
        found = processor(images=picture, return_tensors="pt")
        pixels: torch.Tensor = found["pixel_values"].float()  # [1, tiles, 3, H, W]
        if self.geometry.tiles == 0:
            return pixels[:, 0]
        high, wide = (int(n) for n in found["image_sizes"][0])
        return pixels if self.agrees((high, wide)) else None

    def agrees(self, picture: Size) -> bool:
        """Whether HF puts a picture of this size into the pixels and tokens that were compiled for."""
        box, canvas = self.image_info().box, self.image_info().canvas
        return box is not None and self.packing_of(picture) == self.packing and fitted(picture, canvas) == fitted(picture, box)

    def hf_pixels(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pixel_values": pixels, "image_sizes": torch.tensor([self.picture] * len(pixels))}


class LlavaNext(Anyres):
    """`LlavaNextForConditionalGeneration`. With --no-tiles the overview and one newline are left: HF's model code and the authors' have
    that case, but HF's processor never makes it, and HF's `generate` does not count its tokens."""

    def hf_generate(self, model: Any, pixels: torch.Tensor) -> dict[str, Any]:
        if self.geometry.tiles != 0:
            return self.hf_pixels(pixels)
        # HF counts two tiles or more by the picture's size, but takes features that were made before
        features: Any = list(self.hf_features(model, pixels)[0])  # one each picture, as HF packs them
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)}}

    def hf_features(self, model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        if self.geometry.tiles != 0:
            return super().hf_features(model, pixels)
        newline, strategy = model.model.image_newline, self.config.vision_feature_select_strategy
        packed, _ = model.pack_image_features([tile[None] for tile in project(model, pixels)], None, strategy, image_newline=newline)
        return torch.stack(packed), []


def choose(picture: Size, canvases: Iterable[Size]) -> Size:
    """HF's canvas for a picture: the one that shows most of its pixels, and of those the smallest, then the first."""
    def merit(canvas: Size) -> Size:
        ratio = min(canvas[1] / picture[1], canvas[0] / picture[0])
        shown = min(int(picture[1] * ratio) * int(picture[0] * ratio), picture[0] * picture[1])
        return shown, shown - canvas[0] * canvas[1]
    return max(canvases, key=merit)


def fitted(picture: Size, box: Size) -> Size:
    """What a picture becomes within a box, its aspect kept, rounded up as `edgecomp_runtime.images` does."""
    ratio = min(box[1] / picture[1], box[0] / picture[0])
    return min(math.ceil(picture[0] * ratio), box[0]), min(math.ceil(picture[1] * ratio), box[1])
