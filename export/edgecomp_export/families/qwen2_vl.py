"""Qwen2-VL: a tower of any resolution with 2D rotary positions, 2 x 2 patches a visual token, M-RoPE (arXiv 2409.12191).

What its successors share with it is here: the picture's size, patches made inside the graph, attention over segments, positions.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgecomp_export import checkpoint
from edgecomp_export.families.base import Family
from edgecomp_export.nodes import attend, mark, mark_layers
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import ImageInfo, TileInfo

DEFAULT_SIDE = 448  # pixels, before the family's own rule: 256 visual tokens of 28 x 28 pixels
LIMITS = 56 * 56, 28 * 28 * 1280  # pixels of a picture, where the processor's settings name none
MOST_STRETCHED = 200  # the processor refuses pictures of a larger aspect

Segments = Sequence[tuple[int, int]]  # (how many, rows of each), in the order of the rows; rows see those of their own segment


@dataclass(frozen=True)
class Grid:
    """A picture as the tower has it: `rows` x `columns` patches of `patch` pixels a side, `merge` x `merge` of them a visual token.

    The tower's rows are patches in this order: visual tokens in raster order, in each its patches in raster order.
    """
    rows: int
    columns: int
    patch: int
    merge: int
    frames: int  # a still picture is shown so many times

    @property
    def tokens(self) -> tuple[int, int]:
        """Rows and columns of visual tokens."""
        return self.rows // self.merge, self.columns // self.merge

    def places(self) -> NDArray[np.int64]:
        """Row and column of each patch, in the tower's order: [patches, 2]."""
        down, across = self.tokens
        raster = np.arange(self.rows * self.columns).reshape(down, self.merge, across, self.merge)
        return np.stack(np.divmod(raster.transpose(0, 2, 1, 3).reshape(-1), self.columns), 1).astype(np.int64)

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [images, 3, H, W] -> [images, patches, 3 * frames * patch * patch], every frame the same."""
        (down, across), merge, patch = self.tokens, self.merge, self.patch
        cut = pixels.reshape(-1, 3, down, merge, patch, across, merge, patch).permute(0, 2, 5, 3, 6, 1, 4, 7)
        still = cut.reshape(-1, self.rows * self.columns, 3, 1, patch * patch)
        return still.expand(-1, -1, -1, self.frames, -1).reshape(-1, self.rows * self.columns, 3 * self.frames * patch * patch)

    def pixels(self, patches: torch.Tensor) -> torch.Tensor:
        """The first frame of what `patches` makes, back in pixels [images, 3, H, W]."""
        (down, across), merge, patch = self.tokens, self.merge, self.patch
        cut = patches.reshape(-1, down, across, merge, merge, 3, self.frames, patch, patch)[:, :, :, :, :, :, 0]
        return cut.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(-1, 3, self.rows * patch, self.columns * patch)


class Qwen2VL(Family):
    """`Qwen2VLForConditionalGeneration` at one size of pictures, chosen when it is compiled."""

    position_axes = 3

    def image_info(self) -> ImageInfo:
        self.refuse_choices("tiles")
        size = self.size()
        return checkpoint.image_info({**self.processor, "size": {"height": size[0], "width": size[1]}, "crop_size": None}, size)

    def size(self) -> tuple[int, int]:
        """Height and width of pictures in pixels: as chosen, or the default square where the processor's limits allow it.

        Raises:
            EdgecompError: a size that is not made of whole visual tokens, or a processor that is not this tower's.
        """
        vision, asked = self.config.vision_config, self.geometry.image_size
        for ours, theirs in (("patch_size", "patch_size"), ("spatial_merge_size", "merge_size"), ("temporal_patch_size", "temporal_patch_size")):
            if self.processor.get(theirs, getattr(vision, ours)) != getattr(vision, ours):
                raise checkpoint.CheckpointError(f"the image processor's {theirs} is {self.processor[theirs]}, the vision tower's "
                                                 f"{getattr(vision, ours)}: this checkpoint does not fit together")
        block = vision.patch_size * vision.spatial_merge_size
        if asked is None:
            return fitting_size((DEFAULT_SIDE, DEFAULT_SIDE), block, limits(self.processor))
        if any(side < block or side % block for side in asked):
            near = [sorted({max(side // block, 1) * block, max(-(-side // block), 1) * block}) for side in asked]
            sizes = ", ".join(f"{high}x{wide}" for high in near[0] for wide in near[1])
            raise EdgecompError(f"--image-size {asked[0]}x{asked[1]} is not made of visual tokens of {block}x{block} pixels: choose {sizes}")
        return asked

    def grid(self) -> Grid:
        """The picture in patches."""
        vision, (height, width) = self.config.vision_config, self.size()
        return Grid(height // vision.patch_size, width // vision.patch_size, vision.patch_size, vision.spatial_merge_size,
                    vision.temporal_patch_size)

    def tiles(self) -> tuple[TileInfo, ...]:
        rows, columns = self.grid().tokens
        return (TileInfo(0, rows, columns, columns),)

    def tower(self) -> tuple[int, int, bool]:
        depth = self.config.vision_config.depth
        return depth, depth - 1, False

    def vision(self, model: Any) -> torch.nn.Module:
        return Vision(model, self.grid())

    def encoder_layers(self, model: Any) -> torch.nn.ModuleList:
        layers: torch.nn.ModuleList = model.model.visual.blocks
        return layers

    def decode(self, decoder: Any, embeddings: torch.Tensor, positions: torch.Tensor, cache: Any, deepstack: Sequence[torch.Tensor]) -> torch.Tensor:
        self.turn_once(decoder)
        return super().decode(decoder, embeddings, positions, cache, deepstack)

    def turn_once(self, decoder: Any) -> None:
        """Gives a decoder that is traced a plainer M-RoPE than HF's, see `turns`."""
        rotary = decoder.rotary_emb
        if rotary.rope_type == "default" and hasattr(rotary, "recomposition_frequencies"):
            rotary.forward = partial(turns, rotary, torch.tensor(self.axes(rotary.mrope_section).tolist()))

    def axes(self, sections: Sequence[int]) -> NDArray[np.int64]:
        """The axis (0 to 2) whose position each rotary frequency turns with: [head_dim / 2]."""
        return np.repeat(np.arange(3), sections)

    def hf_preprocess(self, processor: Any, picture: Any) -> torch.Tensor | None:
        sides = picture.shape[:2] if isinstance(picture, np.ndarray) else picture.size
        if max(sides) > MOST_STRETCHED * min(sides):
            return None
        found, grid = processor(images=picture, return_tensors="pt"), self.grid()
        if found["image_grid_thw"].tolist() != [[1, grid.rows, grid.columns]]:
            return None
        return grid.pixels(found["pixel_values"].float())

    def hf_pixels(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.grid().patches(pixels).flatten(0, 1), "image_grid_thw": self.hf_grids(len(pixels))}

    def hf_grids(self, images: int) -> torch.Tensor:
        """What HF calls image_grid_thw: frames, rows and columns of patches, for each picture."""
        grid = self.grid()
        return torch.tensor([[1, grid.rows, grid.columns]]).expand(images, 3)

    def hf_prompt(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"mm_token_type_ids": (ids == self.config.image_token_id).int()}

    def hf_positions(self, model: Any, ids: torch.Tensor, images: int) -> NDArray[np.int64]:
        grids = self.hf_grids(images) if images else None
        found: NDArray[np.int64] = model.model.get_rope_index(ids, image_grid_thw=grids, **self.hf_prompt(ids))[0][:, 0].numpy()
        return found


class Vision(torch.nn.Module):
    """The tower on a batch of equal grids, and its merger.

    Args:
        model: HF's; its blocks' attention is replaced.
        grid: the picture in patches.
        order: the visual token that stands at each place while the tower runs, [tokens]; raster order where None.
        segments: what sees itself in each layer; whole pictures where None.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    order: torch.Tensor
    raster: torch.Tensor

    def __init__(self, model: Any, grid: Grid, order: NDArray[np.int64] | None = None, segments: Sequence[Segments] | None = None):
        super().__init__()
        self.model, self.grid = model, grid
        blocks, unit = model.model.visual.blocks, grid.merge ** 2
        for layer, block in enumerate(blocks):
            block.attn.forward = partial(attention, block.attn, layer, segments[layer] if segments else [(1, grid.rows * grid.columns)])
        mark_layers(blocks)
        places, self.reordered = grid.places(), order is not None
        if order is not None:
            patches = (order[:, None] * unit + np.arange(unit)).reshape(-1)
            places = places[patches]
            self.register_buffer("order", torch.from_numpy(patches), persistent=False)
            self.register_buffer("raster", torch.from_numpy(np.argsort(order)), persistent=False)
        theta = (getattr(model.config.vision_config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
        angles = rotations(places, blocks[0].attn.head_dim, theta)
        self.register_buffer("cos", torch.from_numpy(np.cos(angles)).to(model.dtype), persistent=False)
        self.register_buffer("sin", torch.from_numpy(np.sin(angles)).to(model.dtype), persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        states = self.states(self.embed(pixels))
        return mark(self.merged(self.model.model.visual.merger, states[-1]), "visual_tokens")

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [images, 3, H, W] -> patches [images, S, D]. The weight is a 3D convolution's, which over one patch is a product."""
        projection = self.model.model.visual.patch_embed.proj
        return torch.nn.functional.linear(self.grid.patches(pixels), projection.weight.flatten(1), projection.bias)

    def states(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """The hidden state [images, S, D] behind each layer, in the tower's order."""
        if self.reordered:
            hidden = torch.index_select(hidden, 1, self.order)
        rope = tuple(table.expand(hidden.shape[0], -1, -1) for table in (self.cos, self.sin))
        found = []
        for block in self.model.model.visual.blocks:
            hidden = block(hidden, cu_seqlens=None, position_embeddings=rope)
            found.append(hidden)
        return found

    def merged(self, merger: Any, hidden: torch.Tensor) -> torch.Tensor:
        """A merger's tokens [images, N, D] of a hidden state, in raster order."""
        rows, columns = self.grid.tokens
        tokens = merger(hidden).reshape(-1, rows * columns, self.model.config.get_text_config().hidden_size)
        return torch.index_select(tokens, 1, self.raster) if self.reordered else tokens


def attention(module: Any, layer: int, segments: Segments, hidden: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor],
              **_: Any) -> torch.Tensor:
    """A block's attention on [images, S, D], inside each segment. Segments of one length are a batch: exact, and without a mask.

    position_embeddings: cosine and sine [images, S, head_dim / 2].
    """
    heads, width = module.num_heads, module.num_heads * module.head_dim
    query, key, value = module.qkv(hidden).chunk(3, -1)
    query, key = (torch.onnx.ops.rotary_embedding(x, *position_embeddings, num_heads=heads) for x in (query, key))
    found, start = [], 0
    for count, length in segments:
        rows = slice(start, start + count * length)
        # two steps, so that folding windows into the batch and splitting heads can be told apart in the graph
        folded = ((x if len(segments) == 1 else x[:, rows]).reshape(-1, length, width) for x in (query, key, value))
        q, k, v = (x.reshape(-1, length, heads, module.head_dim).transpose(1, 2) for x in folded)
        seen = attend(q, k, v, module.scaling, layer).transpose(1, 2).reshape(-1, length, width)
        found.append(seen.reshape(-1, count * length, width))
        start = rows.stop
    projected: torch.Tensor = module.proj(found[0] if len(found) == 1 else torch.cat(found, 1))
    return projected


def turns(rotary: Any, axes: torch.Tensor, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """M-RoPE's cosine and sine [B, S, head_dim] of positions [3, B, S]: HF's numbers, by one selection instead of many slices.

    So written that the exporter finds the rotary embedding in it.
    """
    angles = torch.index_select(position_ids, 0, axes).permute(1, 2, 0).float() * rotary.inv_freq.float()
    both = torch.cat((angles, angles), -1)
    return both.cos().to(x.dtype), both.sin().to(x.dtype)


def rotations(places: NDArray[np.int64], head_dim: int, theta: float) -> NDArray[np.float32]:
    """Angles [patches, head_dim / 2] of rotary positions on two axes: half of the frequencies turn with the row, half with the column."""
    speeds = (theta ** -(np.arange(0, head_dim // 2, 2) / (head_dim // 2))).astype(np.float32)  # [head_dim / 4]
    return (places[:, :, None].astype(np.float32) * speeds).reshape(len(places), -1)


def limits(settings: dict[str, Any]) -> tuple[int, int]:
    """The least and most pixels of a picture, in any of the spellings that these processors' settings have had."""
    size = settings.get("size") or {}
    least, most = (settings.get(old) or size.get(new) or size.get(old) or default
                   for old, new, default in (("min_pixels", "shortest_edge", LIMITS[0]), ("max_pixels", "longest_edge", LIMITS[1])))
    return least, most


def fitting_size(size: tuple[int, int], block: int, limits: tuple[int, int]) -> tuple[int, int]:
    """The processor's own rule: the height and width in whole blocks nearest to a picture's, and within the limits of pixels."""
    height, width = (max(round(side / block), 1) * block for side in size)
    least, most = limits
    scale = math.sqrt(size[0] * size[1] / (most if height * width > most else least))
    if height * width > most:
        height, width = (max(math.floor(side / scale / block), 1) * block for side in size)
    elif height * width < least:
        height, width = (math.ceil(side / scale / block) * block for side in size)
    return height, width
