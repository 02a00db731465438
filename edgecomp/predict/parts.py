"""Memory of a model from its config alone, part by part."""
from __future__ import annotations

from edgecomp.predict import resident
from edgecomp.predict.activations import decoder_bytes, tower_bytes
from edgecomp.predict.model import Shape
from edgecomp.predict.request import Request
from edgecomp.predict.work import FORMATS, STATE_BYTES
from edgecomp_runtime.limits import ENGINE_PREFILL_ROWS, PREFILL_ROWS

# edgecomp's own: rows of a prompt that are taken at a time, where they may be; other engines take it whole
AT_ONCE = {"onnxruntime": PREFILL_ROWS, "TensorRT": ENGINE_PREFILL_ROWS, "TensorRT for RTX": ENGINE_PREFILL_ROWS}
TWO_ENGINES = ("TensorRT", "TensorRT for RTX")  # edgecomp builds one for prefill and one for decode, each with its own weights
BOTH_WAYS = ("gemma3", "paligemma")  # whose pictures see themselves both ways, so that edgecomp takes their prompts whole and computes every score
NODES_A_LAYER = 16  # of edgecomp's graphs: 445 for 30 layers of Llama with a head, 1099 for 28 of Qwen2-VL, about as many in a tower


def parts_of(shape: Shape, request: Request, weights: str, engine: str) -> dict[str, float]:
    """Bytes of a model under an engine, what the engine itself takes left out.

    weights: of all experts, with the token embeddings in fp16 or fp32; twice where prefill and decode are engines of their own.
    cache: of the whole window. vision tower: its weights and tables. prefill and vision activations: the widest moment of each, as
    onnxruntime plans it (`edgecomp.predict.planner`).
    """
    format_ = FORMATS[weights]
    layers, head, table = _weights(shape, weights)
    times = 2 if engine in TWO_ENGINES else 1
    shared = shape.tied and format_.head_bits >= 16 and times == 1  # a head in fewer bits, or in an engine, is no table
    parts = {"weights": times * (layers + head) + (0 if shared else table), "cache": _cache(shape, request, weights, engine in AT_ONCE)}
    if shape.tower and request.visual_tokens:
        parts["vision tower"] = shape.tower.weight_bytes(request.visual_tokens, format_.element)
    return parts | _activations(shape, request, engine, format_.element)


def on_a_cpu(shape: Shape, request: Request, weights: str) -> dict[str, float]:
    """Bytes that a process keeps resident which runs a model under onnxruntime on a CPU, as `edgecomp.predict.memory` has it of a bundle.

    Token embeddings stay in their file, of which only the rows that are looked up are read.
    """
    format_ = FORMATS[weights]
    layers, head, _ = _weights(shape, weights)
    tower = shape.tower if request.visual_tokens else None
    nodes = NODES_A_LAYER * (len(shape.layers) + (tower.layers if tower else 0))
    taken = _activations(shape, request, "onnxruntime", format_.element)
    rows = min(_at_once(shape, request, "onnxruntime"), request.context)
    seen = tower.weight_bytes(request.visual_tokens, format_.element) if tower else 0.0
    widened = resident.WIDENED_ACTIVATIONS if weights == "fp16" else 1
    return {"runtime": resident.BASE_BYTES + resident.NODE_BYTES * nodes, "weights": _resident(layers + head + seen, shape, weights),
            "cache": _cache(shape, request, weights, False),
            "buffers": format_.element * (shape.hidden * (rows + 2 * request.visual_tokens) + shape.vocabulary),
            "prefill activations": resident.prefill_block(taken["prefill activations"] * widened),
            **({"vision activations": resident.vision_block(taken["vision activations"] * widened)} if tower else {})}


def _resident(stored: float, shape: Shape, weights: str) -> float:
    """Bytes of weights that were loaded: halves are widened, and where matrices are small a share of that is left behind; blocks are packed."""
    if block := FORMATS[weights].block:
        matrices = shape.head_weights + sum(layer.mixer_weights + layer.mlp_weights(layer.experts) for layer in shape.layers)
        scale = 2 * (resident.WIDENED * (1 + resident.WIDENED_LEFT) - 1)  # what a half takes more
        return stored + matrices / block * (scale + resident.PACKED_BLOCK_BYTES)
    if weights != "fp16":
        return stored
    largest = resident.WIDENED * 2 * max(layer.hidden * layer.intermediate for layer in shape.layers)
    return resident.WIDENED * stored * (1 + resident.WIDENED_LEFT * (largest < resident.HEAP_BELOW))


def _weights(shape: Shape, weights: str) -> tuple[float, float, float]:
    """Bytes of the layers, of the head, and of the token embeddings."""
    format_ = FORMATS[weights]
    layers = sum((layer.mixer_weights + layer.mlp_weights(layer.experts)) * format_.bits / 8 + (layer.biases + 2 * layer.hidden) * format_.element
                 for layer in shape.layers)
    rest = (shape.hidden + shape.extras) * format_.element
    return layers + rest, shape.head_weights * format_.head_bits / 8, shape.head_weights * max(format_.head_bits, 16) / 8


def _cache(shape: Shape, request: Request, weights: str, whole: bool) -> float:
    """Of the window; `whole`: layers that look back on few rows hold all, as edgecomp's do. Rows that nothing was written to are not resident."""
    element = FORMATS[weights].element
    left = [request.rows(at, request.context) for at in range(len(shape.layers))]
    return request.batch * sum((rows if whole else layer.rows(rows)) * layer.cache_elements * element + layer.state * STATE_BYTES
                               for layer, rows in zip(shape.layers, left, strict=True))


def _activations(shape: Shape, request: Request, engine: str, element: int) -> dict[str, float]:
    rows = _at_once(shape, request, engine)
    found = {"prefill activations": decoder_bytes(shape, request.batch * rows, element, scores=_both_ways(shape, request) and engine in AT_ONCE)}
    if shape.tower and request.visual_tokens:
        found["vision activations"] = tower_bytes(shape.tower, request.batch * request.visual_tokens, shape.hidden, element)
    return found


def _at_once(shape: Shape, request: Request, engine: str) -> int:
    """Rows of a prompt that enter the decoder at a time; engines are built for their most, whatever a prompt has."""
    most = request.rows(0, request.context if engine in TWO_ENGINES else request.prompt_tokens)
    whole = engine not in AT_ONCE or _both_ways(shape, request) or bool(request.dropped and request.cut_layer)
    return most if whole else min(most, AT_ONCE[engine])


def _both_ways(shape: Shape, request: Request) -> bool:
    return shape.family in BOTH_WAYS and request.visual_tokens > 0
