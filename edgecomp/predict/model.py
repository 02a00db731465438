"""What a model costs follows from a few numbers of its config.json: widths, heads, layers, experts, and its vision tower.

Names of fields and defaults are those of Hugging Face's config classes (transformers 5.23); a published config leaves out what is a
default of its class, so the few that matter are repeated in DEFAULTS.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgecomp_runtime.errors import EdgecompError, UnknownNameError

Config = dict[str, Any]


@dataclass(frozen=True)
class Layer:
    """One decoder layer: a mixer of rows (attention or a recurrence, or neither), then an MLP (or none).

    window: rows that attention looks back on. gate: the query projection has a second half that gates the output (Qwen3.5).
    shared_value: keys serve as values, so that one projection is saved (Gemma 4). biases: elements beside the matrices.
    state: elements that a recurrence carries from row to row, recurrence: its kind, 'delta' or 'mamba', projections: its matrices' elements.
    intermediate: of the dense MLP or of one expert; matrices: 3 with a gate, 2 without. experts are stored, `active` of them run.
    shared: the width of the expert that always runs.
    """
    hidden: int
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    window: int | None = None
    gate: bool = False
    shared_value: bool = False
    biases: int = 0
    recurrence: str = ""
    state: int = 0
    projections: int = 0
    intermediate: int = 0
    matrices: int = 3
    experts: int = 0
    active: int = 0
    shared: int = 0

    @property
    def mixer_weights(self) -> int:
        """Elements of the matrices of attention, or of the recurrence."""
        if self.recurrence:
            return self.projections
        queries = self.heads * self.head_dim * (3 if self.gate else 2)  # query (and gate), and output
        return self.hidden * (queries + self.kv_heads * self.head_dim * (1 if self.shared_value else 2))

    def mlp_weights(self, experts: float) -> float:
        """Elements of the MLP's matrices, with so many experts, the router among them."""
        width = self.intermediate * (experts if self.experts else 1) + self.shared
        return self.matrices * self.hidden * width + self.hidden * self.experts

    @property
    def cache_elements(self) -> int:
        """Elements that one row adds to the keys and values."""
        return 2 * self.kv_heads * self.head_dim

    def rows(self, context: float) -> float:
        """Rows of the cache that a new row looks at."""
        return min(context, self.window) if self.window else context


@dataclass(frozen=True)
class Tower:
    """A vision tower. `merge` patches by `merge` become one visual token; attention sees `tile` patches (None: the whole picture), or in
    all but `full_layers` layers only `window` of them. patch_weights: of the patch embedding. projector: elements of what follows the
    tower, by its rows: one a visual token, whatever the count of mergers.
    """
    layers: int
    hidden: int
    heads: int
    intermediate: int
    patch_weights: int
    merge: int
    projector: int
    tile: int | None = None
    matrices: int = 2
    window: int | None = None
    full_layers: int = 0
    extras: int = 0

    @property
    def layer_weights(self) -> int:
        return self.hidden * (4 * self.hidden + self.matrices * self.intermediate)

    @property
    def parameters(self) -> int:
        """All elements: matrices, biases and norms of the layers, embeddings, projector."""
        small = 9 * self.hidden + self.intermediate
        return self.layers * (self.layer_weights + small) + self.patch_weights + self.projector + self.extras


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that operations and bytes follow from. `extras`: elements that no matrix product uses (norms, tables)."""
    family: str
    hidden: int
    vocabulary: int
    tied: bool
    layers: tuple[Layer, ...]
    tower: Tower | None = None
    context: int | None = None
    extras: int = 0

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def decoder_parameters(self) -> float:
        """All elements of the decoder, every expert and the embeddings among them, tied ones once."""
        layers = sum(layer.mixer_weights + layer.mlp_weights(layer.experts) + layer.biases + 2 * layer.hidden for layer in self.layers)
        return layers + self.head_weights * (1 if self.tied else 2) + self.hidden + self.extras

    @property
    def parameters(self) -> float:
        """All elements of the model."""
        return self.decoder_parameters + (self.tower.parameters if self.tower else 0)

    @staticmethod
    def of_config(config: Config) -> Shape:
        """The shape of a Hugging Face config.json.

        Raises UnknownNameError for an architecture that is not in the tables, EdgecompError where a number is missing or absurd.
        """
        family = config.get("model_type")
        if not isinstance(family, str):
            raise EdgecompError("the config has no model_type: give the config.json of a Hugging Face checkpoint")
        if family in TOWERS_ALONE:
            return Shape(family, 0, 0, True, (), _tower(family, config, config, 0))
        text = _text_config(family, config)
        kind = text.get("model_type", family).removesuffix("_text")
        if kind not in TEXT:
            raise UnknownNameError("architecture", kind if family == kind else f"{kind} (of {family})", [*TEXT, *TOWERS])
        full = {**TEXT[kind], **text}
        hidden, vocabulary = _number(full, "hidden_size"), _number(full, "vocab_size")
        layers = _nemotron(full, hidden) if kind == "nemotron_h" else tuple(_layer(kind, full, hidden, at) for at in
                                                                            range(_number(full, "num_hidden_layers")))
        # a composite config says it on the outside too; where both do, the outside is what the class uses for the model's head
        tied = bool(config.get("tie_word_embeddings", full.get("tie_word_embeddings", family in TIED or kind in TIED)))
        vision = config.get("vision_config")
        tower = _tower(family, config, vision, hidden) if isinstance(vision, dict) and family in TOWERS else None
        return Shape(family, hidden, vocabulary, tied, layers, tower, full.get("max_position_embeddings"))


def _text_config(family: str, config: Config) -> Config:
    """Where the decoder's numbers are: nested, or beside the rest (Qwen2-VL as published)."""
    for name in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(name), dict):
            return {"model_type": INNER.get(family, family), **config[name]}
    return {**config, "model_type": INNER.get(family, family)}


def _number(config: Config, name: str) -> int:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 10**7:
        found = "is missing" if value is None else f"is {value!r}, where a positive whole number is expected"
        raise EdgecompError(f"config: {name} {found}")
    return value


def _layer(kind: str, config: Config, hidden: int, at: int) -> Layer:
    """The decoder layer of that number."""
    types = config.get("layer_types")
    if isinstance(types, list) and len(types) <= at:
        raise EdgecompError(f"config: layer_types has {len(types)} entries, num_hidden_layers is {config['num_hidden_layers']}")
    interval = config.get("full_attention_interval", 4) if kind.startswith("qwen3_5") else config.get("sliding_window_pattern")
    other = "linear_attention" if kind.startswith("qwen3_5") else "sliding_attention"
    type_ = types[at] if types else (other if interval and (at + 1) % interval else "full_attention")
    if experts := config.get("num_experts") or config.get("num_local_experts"):
        mlp: Config = {"intermediate": config.get("moe_intermediate_size") or _number(config, "intermediate_size"), "experts": experts,
               "active": _number(config, "num_experts_per_tok"), "shared": config.get("shared_expert_intermediate_size") or 0}
    else:
        mlp = {"intermediate": _number(config, "intermediate_size")}
    if type_ == "linear_attention":
        names = ("linear_num_key_heads", "linear_key_head_dim", "linear_num_value_heads", "linear_value_head_dim")
        key_heads, key_width, value_heads, value_width = (_number(config, name) for name in names)
        keys, values = key_heads * key_width, value_heads * value_width
        # query, key, value; gate; output; two numbers a head
        projections = hidden * (2 * keys + 3 * values + 2 * value_heads)
        return Layer(hidden, recurrence="delta", state=value_heads * key_width * value_width, projections=projections,
                     biases=config.get("linear_conv_kernel_dim", 4) * (2 * keys + values), **mlp)
    heads = _number(config, "num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    full = type_ == "full_attention"
    if kind.startswith("gemma4") and full:
        head_dim = config.get("global_head_dim") or head_dim
        if config.get("attention_k_eq_v"):
            kv_heads = config.get("num_global_key_value_heads") or kv_heads
    window = config.get("sliding_window") if type_ == "sliding_attention" or (kind == "mistral" and not types) else None
    biased = kind.startswith(("qwen2", "gpt_oss")) or config.get("attention_bias")
    return Layer(hidden, heads, kv_heads, head_dim, window, gate=kind.startswith("qwen3_5"),
                 shared_value=bool(kind.startswith("gemma4") and full and config.get("attention_k_eq_v")),
                 biases=(heads + 2 * kv_heads) * head_dim if biased else 0, **mlp)


def _nemotron(config: Config, hidden: int) -> tuple[Layer, ...]:
    """Nemotron-H: each layer is one of Mamba-2 (M), attention (*), an MLP (-) or experts (E)."""
    pattern = config.get("hybrid_override_pattern")
    if not isinstance(pattern, str) or set(pattern) - set("M*-E"):
        raise EdgecompError("config: hybrid_override_pattern is missing, or is not made of M, *, - and E")
    heads, width, groups, state = (_number(config, name) for name in ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size"))
    inner, mixed = heads * width, heads * width + 2 * groups * state
    kinds = {
        "M": Layer(hidden, recurrence="mamba", state=inner * state, projections=hidden * (inner + mixed + heads) + inner * hidden,
                   biases=mixed * 5 + inner),
        "*": Layer(hidden, _number(config, "num_attention_heads"), _number(config, "num_key_value_heads"), _number(config, "head_dim")),
        "-": Layer(hidden, intermediate=_number(config, "intermediate_size"), matrices=2),
        "E": Layer(hidden, intermediate=config.get("moe_intermediate_size", 0), matrices=2, experts=config.get("n_routed_experts", 0),
                   active=config.get("num_experts_per_tok", 0), shared=config.get("moe_shared_expert_intermediate_size", 0)),
    }
    return tuple(kinds[letter] for letter in pattern)


def _tower(family: str, config: Config, vision: Config, hidden: int) -> Tower:
    """The vision tower and projector of a family, from its vision_config; `hidden` is the decoder's width."""
    v = {**TOWERS.get(family, {}), **VISION.get(vision.get("model_type", ""), {}), **vision}
    width = _number(v, "embed_dim" if family == "qwen2_vl" else "hidden_size")
    layers = v.get("depth") or _number(v, "num_hidden_layers")
    heads = v.get("num_heads") or _number(v, "num_attention_heads")
    intermediate = v.get("intermediate_size") or int(width * v.get("mlp_ratio", 4))
    patch = v["patch_size"][0] if isinstance(v["patch_size"], list) else v["patch_size"]
    patch_weights = width * 3 * patch * patch * v.get("temporal_patch_size", 1)
    if family.startswith("qwen"):
        merge = v.get("spatial_merge_size", 2)
        wide = width * merge * merge
        mergers = 1 + len(v.get("deepstack_visual_indexes") or ())
        out = hidden or v.get("out_hidden_size", 0)
        full = len(v["fullatt_block_indexes"]) if v.get("fullatt_block_indexes") else 0
        return Tower(layers, width, heads, intermediate, patch_weights, merge, mergers * wide * (wide + out), matrices=v.get("matrices", 2),
                     window=(v["window_size"] // patch) ** 2 if full else None, full_layers=full,
                     extras=v.get("num_position_embeddings", 0) * width)
    size = v["image_size"][0] if isinstance(v["image_size"], list) else v["image_size"]
    side = size // patch
    if family == "gemma3":
        merge = side // round(config.get("mm_tokens_per_image", 256) ** 0.5)
    elif family in ("internvl", "qianfan_ocr"):
        merge = round(1 / config.get("downsample_ratio", 0.5))
    else:
        merge = config.get("scale_factor", v.get("scale_factor", 1))
    enters = width * (merge * merge if family not in ("gemma3", "llava", "llava_next", "llava_onevision", "paligemma") else 1)
    projector = enters * hidden + (hidden * hidden if family in ("llava", "llava_next", "llava_onevision", "internvl", "qianfan_ocr") else 0)
    if family in ("llava", "llava_next", "llava_onevision"):
        layers += _last(config.get("vision_feature_layer", -1 if family == "llava_onevision" else -2))
    return Tower(layers, width, heads, intermediate, patch_weights, merge, projector, tile=side * side, extras=side * side * width)


def _last(select: object) -> int:
    """How many layers at the tower's end are not run, as a negative number: features are taken from hidden state `select`."""
    return select + 1 if isinstance(select, int) and select < 0 else 0


# What a decoder's class takes where a config says nothing. The keys are the architectures that are known.
LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
TEXT: dict[str, Config] = {
    "llama": LLAMA, "smollm3": {}, "phi3": {"sliding_window": None},
    "mistral": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 8, "vocab_size": 32000, "sliding_window": None},
    "qwen2": {}, "qwen2_vl": {}, "qwen2_5_vl": {}, "qwen3": {"head_dim": 128}, "qwen3_vl": {"head_dim": 128},
    "qwen3_moe": {"head_dim": 128}, "qwen3_vl_moe": {"head_dim": 128},
    "qwen3_5": {"head_dim": 256}, "qwen3_5_moe": {"head_dim": 256},
    "gemma": {"head_dim": 256, "vocab_size": 256000},
    "gemma2": {"head_dim": 256, "vocab_size": 256000, "sliding_window": 4096, "sliding_window_pattern": 2},
    "gemma3": {"head_dim": 256, "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": 4096,
               "sliding_window_pattern": 6},
    "gemma4": {"head_dim": 256, "global_head_dim": 512, "vocab_size": 262144, "sliding_window": 512, "sliding_window_pattern": 6},
    "gemma4_unified": {"head_dim": 256, "global_head_dim": 512, "vocab_size": 262144, "sliding_window": 1024, "sliding_window_pattern": 6},
    "gpt_oss": {"head_dim": 64, "sliding_window": 128, "sliding_window_pattern": 2}, "nemotron_h": {},
}
TIED = {"gemma", "gemma2", "gemma3", "gemma4", "gemma4_unified", "paligemma"}
# composite model: its decoder's architecture, where the config does not say
INNER = {"llava": "llama", "llava_next": "llama", "llava_onevision": "qwen2", "smolvlm": "llama", "idefics3": "llama", "internvl": "qwen2",
         "qianfan_ocr": "qwen3", "paligemma": "gemma", "gemma3": "gemma3", "qwen2_vl": "qwen2_vl", "qwen2_5_vl": "qwen2_5_vl"}
CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14, "image_size": 336}
# composite model: what its tower has where vision_config says nothing
TOWERS: dict[str, Config] = {
    "qwen2_vl": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14, "temporal_patch_size": 2},
    "qwen2_5_vl": {"depth": 32, "num_heads": 16, "patch_size": 14, "temporal_patch_size": 2, "matrices": 3, "window_size": 112,
                   "fullatt_block_indexes": [7, 15, 23, 31]},
    "qwen3_vl": {"patch_size": 16, "temporal_patch_size": 2}, "qwen3_vl_moe": {"patch_size": 16, "temporal_patch_size": 2},
    "qwen3_5": {"patch_size": 16, "temporal_patch_size": 2}, "qwen3_5_moe": {"patch_size": 16, "temporal_patch_size": 2},
    "smolvlm": {"hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16, "patch_size": 32,
                "image_size": 224, "scale_factor": 2},
    "idefics3": {"hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16, "patch_size": 32,
                 "image_size": 224, "scale_factor": 2},
    "internvl": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096, "patch_size": 14,
                 "image_size": 448},
    "qianfan_ocr": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096, "patch_size": 14,
                    "image_size": 448},
    "llava": CLIP, "llava_next": CLIP, "llava_onevision": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26,
                                                            "num_attention_heads": 16, "patch_size": 14, "image_size": 384},
    "gemma3": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14,
               "image_size": 896},
    "paligemma": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14,
                  "image_size": 224},
}
VISION: dict[str, Config] = {
    "siglip_vision_model": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
                            "patch_size": 16},
    "clip_vision_model": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
                          "patch_size": 32},
}
TOWERS_ALONE = {"vit", "clip_vision_model", "siglip_vision_model", "dinov2"}
