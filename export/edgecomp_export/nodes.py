"""The nodes of our own ONNX domain `edgecomp`, as torch sees them while a model is traced.

Operators that backends disagree on are one node with its meaning in its attributes, which a dialect lowers later:
`Attention` (post-RoPE query, new keys and values, and in a decoder the past, its length, and segments) and `Mark` (an identity
that names a place or a signal, so that passes find it by looking).
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface

from edgecomp_runtime.errors import EdgecompError

ATTENTION = "edgecomp"


def mark(x: torch.Tensor, signal: str, layer: int = -1) -> torch.Tensor:
    """Names a value of the graph: `signal` ('hidden' at the start of a layer, 'visual_tokens' after the projector)."""
    return torch.onnx.ops.symbolic("edgecomp::Mark", (x,), attrs={"signal": signal, "layer": layer}, dtype=x.dtype, shape=x.shape, version=1)


def mark_layers(layers: torch.nn.ModuleList) -> None:
    """Puts a 'hidden' mark before every layer of a stack."""
    for index, layer in enumerate(layers):
        def hook(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index) -> tuple[Any, Any]:
            if args:
                return (mark(args[0], "hidden", index), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": mark(kwargs["hidden_states"], "hidden", index)}
        layer.register_forward_pre_hook(hook, with_kwargs=True)


class NewRows:
    """Stands in for HF's cache while tracing: hands the new keys and values through and remembers them.

    The past reaches the Attention node directly, so that no concatenation is baked into the graph.
    `bounded`: a layer's window bounds segments, too.
    """

    def __init__(self, past: list[torch.Tensor], length: torch.Tensor, segments: Sequence[torch.Tensor], bounded: bool = True):
        self.past, self.length, self.segments, self.bounded, self.new = past, length, segments, bounded, [torch.empty(0)] * len(past)

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.new[2 * layer: 2 * layer + 2] = [key, value]
        return key, value

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return 0


_cache: NewRows | None = None


@contextmanager
def decoding(cache: NewRows) -> Iterator[NewRows]:
    """While inside, causal Attention nodes read the past of this cache: HF hands attention functions no cache."""
    global _cache
    _cache = cache
    try:
        yield cache
    finally:
        _cache = None


def _attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any,
               scaling: float, sliding_window: int | None = None, softcap: float | None = None, s_aux: torch.Tensor | None = None,
               **_: Any) -> tuple[torch.Tensor, None]:
    """HF's attention interface: query [B, H, S, D], key and value [B, Hkv, S, D] -> [B, S, H, D].

    The window counts cache rows, as HF's masks do: a row sees itself and the `sliding_window - 1` rows before it.
    """
    if s_aux is not None:
        raise EdgecompError("this model's attention has learned sinks, which edgecomp does not export yet")
    inputs: tuple[torch.Tensor, ...] = (query, key, value)
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # vision towers get theirs in `number_attention`
    if _cache is not None:
        inputs += (*_cache.past[2 * layer: 2 * layer + 2], _cache.length, *_cache.segments)
    attributes: dict[str, Any] = {"causal": int(_cache is not None), "layer": layer, "scale": float(scaling),
                                  "window": sliding_window or 0, "softcap": float(softcap or 0)}
    if _cache is not None and _cache.segments:
        attributes["bounded"] = int(_cache.bounded)
    out = torch.onnx.ops.symbolic("edgecomp::Attention", inputs, attrs=attributes, dtype=query.dtype, shape=query.shape, version=1)
    return out.transpose(1, 2).contiguous(), None


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, layer: int) -> torch.Tensor:
    """An encoder's Attention node, for families whose attention does not go through HF's interface: all [B, H, S, D]."""
    attributes: dict[str, Any] = {"causal": 0, "layer": layer, "scale": float(scale), "window": 0, "softcap": 0.0}
    return torch.onnx.ops.symbolic("edgecomp::Attention", (query, key, value), attrs=attributes, dtype=query.dtype, shape=query.shape, version=1)


# No mask function is registered beside it, so HF builds no mask: causality is the node's attribute.
AttentionInterface.register(ATTENTION, _attention)


def number_attention(layers: torch.nn.ModuleList, name: str = "self_attn") -> None:
    """Gives each layer's attention module (its attribute `name`) its index, as decoders have it from HF and encoders do not."""
    for index, layer in enumerate(layers):
        getattr(layer, name).layer_idx = index
