"""What one phase of a model asks of a machine: operations by precision, and bytes.

A multiply and an add count as two operations. Only matrix products and recurrences are counted; norms, activations and positions are a
few thousandths of them, and their time is in the constants that are fitted to measurements.
"""
from __future__ import annotations

from dataclasses import dataclass

from edgecomp.predict.model import Layer, Shape
from edgecomp_runtime.errors import InputError, UnknownNameError

TIMED = ("vision", "prefill", "decode")
PHASES = (*TIMED, "selector")  # choosing tokens takes a share of the others' time
STATE_BYTES = 4  # a recurrence keeps its state in fp32 (mamba_ssm_dtype of the published configs)


@dataclass(frozen=True)
class Format:
    """How weights are stored: bits an element with the scales that come with it, for layers and for the head, and what is computed in.

    block: elements that share a scale, where onnxruntime packs them.
    """
    bits: float
    head_bits: float
    compute: str
    block: int = 0

    @property
    def element(self) -> int:
        """Bytes of a number that is no weight of a product: of activations, of keys and values, of a vision tower."""
        return 4 if self.compute == "fp32" else 2

    @property
    def plain(self) -> str:
        """What attention and a vision tower are computed in."""
        return "fp32" if self.compute == "fp32" else "fp16"


# Bits: a group of 128 with a 16-bit scale and a 4-bit zero (AWQ, GPTQ); of 16 with an 8-bit scale (NVFP4); of 32 with a 16-bit scale (MLC's
# q4f16, llama.cpp's Q4_0 and Q8_0); Q4_K_M mixes blocks of 4.5 and 6.5625 bits, 4.85 on Llama-3-8B's published file. Heads stay fp16 where
# the tool leaves them; llama.cpp stores them as Q6_K. llama.cpp multiplies quantised weights in int8.
FORMATS = {
    "fp32": Format(32, 32, "fp32"), "fp16": Format(16, 16, "fp16"), "fp8": Format(8, 16, "fp8"), "int8": Format(8, 16, "fp16"),
    "int4": Format(4.15625, 16, "fp16"), "nvfp4": Format(4.5, 16, "fp4"), "nvfp4a16": Format(4.5, 16, "fp16"),
    "nvfp4-head": Format(4.5, 4.5, "fp4"), "int4-head": Format(4.15625, 4.15625, "fp16"), "q4f16": Format(4.5, 4.5, "fp16"),
    "q4_0": Format(4.5, 6.5625, "int8"), "q4_k_m": Format(4.85, 6.5625, "int8"), "q8_0": Format(8.5, 8.5, "int8"), "mxfp4": Format(4.25, 8.5, "int8"),
    "int8-block32": Format(8.5, 8.5, "fp32", 32), "int4-block32": Format(4.5, 8.5, "fp32", 32),  # edgecomp's own for a CPU, the head in int8
}


@dataclass(frozen=True)
class Work:
    """Of one phase, over the whole batch; decode is one step.

    flops: by precision ('fp16', 'fp4', ...); 'fp16:delta' and 'fp16:mamba' are recurrences, which a prompt's rows go through in chunks, as products
    of matrices (arXiv 2405.21060, 2406.06484). activation_bytes: inputs and outputs of the matrix products. layers: those that run, however narrow.
    """
    flops: dict[str, float]
    weight_bytes: float
    cache_read_bytes: float
    cache_write_bytes: float
    activation_bytes: float
    layers: int

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.cache_read_bytes + self.cache_write_bytes + self.activation_bytes


def work(shape: Shape, phase: str, *, prompt_tokens: int = 0, context: float = 0, visual_tokens: int = 0, keep: int | None = None,
         cut_layer: int = 0, batch: int = 1, weights: str = "fp16", images: int = 1) -> Work:
    """The work of a phase: 'vision', 'prefill', 'decode' (one token a sequence behind `context` rows) or 'selector'.

    prompt_tokens and context count rows as they enter, uncompressed, `visual_tokens` of `images` pictures among them; from decoder layer
    `cut_layer` on only `keep` of these go on. Raises UnknownNameError for a format or phase that is not there, InputError for numbers that
    contradict one another.
    """
    if weights not in FORMATS:
        raise UnknownNameError("weight format", weights, FORMATS)
    keep = visual_tokens if keep is None else keep
    if not 0 <= keep <= visual_tokens:
        raise InputError(f"--keep {keep} exceeds the {visual_tokens} visual tokens" if keep > 0 else f"--keep {keep} is negative")
    gone = visual_tokens - keep
    if phase == "vision":
        return _vision(shape, visual_tokens, images, batch, weights)
    if phase == "selector":  # similarities of all pairs of tokens, the most that a method of edgecomp computes
        return Work({"fp16": 2.0 * batch * visual_tokens * visual_tokens * shape.hidden if gone else 0.0}, 0, 0, 0,
                    2.0 * batch * visual_tokens * shape.hidden if gone else 0.0, 0)
    if phase not in PHASES:
        raise UnknownNameError("phase", phase, PHASES)
    format_ = FORMATS[weights]
    element = format_.element
    flops: dict[str, float] = {}
    weight = read = write = activations = 0.0
    for at, layer in enumerate(shape.layers):
        less = gone if at >= cut_layer else 0
        rows, past = (prompt_tokens - less, 0.0) if phase == "prefill" else (1, max(context - less, 0.0))
        _add(flops, format_.compute, 2.0 * batch * rows * (layer.mixer_weights + layer.mlp_weights(layer.active)))
        weight += (layer.mixer_weights + layer.mlp_weights(_touched(layer, batch * rows))) * format_.bits / 8 + layer.biases * element
        write += batch * (rows * layer.cache_elements * element + layer.state * STATE_BYTES)
        read += batch * (layer.rows(past) * layer.cache_elements * element + layer.state * STATE_BYTES * (phase == "decode"))
        _add(flops, format_.plain, 4.0 * batch * layer.heads * layer.head_dim * _pairs(layer, rows, past))
        if layer.recurrence:  # each row decays the state, adds an outer product and reads it: three multiply-adds an element
            _add(flops, f"fp16:{layer.recurrence}", 6.0 * batch * rows * layer.state)
        wide = layer.intermediate * max(layer.active, 1) + layer.shared
        activations += element * batch * rows * (4 * layer.hidden + 2 * (layer.heads + layer.kv_heads) * layer.head_dim + layer.matrices * wide)
    _add(flops, FORMATS["fp16"].compute if format_.head_bits == 16 else format_.compute, 2.0 * batch * shape.head_weights)  # one row of logits
    weight += shape.head_weights * format_.head_bits / 8
    return Work(flops, weight, read, write, activations, len(shape.layers))


def _add(flops: dict[str, float], precision: str, count: float) -> None:
    if count:
        flops[precision] = flops.get(precision, 0.0) + count


def _pairs(layer: Layer, rows: float, past: float) -> float:
    """Pairs of a new row and a row that it sees, causally and within the window."""
    if rows == 1:
        return layer.rows(past + 1)
    window = layer.window
    if window is None or window >= rows:
        return rows * (rows + 1) / 2
    return window * (window + 1) / 2 + (rows - window) * window


def _touched(layer: Layer, rows: float) -> float:
    """Experts that at least one of the rows asks for, if each asks for any with the same probability."""
    return layer.experts * (1 - (1 - layer.active / layer.experts) ** rows) if layer.experts else 0.0


def _vision(shape: Shape, visual_tokens: int, images: int, batch: int, weights: str) -> Work:
    """The tower over all pictures, in fp16 but where everything is fp32; a picture of several tiles attends within each."""
    tower = shape.tower
    if tower is None or not visual_tokens:
        return Work({}, 0, 0, 0, 0, 0)
    element = FORMATS[weights].element
    rows = batch * tower.rows(visual_tokens)
    seen = tower.rows(visual_tokens) / (tower.tiles(visual_tokens) if tower.tile else images)
    windowed = min(tower.window, seen) if tower.window else seen
    full = tower.full_layers if tower.window else tower.layers
    attention = 4.0 * tower.hidden * rows * (full * seen + (tower.layers - full) * windowed)
    embedded = batch * tower.patches(visual_tokens) * tower.patch_weights
    products = 2.0 * (rows * tower.layers * tower.layer_weights + embedded + batch * visual_tokens * tower.projector)
    activations = float(element) * rows * tower.layers * (8 * tower.hidden + tower.matrices * tower.intermediate)
    return Work({FORMATS[weights].plain: attention + products}, tower.weight_bytes(visual_tokens, element), 0, 0, activations, tower.layers)
