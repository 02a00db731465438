"""Checkpoint in, neutral bundle out: vision and decoder graphs, weights once, tokenizer, and the manifest about them."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from edgecomp import __version__
from edgecomp.ir.graphs import WeightFile, describe, save
from edgecomp.ir.rewrite import DOMAIN, marks, nodes
from edgecomp.writer import writing
from edgecomp_export import checkpoint
from edgecomp_export.families.base import Family, Geometry
from edgecomp_export.headers import weight_sizes
from edgecomp_export.nodes import ATTENTION, NewRows, decoding, mark_layers
from edgecomp_export.trace import trace
from edgecomp_export.weights import Weights
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import SCHEMA, DecoderInfo, ImageInfo, Manifest, PlanInfo, SourceInfo, TableInfo, VisionInfo

WEIGHTS = "graphs/weights.bin"
WORKING_GIB = 0.8  # measured: torch, transformers and the graph; on top of that come copies of the weight that is being written


def export(model: str, out: Path, *, precision: str = "fp32", context: int | None = None,
           image_size: tuple[int, int] | None = None, tiles: int | None = None, max_images: int | None = None,
           say: Callable[[str], None] = lambda line: None) -> Path:
    """Exports a Hugging Face checkpoint to a neutral bundle with the one plan 'full'.

    Weights are read tensor by tensor from the checkpoint's mapped files: one copy of them is written, none is held. Those that GPTQ or AWQ
    quantized stay the whole numbers that they are.

    Args:
        model: a local folder or a hub name.
        out: the bundle's folder; written beside and renamed, so that a failure leaves nothing.
        precision: 'fp32' or 'fp16', of weights and arithmetic.
        context: the window in rows; by default 2048 or what the pictures need, within what the model was trained for.
        image_size, tiles, max_images: see `Geometry`.
        say: is told what is being done.

    Raises:
        CheckpointError, UnknownNameError, EdgecompError: see `checkpoint.find`, `family_of`, `Prequantized`, `trace`.
    """
    folder = checkpoint.find(model)
    family = checkpoint.family_at(folder, Geometry(image_size, tiles, max_images))
    stored = checkpoint.prequantized(folder)
    image, decoder = family.image_info(), family.decoder_info(context)
    vision = family.vision_info(decoder)
    tokenizer = family.prepare_tokenizer(checkpoint.load_tokenizer(folder))
    say(cost(folder, precision, image, vision, decoder))
    loaded = checkpoint.load(folder, stored=stored)
    quantized, bits = stored.named(loaded) if stored else {}, dict[str, int]()
    weights = Weights(loaded, precision)
    loaded.set_attn_implementation(ATTENTION)
    with writing(out) as (partial, finish):
        (partial / "graphs").mkdir()
        file = WeightFile(partial / WEIGHTS)
        graphs = {}
        for name, tracer in (("vision", trace_vision), ("decoder", trace_decoder)):
            say(f"tracing the {name} graph")
            traced = tracer(family, loaded)
            say(f"writing the {name} graph and its weights")
            if stored:
                bits |= stored.move(traced, quantized, file)
            file.move_weights(traced, weights.array)
            graphs[f"graphs/{name}.onnx"] = describe(traced)
            save(traced, partial / f"graphs/{name}.onnx")
        embeddings = weights.array(parameter_name(loaded, loaded.get_input_embeddings().weight))
        assert embeddings is not None
        table = file.add("embeddings", embeddings)
        file.close()
        text = checkpoint.text_info(folder, tokenizer, family, copy_text(folder, tokenizer, family, partial))
        full = PlanInfo((), "keep", vision.tokens, tuple(tile.tokens for tile in vision.tiles), (decoder.context,) * decoder.layers,
                        {"neutral": {"vision": "graphs/vision.onnx", "prefill": "graphs/decoder.onnx", "decode": "graphs/decoder.onnx"}})
        source = SourceInfo(model, family.config.model_type, checkpoint.fingerprint(folder), image_size, tiles)
        finish(Manifest(SCHEMA, f"edgecomp {__version__}", source, precision, image, vision, text,
                        TableInfo(WEIGHTS, table.offset or 0, (embeddings.shape[0], embeddings.shape[1]), embeddings.dtype.name,
                                  family.embedding_scale(loaded)),
                        decoder, "full", {"full": full}, graphs, {}, quantized=stored.info(bits) if stored else None))
    return out


def cost(folder: Path, precision: str, image: ImageInfo, vision: VisionInfo, decoder: DecoderInfo) -> str:
    """What a picture, the disk and the memory will be asked for, in words, before anything is loaded."""
    size = 4 if precision == "fp32" else 2
    stored, written, largest = weight_sizes(folder, size)
    rows = 2 * decoder.layers * decoder.key_value_heads * decoder.head_dim * size
    tiles = f"{image.count} tiles of " if image.count > 1 else ""
    high, wide = image.size
    return (f"a picture: {tiles}{high}x{wide} pixels, {vision.tokens} visual tokens of the window's {decoder.context} rows, "
            f"{vision.tokens * rows / 2**20:.1f} MiB of KV cache ({vision.max_images} pictures a prompt at most)\n"
            f"weights: {written / 2**30:.2f} GiB in {precision}, as much disk; the checkpoint's {stored / 2**30:.2f} GiB are mapped, and "
            f"about {WORKING_GIB + 3 * largest / 2**30:.1f} GiB of memory are needed beside them")


def trace_vision(family: Family, model: Any) -> ir.Model:
    """pixels [images, 3, H, W] or [images, tiles, 3, H, W] -> visual_tokens [images, N, D] and deepstack features of that shape."""
    image = family.image_info()
    pixels = torch.zeros(2, *([] if image.count == 1 else [image.count]), 3, *image.size, dtype=model.dtype)
    outputs = ["visual_tokens", *(f"deepstack.{layer}" for layer in range(family.deepstack))]
    traced = trace(family.vision(model), (pixels,), (["pixels"], outputs), ({0: "images"},), parameter_names(model))
    layers = {node.attributes["layer"].as_int() for node in nodes(traced, "Attention", DOMAIN)}
    if not marks(traced, "visual_tokens") or not layers or layers != set(marks(traced, "hidden")):
        raise EdgecompError(f"{type(family).__name__}.vision gives a graph with marks on {len(marks(traced, 'visual_tokens'))} results and "
                            f"{len(marks(traced, 'hidden'))} layers, and attention in {len(layers)}: mark the visual tokens and every layer, "
                            "and number every layer's attention")
    return traced


class Decoder(torch.nn.Module):
    """The decoder on embeddings, its past given and its new rows handed out: one graph for prefill, chunks and decode."""

    def __init__(self, family: Family, model: Any):
        super().__init__()
        self.model, self._family = model, family
        self._parts = family.language(model)

    def forward(self, embeddings: torch.Tensor, positions: torch.Tensor, length: torch.Tensor, logit_rows: torch.Tensor,
                past: list[torch.Tensor], extras: Sequence[torch.Tensor] = ()) -> tuple[torch.Tensor, ...]:
        """`extras` are the segments, where the family has them, and the deepstack features."""
        language, head = self._parts
        segments = extras[:len(extras) - self._family.deepstack]
        with decoding(NewRows(past, length, segments, self._family.segments_bounded)) as cache:
            hidden = self._family.decode(language, embeddings, positions, cache, extras[len(segments):])
        return head(torch.index_select(hidden, 1, logit_rows)), *cache.new


def trace_decoder(family: Family, model: Any) -> ir.Model:
    """embeddings [batch, rows, D], positions, length [1], logit_rows, past, segments and deepstack where the family has them ->
    logits [batch, logit_rows, V], new keys and values."""
    info, dtype = family.decoder_info(None), model.dtype
    mark_layers(family.language(model)[0].layers)  # type: ignore[arg-type]
    batch, rows, capacity = 2, 3, 5
    embeddings, positions = torch.zeros(batch, rows, info.hidden, dtype=dtype), torch.arange(rows).expand(batch, rows)
    extras = {"segments": torch.zeros(batch, rows, dtype=torch.int64)} if info.bidirectional else {}
    extras |= {f"deepstack.{layer}": torch.zeros_like(embeddings) for layer in range(family.deepstack)}
    past = [torch.zeros(batch, info.key_value_heads, capacity, info.head_dim, dtype=dtype) for _ in range(2 * info.layers)]
    kinds = [f"{kind}.{layer}" for layer in range(info.layers) for kind in ("key", "value")]
    names = (["embeddings", "positions", "length", "logit_rows", *(f"cache_{k}" for k in kinds), *extras], ["logits", *(f"new_{k}" for k in kinds)])
    every_row, axes = {0: "batch", 1: "rows"}, info.position_axes
    inputs: tuple[Any, ...] = (embeddings, positions if axes == 1 else positions.expand(axes, batch, rows), torch.tensor([2]),
                               torch.tensor([0, 2]), past)
    dynamic: tuple[Any, ...] = (every_row, every_row if axes == 1 else {1: "batch", 2: "rows"}, {}, {0: "logit_rows"},
                                [{0: "batch", 2: "capacity"}] * len(past))
    if extras:  # torch loses the dimensions' names over an empty list
        inputs, dynamic = (*inputs, list(extras.values())), (*dynamic, [every_row] * len(extras))
    return trace(Decoder(family, model), inputs, names, dynamic, parameter_names(model))


def parameter_names(model: torch.nn.Module) -> dict[str, str]:
    """Names below our wrappers' `model` attribute -> Hugging Face names."""
    return {f"model.{name}": name for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}


def parameter_name(model: torch.nn.Module, wanted: torch.nn.Parameter) -> str:
    """A parameter's Hugging Face name."""
    return next(name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is wanted)


def copy_text(folder: Path, tokenizer: Any, family: Family, partial: Path) -> dict[str, str]:
    """Puts the tokenizer, as transformers completed it at loading, and the chat template into the bundle. Returns where."""
    (partial / "text").mkdir()
    tokenizer.backend_tokenizer.save(str(partial / "text/tokenizer.json"))
    names = {"tokenizer": "text/tokenizer.json"}
    if template := checkpoint.chat_template(folder) or family.template():
        (partial / "text/chat_template.jinja").write_text(template, encoding="utf-8")
        names["chat_template"] = "text/chat_template.jinja"
    return names
