"""Idefics3 (arXiv 2408.12637): a SigLIP tower on square tiles and an overview, pixel shuffle, one projection, a Llama-like decoder."""
from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from edgecomp_export.checkpoint import image_info
from edgecomp_export.families.base import Family, Geometry
from edgecomp_export.nodes import mark, mark_layers, number_attention
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import ImageInfo, TileInfo

MOST_MARKED = 6  # the processors know the markers <row_r_col_c> of 6 rows and 6 columns, and no model saw others
MOST_ASPECT = 3  # of tiles that only their number was asked of: 1x3 still is a panorama, 1x5 is nobody's picture
LANCZOS = 1
TILE = 364  # the processors' own where the settings name none


class Vision(torch.nn.Module):
    """Tower, pixel shuffle and projection: pixels [images, 3, side, side] or [images, tiles, 3, side, side] -> [images, N, D].

    HF's `get_image_features` first looks for padding and for tiles of zeros, which pictures of one shape do not have.

    Args:
        model: HF's.
        places: the trained positions of a tile's patches [patches].
        tokens: N.
    """

    places: torch.Tensor

    def __init__(self, model: Any, places: torch.Tensor, tokens: int):
        super().__init__()
        self.model, self._tokens = model, tokens
        self.register_buffer("places", places)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        inner = self.model.model
        tower = inner.vision_model
        hidden = tower.embeddings.patch_embedding(pixels.flatten(0, -4)).flatten(2).transpose(1, 2)
        hidden = hidden + tower.embeddings.position_embedding(self.places)
        for layer in tower.encoder.layers:
            hidden = layer(hidden, None)
        found = inner.connector(tower.post_layernorm(hidden))
        return mark(found.reshape(pixels.shape[0], self._tokens, found.shape[-1]), "visual_tokens")


class Idefics3(Family):
    """`Idefics3ForConditionalGeneration` of any size and pixel shuffle, GQA or not, tied head or not."""

    def image_info(self) -> ImageInfo:
        side = self.tile_side()
        rows, columns = layout(self.geometry, side, MOST_MARKED)
        one = image_info({"resample": LANCZOS, **self.processor, "size": {"height": side, "width": side}, "crop_size": None}, (side, side))
        if (rows, columns) == (1, 1):
            return dataclasses.replace(one, longest_edge=(self.processor.get("size") or {}).get("longest_edge"))
        # the longest edge is what users of the processor set to have so many tiles
        return dataclasses.replace(one, tiles=(rows, columns), overview="last of canvas", longest_edge=max(rows, columns) * side)

    def tiles(self) -> tuple[TileInfo, ...]:
        return even_tiles(self.grid_side(), self.image_info().count)

    def tower(self) -> tuple[int, int, bool]:
        layers = self.config.vision_config.num_hidden_layers
        return layers, layers - 1, False

    def texts(self) -> tuple[str, ...]:
        fake, overview = self.markers()
        info = self.image_info()
        if info.count == 1:
            return fake + overview, fake
        rows, columns = info.tiles
        before = [("\n" if r and not c else "") + f"{fake}<row_{r + 1}_col_{c + 1}>" for r in range(rows) for c in range(columns)]
        return *before, f"\n\n{fake}{overview}", fake

    def markers(self) -> tuple[str, str]:
        """What stands around pictures, and what before an overview."""
        return "<fake_token_around_image>", "<global-img>"

    def tile_side(self) -> int:
        """A tile's side in pixels."""
        return int((self.processor.get("max_image_size") or {}).get("longest_edge", TILE))

    def grid_side(self) -> int:
        """Visual tokens on a side of a tile. Raises EdgecompError where the pixel shuffle does not divide the patches."""
        scale = self.config.scale_factor
        return shuffled_side(self.tile_side(), self.config.vision_config.patch_size, scale, f"scale_factor {scale}")

    def encoder_layers(self, model: Any) -> torch.nn.ModuleList:
        layers: torch.nn.ModuleList = model.model.vision_model.encoder.layers
        return layers

    def vision(self, model: Any) -> torch.nn.Module:
        mark_layers(self.encoder_layers(model))
        number_attention(self.encoder_layers(model))
        vision = self.config.vision_config
        places = patch_places(self.tile_side() // vision.patch_size, vision.image_size // vision.patch_size)
        return Vision(model, places, self.tokens())

    def text_model(self, model: Any) -> Any:
        return model.model.text_model

    def hf_preprocess(self, processor: Any, picture: Any) -> torch.Tensor | None:
        info = self.image_info()
        size = {"size": {"longest_edge": info.longest_edge}} if info.longest_edge else {}
        found = processor(images=picture, return_tensors="pt", do_image_splitting=info.count > 1, return_row_col_info=True, **size)
        pixels: torch.Tensor = found["pixel_values"].float()  # [1, tiles, 3, side, side]
        if info.count == 1:
            return pixels[:, 0]
        return pixels if (found["rows"][0][0], found["cols"][0][0]) == info.tiles else None

    def hf_pixels(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        every = pixels.flatten(0, -4)
        return {"pixel_values": every[None], "pixel_attention_mask": torch.ones(1, len(every), *every.shape[-2:], dtype=torch.int64)}


def patch_places(side: int, trained: int) -> torch.Tensor:
    """The positions [side * side], of the trained x trained ones, of the patches of a whole square tile (arXiv 2307.06304, section 2.2).

    A patch's place is the number of bounds k / trained that its fraction of the tile has reached. In float32, as HF has it: rounding
    decides where fractions meet bounds, and at some sizes two patches share a place for it.
    """
    fractions = (torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor([side]))).clamp(max=1 - 1e-6)
    at = torch.bucketize(fractions, torch.arange(1 / trained, 1.0, 1 / trained), right=True)
    return (at[:, None] * trained + at).reshape(-1)


def shuffled_side(pixels: int, patch: int, scale: int, setting: str) -> int:
    """Visual tokens on a side of a tile, whose patches a pixel shuffle merges `scale` by `scale`, as a setting of the
    config says. Raises EdgecompError for a remainder."""
    patches = pixels // patch
    if patches % scale:
        raise EdgecompError(f"tiles of {pixels} pixels have {patches} patches of {patch} on a side, which {setting} does not divide: "
                            "this checkpoint's image size and config do not fit together")
    return int(patches // scale)


def even_tiles(side: int, count: int) -> tuple[TileInfo, ...]:
    """So many square grids, one behind the other."""
    return tuple(TileInfo(number * side * side, side, side, side) for number in range(count))


def layout(geometry: Geometry, side: int, most: int | None = None) -> tuple[int, int]:
    """Rows and columns of square tiles, of `side` pixels and `most` in a row or column, that a user's choices ask for; one tile without.

    Raises:
        EdgecompError: pictures that are not made of whole tiles, too many, a number of tiles that only a strip has, or two
            choices that differ.
    """
    size, count = geometry.image_size, geometry.tiles
    if size is None:
        return near_square(count or 1, most)
    rows, columns = (min(max(1, round(edge / side)), most or edge) for edge in size)
    if (rows * side, columns * side) != tuple(size):
        limit = f", at most {most}x{most}" if most else ""
        raise EdgecompError(f"--image-size {size[0]}x{size[1]} is not made of whole tiles of {side}x{side} pixels{limit}: "
                            f"choose {rows * side}x{columns * side}")
    if count is not None and max(1, count) != rows * columns:
        wanted = f"--tiles {count}" if count else "--no-tiles"
        raise EdgecompError(f"--image-size {size[0]}x{size[1]} makes {rows}x{columns} tiles of {side}x{side} pixels, and {wanted} asks "
                            f"for {max(1, count)}: leave one of them out")
    return rows, columns


def near_square(count: int, most: int | None = None) -> tuple[int, int]:
    """Rows and columns of so many tiles, as near to a square as they divide, wide rather than tall. Raises EdgecompError for a strip."""
    if found := _shape(count, most):
        return found
    good = [n for n in range(1, 2 * count) if _shape(n, most)]  # count > 4 here, so a smaller and, without `most`, a larger one are there
    near = [str(n) for n in (max(n for n in good if n < count), min((n for n in good if n > count), default=None)) if n]
    raise EdgecompError(f"--tiles {count} makes no grid" + (f" of at most {most}x{most} tiles" if most else "") +
                        f" that is at most {MOST_ASPECT} times as wide as high: choose {' or '.join(near)}, or the grid itself with --image-size")


def _shape(count: int, most: int | None) -> tuple[int, int] | None:
    rows = max(n for n in range(1, math.isqrt(count) + 1) if count % n == 0)
    columns = count // rows
    return (rows, columns) if columns <= min(MOST_ASPECT * rows, most or columns) else None


