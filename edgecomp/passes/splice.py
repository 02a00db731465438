"""Putting a method into a graph: a call of its function at the place that a mark names."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgecomp.ir.rewrite import constant, dims, marks
from edgecomp.methods.base import DOMAIN, Merging, Method, Place
from edgecomp.passes.signals import SIGNALS
from edgecomp_runtime.manifest import TileInfo, VisionInfo


def at_projector(model: ir.Model, vision: VisionInfo, method: Method, parts: Sequence[Place], *, whole: bool = False,
                 expose: bool = False) -> None:
    """Shortens the vision graph's visual tokens to each tile's budget, in place; the graph gains the output `kept` [images, K].

    The method sees the tiles of one shape and budget as a batch. What it keeps of all tiles goes on in the order that it had;
    separators between them (row newlines) go. Deepstack features follow the kept tokens.

    Args:
        model: the neutral vision graph.
        vision: the tower's facts.
        method: the rule to put in.
        parts: each tile's grid and budget.
        whole: nothing goes, not even separators.
        expose: add what the rule saw and did as outputs: features, each signal, and the order of choice. One tile without separators only.
    """
    features = marks(model, "visual_tokens")[-1].outputs[0]
    stacked = {layer: mark.outputs[0] for layer, mark in marks(model, "deepstack").items()}
    signals = [SIGNALS[name](model, vision) for name in method.taxonomy.signals]
    images, _, width = dims(features)
    work = _Splice(model, vision, method)
    tokens, kept, order = (features, work.every(features), None) if whole else work.tiles(features, signals, parts)
    followed = {layer: value if whole else work.follow(value, kept, parts) for layer, value in stacked.items()}
    for layer, value in stacked.items():
        _typed(value, f"features.{layer}", features.dtype, [images, vision.tokens, width])
    _typed(features, "features", features.dtype, [images, vision.tokens, width])
    keep = vision.tokens if whole else sum(place.keep for place in parts)
    _typed(tokens, "visual_tokens", features.dtype, [images, keep, width])
    _typed(kept, "kept", ir.DataType.INT64, [images, keep])
    for layer, value in followed.items():
        _typed(value, f"deepstack.{layer}", features.dtype, [images, keep, width])
    model.graph.outputs[:] = [tokens, kept, *followed.values()]
    if expose and order is not None:
        _typed(order, "order", ir.DataType.INT64, [images, keep])
        for name, signal in zip(method.taxonomy.signals, signals):
            _typed(signal, name, ir.DataType.FLOAT, [images, vision.tokens])
        model.graph.outputs.extend([features, *signals, order])


class _Splice:
    """Adds a method's nodes at the end of a vision graph, where all that it reads has been computed."""

    def __init__(self, model: ir.Model, vision: VisionInfo, method: Method):
        self.model, self.vision, self.method = model, vision, method

    def tiles(self, features: ir.Value, signals: Sequence[ir.Value],
              parts: Sequence[Place]) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """Tokens [images, K, D] and places [images, K] that are kept, and for one tile without separators the order of choice [images, K]."""
        if len(parts) == 1 and parts[0].tokens == self.vision.tokens:
            tokens, kept, order = self.call(parts[0], features, *signals)
            return tokens, kept, order
        groups = [self.group(features, place, [t for t, part in zip(self.vision.tiles, parts) if part == place]) for place in dict.fromkeys(parts)]
        tokens, kept = (self.add("Concat", *values, axis=1) for values in zip(*groups))
        # ONNX has no sort; places below 2^24 are exact as floats, which every backend's TopK takes
        count = self.ints("places_kept", [sum(place.keep for place in parts)])
        ascending, order = self.add_many("TopK", 2, self.add("Cast", kept, to=ir.DataType.FLOAT), count, axis=1, largest=0, sorted=1)
        return self.gather(tokens, order), self.add("Cast", ascending, to=ir.DataType.INT64), None

    def group(self, features: ir.Value, place: Place, tiles: Sequence[TileInfo]) -> tuple[ir.Value, ir.Value]:
        """What is kept of tiles of one shape and budget: tokens [images, tiles * k, D] and places [images, tiles * k]."""
        name = f"tiles_{place.grid[0]}x{place.grid[1]}_{place.keep}"
        every = np.stack([places_of(tile) for tile in tiles])  # [tiles, n]
        width = dims(features)[-1]
        mine = self.add("Gather", features, self.ints(f"{name}_places", every.reshape(-1)), axis=1)
        batch = self.add("Reshape", mine, self.ints(f"{name}_batch", [-1, place.tokens, width]))
        tokens, kept, _ = self.call(place, batch)  # [images * tiles, k, D], [images * tiles, k]
        by_tile = self.add("Reshape", kept, self.ints(f"{name}_by_tile", [-1, len(tiles), place.keep]))
        flat = self.add("Add", by_tile, self.ints(f"{name}_starts", (np.arange(len(tiles)) * place.tokens)[None, :, None]))
        places = self.add("Gather", self.ints(f"{name}_flat", every.reshape(-1)), flat, axis=0)
        return (self.add("Reshape", tokens, self.ints(f"{name}_tokens", [-1, len(tiles) * place.keep, width])),
                self.add("Reshape", places, self.ints(f"{name}_kept", [-1, len(tiles) * place.keep])))

    def follow(self, stacked: ir.Value, kept: ir.Value, parts: Sequence[Place]) -> ir.Value:
        """Deepstack features [images, N, D] of what is kept: the same rows, or the same averages."""
        return self.tiles(stacked, [], parts)[0] if isinstance(self.method, Merging) else self.gather(stacked, kept)

    def call(self, place: Place, features: ir.Value, *signals: ir.Value) -> Sequence[ir.Value]:
        function = self.method.function(place)
        self.model.functions[function.identifier()] = function
        self.model.opset_imports[DOMAIN] = 1
        return self.add_many(function.name, 3, features, *signals, domain=DOMAIN)

    def gather(self, features: ir.Value, indices: ir.Value) -> ir.Value:
        return self.add("GatherND", features, self.add("Unsqueeze", indices, self.ints("last_axis", [2])), batch_dims=1)

    def every(self, features: ir.Value) -> ir.Value:
        """All places of each image, [images, N]."""
        images = self.add("Shape", features, start=0, end=1)
        shape = self.add("Concat", images, self.ints("one", [1]), axis=0)
        return self.add("Expand", self.ints("all_places", np.arange(self.vision.tokens)[None]), shape)

    def ints(self, name: str, values: Sequence[object] | NDArray[np.int64]) -> ir.Value:
        return constant(self.model, name, np.array(values, np.int64))

    def add(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return self.add_many(op_type, 1, *inputs, **attributes)[0]

    def add_many(self, op_type: str, outputs: int, *inputs: ir.Value, domain: str = "", **attributes: Any) -> Sequence[ir.Value]:
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs)
        self.model.graph.append(node)
        return node.outputs


def places_of(tile: TileInfo) -> NDArray[np.int64]:
    """The places of a tile's tokens among a picture's visual tokens, row by row: [rows * columns]."""
    return (tile.start + np.arange(tile.rows)[:, None] * tile.stride + np.arange(tile.columns)).reshape(-1).astype(np.int64)


def _typed(value: ir.Value, name: str, dtype: ir.DataType | None, shape: object) -> None:
    assert dtype is not None
    value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)  # type: ignore[arg-type]
