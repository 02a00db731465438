"""Where visual tokens are on a picture: the grids that cover it, and the pixels below them."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgecomp_runtime.manifest import ImageInfo, Manifest, TileInfo

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class View:
    """A grid (rows, columns) of tokens that covers a picture once. places: of each of its tokens' numbers, the raster place there."""
    name: str
    grid: tuple[int, int]
    places: Mapping[int, int]

    def kept(self, tokens: Iterable[int]) -> list[int]:
        """The raster places of those of the tokens that are in the view."""
        return [self.places[int(token)] for token in tokens if int(token) in self.places]


def views(manifest: Manifest) -> list[View]:
    """The picture, its tiles side by side, and behind it the overview where there is one. Separators are in no view."""
    tiles, (rows, columns), seen = list(manifest.vision.tiles), manifest.image.tiles, manifest.image.overview
    overview = [_side_by_side("overview", [tiles.pop(0 if seen == "first" else -1)], 1)] if seen else []
    if len(tiles) != rows * columns:  # of one packed grid: scaled, or without those that were nothing but black
        columns = len({(t.start - tiles[0].start) % t.stride for t in tiles})
    return [_side_by_side("picture", tiles, columns), *overview]


def on_canvas(manifest: Manifest, kept: Sequence[int]) -> tuple[tuple[int, int], list[int]]:
    """The token grid (rows, columns) that covers a picture once, and the raster places there of kept tokens.

    Tokens of an overview beside tiles, and separators, have no place of their own there.
    """
    view = views(manifest)[0]
    return view.grid, view.kept(kept)


def pictures(picture: Image.Image, info: ImageInfo) -> list[Image.Image]:
    """What is below each view's grid: of the canvas the part that a picture of the compiled shape covers, and the overview."""
    from edgecomp_runtime import images
    canvas = images.fit(picture, info)
    if info.box:  # what is black around it has no tokens
        left, top = (canvas.width - info.box[1]) // 2, (canvas.height - info.box[0]) // 2
        canvas = canvas.crop((left, top, left + info.box[1], top + info.box[0]))
    return [canvas, images.tiles(picture, info)[0 if info.overview == "first" else -1]] if info.overview else [canvas]


def cells(kept: Sequence[int], grid: Sequence[int], pooled: bool) -> list[tuple[float, float, float, float]]:
    """What a plan keeps of a grid, as x, y, width, height in tokens: single tokens, or the cells whose centres are given."""
    rows, columns = grid
    high, wide = len({i // columns for i in kept}), len({i % columns for i in kept})
    if pooled and high * wide == len(kept):
        return [(x * columns / wide, y * rows / high, columns / wide, rows / high) for y in range(high) for x in range(wide)]
    return [(i % columns, i // columns, 1, 1) for i in kept]


def _side_by_side(name: str, tiles: Sequence[TileInfo], columns: int) -> View:
    """The view of tiles in rows of so many."""
    wide, high = sum(t.columns for t in tiles[:columns]), sum(t.rows for t in tiles[::columns])
    places: dict[int, int] = {}
    down = 0
    for row in range(0, len(tiles), columns):
        across = 0
        for tile in tiles[row:row + columns]:
            places |= {tile.start + r * tile.stride + c: (down + r) * wide + across + c for r in range(tile.rows) for c in range(tile.columns)}
            across += tile.columns
        down += tiles[row].rows
    return View(name, (high, wide), places)
