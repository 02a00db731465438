"""The manifest of a bundle: `edgecomp.json`, the one contract between compiler, runtime and any other reader.

Every graph input and output carries a role, so that no reader has to parse names. Nothing here is
derived at run time that was known at compile time: image geometry, token counts, cache rows.
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from edgecomp_runtime.errors import BundleError
from edgecomp_runtime.typed import build

# 2: tiles, several runs of visual tokens a picture, M-RoPE, deepstack and segments. 3: cuts inside the decoder. 4: engines. 5: quantized weights
SCHEMA = 5


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of a graph. `shape` holds numbers and, where it varies, the symbol's name.

    Roles: pixels, visual_tokens, kept (positions of the kept tokens in the unpruned raster), embeddings, positions,
    segments (0, or a number that rows share which see each other both ways), length (cache rows in use), logit_rows, logits,
    deepstack (features added after this decoder layer: out of the vision graph, into the decoder, zero at text), cache_key and
    cache_value (the latter three with their layer; an output of the same cache role and layer is the input's buffer, updated in place).
    places: the numbers 0 to n - 1 of the cache's rows that are looked at, behind a cut with its layer. new_rows: [2 * layers, heads, rows,
    width], keys and values of the layers up to the next cut in turn, which the host puts into the cache behind `length` rows.

    A decoder with cuts takes at each, under the layer that stands behind the cut: length (of the caches from there on), visual_rows
    ([images, tokens] among the rows before the cut; no image: nothing is cut), row_map (each row behind the cut: its row before it, or
    that plus the number of the rows before it for the kept tokens of all images in order) and text_rows (the prompt's rows behind its
    last picture, where a method reads them). It gives kept: [images, K] places of the tokens that went on among those that came.
    Where positions are numbered anew, it takes those behind the cut; on several axes only the graph knows them, and it takes moved (the
    positions that pictures in the cache gave up at this cut) and gives saved ([images], those that each picture gives up).
    """
    name: str
    role: str
    dtype: str
    shape: tuple[int | str, ...]
    layer: int | None = None

    @property
    def key(self) -> str:
        """What a backend is fed it under: the role, and the layer where it has one."""
        return self.role if self.layer is None else f"{self.role}.{self.layer}"


@dataclass(frozen=True)
class GraphInfo:
    """What goes in and out of one ONNX file."""
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


@dataclass(frozen=True)
class StepInfo:
    """One compression step as it was applied: the method, where it stands, its budget, its parameters, and the quota's windows.

    site: 'encoder:L' and 'decoder:L' are before that layer, 'projector' is what leaves the vision graph.
    needs_prompt: what is kept depends on the question, so it cannot be cached an image.
    """
    method: str
    site: str
    keep: int
    parameters: dict[str, int | float | str] = field(default_factory=dict)
    windows: tuple[int, int] | None = None
    needs_prompt: bool = False


@dataclass(frozen=True)
class CutInfo:
    """From this decoder layer on a picture has fewer visual tokens: so many of each tile."""
    layer: int
    tile_tokens: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.tile_tokens)


@dataclass(frozen=True)
class PlanInfo:
    """One named budget: the graph files to run for it, by dialect and then by part (vision, prefill, decode).

    position: 'keep' (kept tokens stay where they were, the next token is at the unpruned length) or 'compact'.
    visual_tokens: of a picture as they leave the vision graph, over all its tiles; tile_tokens: those of each tile.
    cache_rows: rows that each decoder layer's cache holds. cuts: inside the decoder, by layer.
    """
    steps: tuple[StepInfo, ...]
    position: str
    visual_tokens: int
    tile_tokens: tuple[int, ...]
    cache_rows: tuple[int, ...]
    variants: dict[str, dict[str, str]]
    cuts: tuple[CutInfo, ...] = ()

    def tokens_at(self, layer: int) -> int:
        """Visual tokens of a picture in a decoder layer."""
        return next((cut.tokens for cut in reversed(self.cuts) if cut.layer <= layer), self.visual_tokens)

    @property
    def needs_prompt(self) -> bool:
        return any(step.needs_prompt for step in self.steps)


@dataclass(frozen=True)
class ImageInfo:
    """How a picture becomes pixels: fitted to a canvas of `tiles` (rows, columns) of `size`, cut up, scaled, normalised.

    Fitting, by what is set: `shortest_edge`: resized to it, centre cut out (one tile only). `longest_edge`: resized to it, then to
    the canvas whatever its aspect. `box`: resized within this (height, width) with its aspect kept, centred, black around it.
    `square`: padded to a square with this colour, then resized to the canvas. None of them: resized to the canvas whatever its aspect.

    overview: where the whole picture, resized to one more tile, stands among them: 'first' and 'last' are made of the picture
    itself, 'last of canvas' of what was cut up; '' where there is none.
    """
    size: tuple[int, int]
    shortest_edge: int | None
    resample: int
    rescale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    tiles: tuple[int, int] = (1, 1)
    overview: str = ""
    longest_edge: int | None = None
    box: tuple[int, int] | None = None
    square: tuple[int, int, int] | None = None

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width of all tiles side by side."""
        return self.size[0] * self.tiles[0], self.size[1] * self.tiles[1]

    @property
    def count(self) -> int:
        """Tiles of a picture, the overview among them. One has pixels [3, H, W], several have [count, 3, H, W]."""
        return self.tiles[0] * self.tiles[1] + bool(self.overview)

    @property
    def fit(self) -> str:
        """What happens to a picture of another shape, in a word."""
        return "cropped" if self.shortest_edge else "letterboxed" if self.box else "padded" if self.square else "resized"


@dataclass(frozen=True)
class TileInfo:
    """A tile's place among a picture's visual tokens: the token at (row, column) is number start + row * stride + column."""
    start: int
    rows: int
    columns: int
    stride: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class VisionInfo:
    """The vision tower and what it makes of a picture.

    tokens: of a picture, over all tiles; those in no tile are separators (row newlines), which go with the first pruning.
    texts: what stands around the visual tokens in a prompt: before and after them all, or around each tile's.
    max_images: of a prompt.
    layers, select_layer, has_cls: of the tower, and whether each tile has a CLS row there.
    """
    tokens: int
    tiles: tuple[TileInfo, ...]
    texts: tuple[str, ...]
    max_images: int
    layers: int
    select_layer: int
    has_cls: bool

    @property
    def runs(self) -> int:
        """Stretches of visual tokens that a picture has in a prompt."""
        return len(self.texts) - 1


@dataclass(frozen=True)
class TextInfo:
    """Tokenizer, chat template and the special ids.

    image_token, image_id: what the visual tokens take the place of. placeholder: what stands for a whole picture in a chat
    template's output and in raw prompts (the same token in most families).
    """
    tokenizer: str
    chat_template: str | None
    special_tokens: dict[str, str]
    end_ids: tuple[int, ...]
    image_token: str
    image_id: int
    placeholder: str


@dataclass(frozen=True)
class TableInfo:
    """The token embeddings: a table in a weight file, memory-mapped and gathered on the host, then multiplied by `scale`."""
    file: str
    offset: int
    shape: tuple[int, int]
    dtype: str
    scale: float = 1.0


@dataclass(frozen=True)
class DecoderInfo:
    """The decoder's shape, as far as the cache and reports need it. `context` is the window in unpruned rows.

    position_axes: 1, or 3 for M-RoPE (temporal, row, column; arXiv 2409.12191). first_position: of the first row.
    bidirectional: what sees itself both ways: '' nothing, 'images' each picture, 'prompt' all of the prompt.
    """
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    hidden: int
    context: int
    position_axes: int = 1
    first_position: int = 0
    bidirectional: str = ""


@dataclass(frozen=True)
class SourceInfo:
    """The checkpoint that a bundle was made from. `sha256` is over the names and hashes of its weight files.

    image_size, tiles: what was chosen of its pictures; None was left to the family.
    """
    model: str
    family: str
    sha256: str
    image_size: tuple[int, int] | None = None
    tiles: int | None = None


@dataclass(frozen=True)
class FileInfo:
    """Size and hash of one file of the bundle."""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class EngineInfo:
    """An engine that was built of one graph for one device.

    file: of the bundle. graph: what it was built of. device: the profile's id. backend: 'tensorrt' or 'tensorrt-rtx', and its version.
    capability: the GPU's, as '8.9'. profile: for each input its smallest, usual and largest shape. flags: how it was built.
    """
    file: str
    graph: str
    device: str
    backend: str
    version: str
    capability: str
    profile: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    flags: dict[str, int | float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class QuantizedInfo:
    """Weights in blocks of whole numbers, each with one fp16 scale, around zero, or around a number of its own where a checkpoint came so.

    precision: what was asked for, or the fewest bits of a checkpoint that came so, 'int8' or 'int4'. block: numbers of a row that share a
    scale. bits: of each weight, by its name in the graphs.
    """
    precision: str
    block: int
    bits: dict[str, int]


@dataclass(frozen=True)
class CalibratedInfo:
    """Products of the vision graphs in whole numbers, what enters them with one scale a tensor, found by running each graph on pictures.

    activations: 'int8'. choice, seed: how the pictures were chosen. images: the sha256 of each file.
    """
    activations: str
    choice: str
    seed: int
    images: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything about a bundle. `plans` always has 'full', the unpruned model; `graphs` are by file, for plans share them."""
    schema: int
    made_by: str
    source: SourceInfo
    precision: str
    image: ImageInfo
    vision: VisionInfo
    text: TextInfo
    embeddings: TableInfo
    decoder: DecoderInfo
    default_plan: str
    plans: dict[str, PlanInfo]
    graphs: dict[str, GraphInfo]
    files: dict[str, FileInfo]
    engines: tuple[EngineInfo, ...] = ()
    quantized: QuantizedInfo | None = None
    calibrated: CalibratedInfo | None = None

    @property
    def weights(self) -> str:
        """How the decoder's weights are stored: 'int8' or 'int4' where they were quantized, else as `precision` says."""
        return self.quantized.precision if self.quantized else self.precision

    def to_json(self) -> str:
        """The manifest as JSON, with its own digest, so that a changed byte shows."""
        data = dataclasses.asdict(self)
        return json.dumps({**data, "digest": _digest(data)}, indent=1)

    @staticmethod
    def from_json(text: str) -> Manifest:
        """Reads `to_json`. Raises BundleError where the text is no manifest, is newer, incomplete or changed."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"edgecomp.json is not JSON ({error}): the bundle is damaged; compile it again") from None
        if not isinstance(data, dict) or not isinstance(data.get("schema"), int) or data["schema"] < 1:
            raise BundleError("edgecomp.json has no schema number: this is not an edgecomp bundle")
        if data["schema"] > SCHEMA:
            maker = data.get("made_by", "a newer edgecomp")
            raise BundleError(f"the bundle has schema {data['schema']}, made by {maker}; this reader knows up to {SCHEMA}: install {maker} or later")
        digest = data.pop("digest", None)
        if digest != _digest(data):
            raise BundleError("edgecomp.json was changed after it was written (its digest differs): compile the bundle again")
        try:
            manifest: Manifest = build(Manifest, data, "edgecomp.json")
        except BundleError as error:
            raise BundleError(f"{error}: compile the bundle again") from None
        return manifest


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
