"""Checkpoint in, neutral bundle out: vision and decoder graphs, weights once, tokenizer, and the manifest about them."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from edgecomp import __version__
from edgecomp.ir.graphs import WeightFile, describe, save
from edgecomp.writer import writing
from edgecomp_export import checkpoint
from edgecomp_export.families import family_of
from edgecomp_export.families.base import Family
from edgecomp_export.nodes import ATTENTION, NewRows, decoding, mark_layers
from edgecomp_export.trace import trace
from edgecomp_runtime.manifest import SCHEMA, Manifest, PlanInfo, SourceInfo, TableInfo

WEIGHTS = "graphs/weights.bin"


def export(model: str, out: Path, *, precision: str = "fp32", context: int | None = None, say: Callable[[str], None] = lambda line: None) -> Path:
    """Exports a Hugging Face checkpoint to a neutral bundle with the one plan 'full'.

    Args:
        model: a local folder or a hub name.
        out: the bundle's folder; written beside and renamed, so that a failure leaves nothing.
        precision: 'fp32' or 'fp16', of weights and arithmetic.
        context: the window in rows; by default 2048 or what the model was trained for.
        say: is told what is being done.

    Raises:
        CheckpointError, UnknownNameError, EdgecompError: see `checkpoint.find`, `family_of`, `trace`.
    """
    folder = checkpoint.find(model)
    family_type = family_of(str(checkpoint.read_json(folder, "config.json").get("model_type")))
    settings = checkpoint.processor_settings(folder)
    tokenizer = checkpoint.load_tokenizer(folder)
    say(f"loading {folder.name} in {precision}")
    loaded = checkpoint.load(folder, precision)
    loaded.set_attn_implementation(ATTENTION)
    family = family_type(loaded, settings)
    image, vision, decoder = family.image_info(), family.vision_info(), family.decoder_info(context)
    with writing(out) as (partial, finish):
        (partial / "graphs").mkdir()
        weights = WeightFile(partial / WEIGHTS)
        graphs = {}
        for name, tracer in (("vision", trace_vision), ("decoder", trace_decoder)):
            say(f"tracing the {name} graph")
            traced = tracer(family)
            say(f"writing the {name} graph and its weights")
            weights.move_weights(traced)
            graphs[f"graphs/{name}.onnx"] = describe(traced)
            save(traced, partial / f"graphs/{name}.onnx")
        embeddings = embedding_table(loaded)
        table = weights.add("embeddings", embeddings)
        weights.close()
        names = copy_text(folder, tokenizer, partial)
        full = PlanInfo((), "keep", vision.tokens, (decoder.context,) * decoder.layers,
                        {"neutral": {"vision": "graphs/vision.onnx", "prefill": "graphs/decoder.onnx", "decode": "graphs/decoder.onnx"}})
        finish(Manifest(SCHEMA, f"edgecomp {__version__}", SourceInfo(model, loaded.config.model_type, checkpoint.fingerprint(folder)), precision,
                        image, vision, checkpoint.text_info(folder, tokenizer, loaded.config, names),
                        TableInfo(WEIGHTS, table.offset or 0, (embeddings.shape[0], embeddings.shape[1]), embeddings.dtype.name),
                        decoder, "full", {"full": full}, graphs, {}))
    return out


def trace_vision(family: Family) -> ir.Model:
    """pixels [images, 3, H, W] -> visual_tokens [images, N, D]."""
    height, width = family.image_info().size
    pixels = torch.zeros(2, 3, height, width, dtype=family.model.dtype)
    return trace(family.vision(), (pixels,), (["pixels"], ["visual_tokens"]), ({0: "images"},), parameter_names(family.model))


class Decoder(torch.nn.Module):
    """The decoder on embeddings, its past given and its new rows handed out: one graph for prefill, chunks and decode."""

    def __init__(self, family: Family):
        super().__init__()
        self.model = family.model
        self._parts = family.language()

    def forward(self, embeddings: torch.Tensor, positions: torch.Tensor, length: torch.Tensor, logit_rows: torch.Tensor,
                past: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        language, head = self._parts
        with decoding(NewRows(past, length)) as cache:
            hidden = language(inputs_embeds=embeddings, position_ids=positions, past_key_values=cache, use_cache=True).last_hidden_state
        return head(torch.index_select(hidden, 1, logit_rows)), *cache.new


def trace_decoder(family: Family) -> ir.Model:
    """embeddings [batch, rows, D], positions, length [1], logit_rows, past -> logits [batch, logit_rows, V], new keys and values."""
    info, dtype = family.decoder_info(None), family.model.dtype
    mark_layers(family.language()[0].layers)  # type: ignore[arg-type]
    batch, rows, capacity = 2, 3, 5
    past = [torch.zeros(batch, info.key_value_heads, capacity, info.head_dim, dtype=dtype) for _ in range(2 * info.layers)]
    inputs: tuple[Any, ...] = (torch.zeros(batch, rows, info.hidden, dtype=dtype), torch.arange(rows).expand(batch, rows),
                               torch.tensor([2]), torch.tensor([0, 2]), past)
    kinds = [f"{kind}.{layer}" for layer in range(info.layers) for kind in ("key", "value")]
    names = (["embeddings", "positions", "length", "logit_rows", *(f"cache_{k}" for k in kinds)], ["logits", *(f"new_{k}" for k in kinds)])
    every_row = {0: "batch", 1: "rows"}
    dynamic: Any = (every_row, every_row, {}, {0: "logit_rows"}, [{0: "batch", 2: "capacity"}] * len(past))
    return trace(Decoder(family), inputs, names, dynamic, parameter_names(family.model))


def parameter_names(model: torch.nn.Module) -> dict[str, str]:
    """Names below our wrappers' `model` attribute -> Hugging Face names."""
    return {f"model.{name}": name for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}


def embedding_table(model: Any) -> np.ndarray[Any, Any]:
    """The token embeddings [V, D] as the model's own module gives them: some families scale them there."""
    module = model.get_input_embeddings()
    with torch.no_grad():
        table: np.ndarray[Any, Any] = module(torch.arange(module.weight.shape[0])).numpy()
    return table


def copy_text(folder: Path, tokenizer: Any, partial: Path) -> dict[str, str]:
    """Puts the tokenizer, as transformers completed it at loading, and the chat template into the bundle. Returns where."""
    (partial / "text").mkdir()
    tokenizer.backend_tokenizer.save(str(partial / "text/tokenizer.json"))
    names = {"tokenizer": "text/tokenizer.json"}
    if template := checkpoint.chat_template(folder):
        (partial / "text/chat_template.jinja").write_text(template, encoding="utf-8")
        names["chat_template"] = "text/chat_template.jinja"
    return names
