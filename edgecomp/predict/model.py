"""What a decoder costs follows from a few numbers of its config.json: widths, heads, layers, experts.

Names of fields and defaults are those of Hugging Face's config classes (transformers 5.23); a published config leaves out what is a
default of its class, so the few that matter are repeated in DEFAULTS.
"""
from __future__ import annotations

from dataclasses import dataclass

from edgecomp.predict.config import LAYERS, Config, listed, number, optional
from edgecomp.predict.config import text as name_of
from edgecomp.predict.tower import TOWERS, TOWERS_ALONE, Tower, tower_of
from edgecomp_runtime.errors import EdgecompError, UnknownNameError


@dataclass(frozen=True)
class Layer:
    """One decoder layer: a mixer of rows (attention or a recurrence, or neither), then an MLP (or none).

    window: rows that attention looks back on. gate: the query projection has a second half that gates the output (Qwen3.5).
    shared_value: keys serve as values, so that one projection is saved (Gemma 4). normed: queries and keys are, head by head.
    biases: elements beside the matrices. state: elements that a recurrence carries from row to row, recurrence: its kind, 'delta' or 'mamba',
    projections: its matrices' elements. intermediate: of the dense MLP or of one expert; matrices: 3 with a gate, 2 without. experts are stored,
    `active` of them run. shared: the width of the expert that always runs.
    """
    hidden: int
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    window: int | None = None
    gate: bool = False
    shared_value: bool = False
    normed: bool = False
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
            return Shape(family, 0, 0, True, (), tower_of(family, config, config, 0))
        text = _text_config(family, config)
        kind = (name_of(text, "model_type") or family).removesuffix("_text")
        if kind not in TEXT:
            raise UnknownNameError("architecture", kind if family == kind else f"{kind} (of {family})", [*TEXT, *TOWERS])
        full = {**TEXT[kind], **text}
        hidden, vocabulary = number(full, "hidden_size"), number(full, "vocab_size")
        layers = _nemotron(full, hidden) if kind == "nemotron_h" else tuple(_layer(kind, full, hidden, at) for at in
                                                                            range(number(full, "num_hidden_layers", LAYERS)))
        # a composite config says it on the outside too; where both do, the outside is what the class uses for the model's head
        tied = bool(config.get("tie_word_embeddings", full.get("tie_word_embeddings", family in TIED or kind in TIED)))
        vision = config.get("vision_config")
        tower = tower_of(family, config, vision, hidden) if isinstance(vision, dict) and family in TOWERS else None
        return Shape(family, hidden, vocabulary, tied, layers, tower, optional(full, "max_position_embeddings", 0) or None)


def _text_config(family: str, config: Config) -> Config:
    """Where the decoder's numbers are: nested, or beside the rest (Qwen2-VL as published)."""
    for name in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(name), dict):
            return {"model_type": INNER.get(family, family), **config[name]}
    return {**config, "model_type": INNER.get(family, family)}


def _layer(kind: str, config: Config, hidden: int, at: int) -> Layer:
    """The decoder layer of that number."""
    type_ = _type(kind, config, at)
    if experts := optional(config, "num_experts", optional(config, "num_local_experts", 0)):
        mlp: Config = {"intermediate": optional(config, "moe_intermediate_size", 0) or number(config, "intermediate_size"), "experts": experts,
                       "active": number(config, "num_experts_per_tok", experts), "shared": optional(config, "shared_expert_intermediate_size", 0)}
    else:
        mlp = {"intermediate": number(config, "intermediate_size")}
    if type_ == "linear_attention":
        names = ("linear_num_key_heads", "linear_key_head_dim", "linear_num_value_heads", "linear_value_head_dim")
        key_heads, key_width, value_heads, value_width = (number(config, name) for name in names)
        keys, values = key_heads * key_width, value_heads * value_width
        # query, key, value; gate; output; two numbers a head
        projections = hidden * (2 * keys + 3 * values + 2 * value_heads)
        return Layer(hidden, recurrence="delta", state=value_heads * key_width * value_width, projections=projections,
                     biases=optional(config, "linear_conv_kernel_dim", 4) * (2 * keys + values), **mlp)
    heads = number(config, "num_attention_heads")
    kv_heads = optional(config, "num_key_value_heads", heads)
    head_dim = optional(config, "head_dim", hidden // heads)
    full = type_ == "full_attention"
    if kind.startswith("gemma4") and full:
        head_dim = optional(config, "global_head_dim", head_dim)
        if config.get("attention_k_eq_v"):
            kv_heads = optional(config, "num_global_key_value_heads", kv_heads)
    if heads % kv_heads or not head_dim:
        raise EdgecompError(f"config: {heads} attention heads cannot share {kv_heads} of keys and values, each {head_dim} wide")
    windowed = type_ == "sliding_attention" or (kind == "mistral" and not config.get("layer_types"))
    biased = kind.startswith(("qwen2", "gpt_oss")) or config.get("attention_bias")
    normed = kind.startswith(("qwen3", "gemma3", "gemma4"))
    return Layer(hidden, heads, kv_heads, head_dim, optional(config, "sliding_window", 0) or None if windowed else None, normed=normed,
                 gate=kind.startswith("qwen3_5"), shared_value=bool(kind.startswith("gemma4") and full and config.get("attention_k_eq_v")),
                 biases=((heads + 2 * kv_heads) * head_dim if biased else 0) + (2 * head_dim if normed else 0), **mlp)


def _type(kind: str, config: Config, at: int) -> str:
    """What mixes the rows of a layer: one of LAYER_TYPES."""
    if types := listed(config, "layer_types"):
        if len(types) <= at:
            raise EdgecompError(f"config: layer_types has {len(types)} entries, num_hidden_layers is {config['num_hidden_layers']}")
        if types[at] not in LAYER_TYPES:
            raise UnknownNameError("entry of layer_types", str(types[at]), LAYER_TYPES)
        return str(types[at])
    hybrid = kind.startswith("qwen3_5")
    interval = optional(config, "full_attention_interval", 4) if hybrid else optional(config, "sliding_window_pattern", 0)
    return "full_attention" if not interval or (at + 1) % interval == 0 else "linear_attention" if hybrid else "sliding_attention"


def _nemotron(config: Config, hidden: int) -> tuple[Layer, ...]:
    """Nemotron-H: each layer is one of Mamba-2 (M), attention (*), an MLP (-) or experts (E)."""
    pattern = config.get("hybrid_override_pattern")
    if not isinstance(pattern, str) or not pattern or set(pattern) - set("M*-E") or len(pattern) > LAYERS:
        raise EdgecompError("config: hybrid_override_pattern is missing, or is not made of M, *, - and E")
    heads, width, groups, state = (number(config, name) for name in ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size"))
    inner, mixed = heads * width, heads * width + 2 * groups * state
    kinds = {
        "M": Layer(hidden, recurrence="mamba", state=inner * state, projections=hidden * (inner + mixed + heads) + inner * hidden,
                   biases=mixed * 5 + inner),
        "*": Layer(hidden, number(config, "num_attention_heads"), number(config, "num_key_value_heads"), number(config, "head_dim")),
        "-": Layer(hidden, intermediate=number(config, "intermediate_size"), matrices=2),
    }
    if "E" in pattern:
        kinds["E"] = Layer(hidden, intermediate=number(config, "moe_intermediate_size"), matrices=2, experts=number(config, "n_routed_experts"),
                           active=number(config, "num_experts_per_tok"), shared=optional(config, "moe_shared_expert_intermediate_size", 0))
    return tuple(kinds[letter] for letter in pattern)


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
LAYER_TYPES = ("full_attention", "sliding_attention", "linear_attention")
TIED = {"gemma", "gemma2", "gemma3", "gemma4", "gemma4_unified", "paligemma"}
# composite model: its decoder's architecture, where the config does not say
INNER = {"llava": "llama", "llava_next": "llama", "llava_onevision": "qwen2", "smolvlm": "llama", "idefics3": "llama", "internvl": "qwen2",
         "qianfan_ocr": "qwen3", "paligemma": "gemma", "gemma3": "gemma3", "qwen2_vl": "qwen2_vl", "qwen2_5_vl": "qwen2_5_vl"}
