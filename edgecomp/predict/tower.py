"""What a vision tower and its projector cost follows from a few numbers of its vision_config.

Names of fields and defaults are those of Hugging Face's config classes (transformers 5.23).
"""
from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from edgecomp.predict.config import LAYERS, Config, listed, number, optional, ratio, side, text
from edgecomp_runtime.errors import EdgecompError

ROTARY_BYTES, INDEX_BYTES = 4, 8


@dataclass(frozen=True)
class Tower:
    """A vision tower, the layers of it that run.

    merge: that many patches squared become one visual token. tile: patches that see one another (None: the whole picture), or in all but
    `full_layers` layers only `window` of them. class_row: a tile has a row beside its patches. matrices: of an MLP, 3 with a gate.
    patch_weights: elements of the patch embedding, patch_pixels: numbers that the graph copies of a patch (0: a convolution reads them from
    the picture). projector: elements of what follows the tower, by its rows: one a visual token, whatever the count of mergers. small, extras:
    elements beside the matrices, of a layer and of the rest. taken: hidden states, counted as layers before them, that go on to the
    decoder beside the last. joined: one product makes query, key and value. rotary, taps: positions are looked up in tables of so many
    numbers a patch.
    """
    layers: int
    hidden: int
    heads: int
    intermediate: int
    patch_weights: int
    merge: int
    projector: int
    tile: int | None = None
    class_row: bool = False
    matrices: int = 2
    window: int | None = None
    full_layers: int = 0
    small: int = 0
    extras: int = 0
    patch_pixels: int = 0
    taken: tuple[int, ...] = ()
    joined: bool = False
    rotary: int = 0
    taps: int = 0

    @property
    def layer_weights(self) -> int:
        return self.hidden * (4 * self.hidden + self.matrices * self.intermediate)

    @property
    def parameters(self) -> int:
        """All elements: matrices, biases and norms of the layers, embeddings, projector."""
        return self.layers * (self.layer_weights + self.small) + self.patch_weights + self.projector + self.extras

    def patches(self, visual_tokens: int) -> int:
        """Of so many visual tokens' pictures; of a tile all, however many of its tokens are kept."""
        return self.tile * self.tiles(visual_tokens) if self.tile else visual_tokens * self.merge**2

    def tiles(self, visual_tokens: int) -> int:
        """How many tiles the tokens are of; 1 where a picture is not cut into tiles."""
        return ceil(visual_tokens * self.merge**2 / self.tile) if self.tile else 1

    def rows(self, visual_tokens: int) -> int:
        """What goes through the layers: patches, and the row of each tile's class."""
        return self.patches(visual_tokens) + (self.tiles(visual_tokens) if self.class_row else 0)

    def weight_bytes(self, visual_tokens: int, element: float) -> float:
        """Bytes that the graph for so many visual tokens reads as constants, where a parameter takes `element`."""
        tables = 2 * self.rotary * ROTARY_BYTES + self.taps * (element + INDEX_BYTES)
        return self.parameters * element + self.patches(visual_tokens) * tables


def tower_of(family: str, config: Config, vision: Config, hidden: int) -> Tower:
    """The vision tower and projector of a family, from its vision_config; `hidden` is the decoder's width.

    Raises EdgecompError where a number is missing or absurd.
    """
    said = {name: value for name, value in vision.items() if value is not None}
    v = {**TOWERS.get(family, {}), **VISION.get(text(vision, "model_type"), {}), **said}
    width = number(v, "embed_dim" if family == "qwen2_vl" else "hidden_size")
    heads = optional(v, "num_heads", 0) or number(v, "num_attention_heads")
    v |= {"layers": number(v, "depth" if "depth" in v else "num_hidden_layers", LAYERS), "heads": heads,
          "intermediate": optional(v, "intermediate_size", round(width * ratio(v, "mlp_ratio", 4))), "patch_size": side(v, "patch_size")}
    return _any_size(family, v, width, hidden) if family.startswith("qwen") else _of_tiles(family, config, v, width, hidden)


def _any_size(family: str, v: Config, width: int, hidden: int) -> Tower:
    """Qwen's: pictures of any size, positions from their grid, 2 x 2 patches merged."""
    patch, merge, heads, intermediate = v["patch_size"], optional(v, "spatial_merge_size", 2), v["heads"], v["intermediate"]
    pixels, times = 3 * patch * patch, optional(v, "temporal_patch_size", 1)
    wide, out = width * merge * merge, hidden or optional(v, "out_hidden_size", 0)
    deep = tuple(state + 1 for state in _indexes(v, "deepstack_visual_indexes"))
    gated, table = v.get("matrices", 2) == 3, optional(v, "num_position_embeddings", 0)
    norms = (2 if gated else 4) * width
    small = norms + 5 * width + (2 if gated else 1) * intermediate  # norms, biases of query, key, value, output and MLP
    mergers = (1 + len(deep)) * (wide + out) + norms // 2 + 2 * wide * len(deep)
    full = len(_indexes(v, "fullatt_block_indexes"))
    return Tower(v["layers"], width, heads, intermediate, width * pixels * times, merge, (1 + len(deep)) * wide * (wide + out),
                 matrices=v.get("matrices", 2), window=(number(v, "window_size") // patch) ** 2 if full else None, full_layers=full, small=small,
                 extras=mergers + table * width + (width if table else 0), patch_pixels=pixels * (1 + times), taken=deep, joined=True,
                 rotary=width // heads // 2, taps=4 if table else 0)


def _of_tiles(family: str, config: Config, v: Config, width: int, hidden: int) -> Tower:
    """Towers of a fixed picture, of which a larger one is cut into several: CLIP, SigLIP, InternViT."""
    intern, llava = family in INTERN, family in LLAVA
    class_row = family not in SIGLIP and "siglip" not in text(v, "model_type")
    across = side(v, "image_size") // v["patch_size"]
    if family == "gemma3":
        merge = max(across // round(optional(config, "mm_tokens_per_image", 256) ** 0.5), 1)
    elif intern:
        merge = round(1 / ratio(config, "downsample_ratio", 0.5))
    else:
        merge = optional(config, "scale_factor", optional(v, "scale_factor", 1))
    if not 0 < merge <= across:
        raise EdgecompError(f"config: a vision tower of {across} x {across} patches, {merge} x {merge} of which are one token, sees nothing")
    states = _states(config.get("vision_feature_layer", -2 if family in ("llava", "llava_next") else -1), v["layers"]) if intern or llava else ()
    enters = width * (merge * merge if intern or family in IDEFICS else max(len(states), 1))  # Gemma 3 averages what it merges
    extras = (across * across + class_row) * width + width  # positions, and the class row or the patches' bias
    projector, more = enters * hidden, 0
    if intern or llava:
        projector, more = projector + hidden * hidden, 2 * hidden  # biases
    if intern:
        extras, more = extras + width, more + 2 * enters  # patches' bias; a norm of what enters
    elif llava:
        extras += 2 * width if class_row else 0  # CLIP's norm before the layers; that behind them is not used
        more += hidden if family != "llava" else 0  # the mark of a new line
    else:
        extras += 2 * width  # a norm behind the layers
        more += {"gemma3": width, "paligemma": hidden}.get(family, 0)
    small = 9 * width + v["intermediate"]
    if intern:  # two scales; biases of query, key and value, and norms of query and key, are choices there
        small += 2 * width - (0 if v.get("attention_bias") else 3 * width) + (2 * width if v.get("use_qk_norm") else 0)
    layers = max(states) if states else v["layers"]
    return Tower(layers, width, v["heads"], v["intermediate"], width * 3 * v["patch_size"] ** 2, merge, projector, tile=across * across,
                 class_row=class_row, small=small, extras=extras + more, taken=tuple(state for state in states if state < layers))


def _indexes(v: Config, name: str) -> list[int]:
    """Layers that a list names, none of which there must not be."""
    found = listed(v, name)
    if not all(isinstance(each, int) and 0 <= each < v["layers"] for each in found):
        raise EdgecompError(f"config: {name} is {found!r:.60}, where numbers from 0 to {v['layers'] - 1} are expected")
    return found


def _states(select: object, layers: int) -> tuple[int, ...]:
    """The hidden states that features are taken from, by the number of layers before them. `select` counts from the end where it is negative."""
    chosen = [select] if isinstance(select, int) else select
    if not isinstance(chosen, list) or not chosen or not all(isinstance(each, int) and -layers <= each + 1 <= layers + 1 for each in chosen):
        raise EdgecompError(f"config: vision_feature_layer is {select!r}, where numbers from {-layers - 1} to {layers} are expected")
    return tuple(each if each >= 0 else layers + 1 + each for each in chosen)


INTERN, IDEFICS = ("internvl", "qianfan_ocr"), ("smolvlm", "idefics3")
LLAVA = ("llava", "llava_next", "llava_onevision")
SIGLIP = (*IDEFICS, "gemma3", "paligemma")
CLIP = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": 14, "image_size": 336}
INTERN_VIT = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096, "patch_size": 14, "image_size": 448}
SIGLIP_400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14}
IDEFICS_TOWER = {"hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16, "patch_size": 32,
                 "image_size": 224, "scale_factor": 2}
QWEN3 = {"patch_size": 16, "temporal_patch_size": 2, "num_position_embeddings": 2304}
QWEN3_VL = {**QWEN3, "deepstack_visual_indexes": [8, 16, 24]}
# composite model: what its tower has where vision_config says nothing
TOWERS: dict[str, Config] = {
    "qwen2_vl": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14, "temporal_patch_size": 2},
    "qwen2_5_vl": {"depth": 32, "num_heads": 16, "patch_size": 14, "temporal_patch_size": 2, "matrices": 3, "window_size": 112,
                   "fullatt_block_indexes": [7, 15, 23, 31]},
    "qwen3_vl": QWEN3_VL, "qwen3_vl_moe": QWEN3_VL, "qwen3_5": QWEN3, "qwen3_5_moe": QWEN3,
    "smolvlm": IDEFICS_TOWER, "idefics3": IDEFICS_TOWER, "internvl": INTERN_VIT, "qianfan_ocr": INTERN_VIT, "llava": CLIP, "llava_next": CLIP,
    "llava_onevision": {**SIGLIP_400M, "model_type": "siglip_vision_model", "num_hidden_layers": 26, "image_size": 384},
    "gemma3": {**SIGLIP_400M, "image_size": 896}, "paligemma": {**SIGLIP_400M, "image_size": 224},
}
VISION: dict[str, Config] = {
    "siglip_vision_model": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
                            "patch_size": 16},
    "clip_vision_model": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
                          "patch_size": 32},
}
TOWERS_ALONE = {"vit", "clip_vision_model", "siglip_vision_model", "dinov2"}
