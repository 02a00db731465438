"""What the exporter asks of a family: the facts that the runtime needs, modules to trace, and how Hugging Face is fed."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import DecoderInfo, ImageInfo, TileInfo, VisionInfo

DEFAULT_CONTEXT = 2048  # rows; enough for a few pictures and a conversation, and 1 GiB of fp16 cache for a 7B model
TEXT_ROWS = 1024  # what a window has beside its pictures at least, unless it was chosen


@dataclass(frozen=True)
class Geometry:
    """What a user chooses of pictures; None leaves it to the family.

    image_size: (height, width) in pixels of the pictures expected. tiles: how many detail tiles, 0 for none. max_images: of a prompt.
    """
    image_size: tuple[int, int] | None = None
    tiles: int | None = None
    max_images: int | None = None


DEFAULTS = Geometry()


class Family(ABC):
    """One Hugging Face `model_type`. The facts need its config and processor settings alone, so that they are known before any
    weight is read; the modules need the loaded model.

    Args:
        config: the model's config.
        processor: the image processor's settings.
        geometry: the user's choices of pictures.
    """

    position_axes = 1  # 3 for M-RoPE
    first_position = 0
    bidirectional = ""  # or 'images', 'prompt': see DecoderInfo
    segments_bounded = True  # a layer's window hides far rows of a segment, too
    deepstack = 0  # decoder layers, from the first, behind which visual features are added

    def __init__(self, config: Any, processor: dict[str, Any], geometry: Geometry = DEFAULTS):
        self.config, self.processor, self.geometry = config, processor, geometry

    # facts

    @abstractmethod
    def image_info(self) -> ImageInfo:
        """How a picture becomes pixels. Raises EdgecompError for choices that this family cannot meet."""

    @abstractmethod
    def tiles(self) -> tuple[TileInfo, ...]:
        """Each tile's grid among a picture's visual tokens, in the order of its pixels."""

    @abstractmethod
    def tower(self) -> tuple[int, int, bool]:
        """The vision tower's layers, the layer whose output is taken, and whether that has a CLS row beside exactly N others."""

    def tokens(self) -> int:
        """Visual tokens of a picture, separators among them."""
        return sum(tile.tokens for tile in self.tiles())

    def texts(self) -> tuple[str, ...]:
        """What the processor puts around a picture's visual tokens: before and after, or around each tile's."""
        return "", ""

    def placeholder(self, image_token: str) -> str:
        """What stands for a picture in the chat template's output."""
        return image_token

    def template(self) -> str | None:
        """A chat template for checkpoints that have none, where the processor makes prompts in code."""
        return None

    def prepare_tokenizer(self, tokenizer: Any) -> Any:
        """The loaded tokenizer, set as HF's processor class sets it. Raises EdgecompError where it does not fit the facts above."""
        return tokenizer

    def embedding_scale(self, model: Any) -> float:
        """What token embeddings are multiplied by: some text models (Gemma's) do so in their embedding module."""
        return float(getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0))

    def vision_info(self, decoder: DecoderInfo) -> VisionInfo:
        """The facts above for the manifest. Raises EdgecompError where the window does not hold the pictures."""
        tokens = self.tokens()
        most = self.geometry.max_images or max(1, (decoder.context - 1) // tokens)
        if most * tokens >= decoder.context:
            raise EdgecompError(f"a window of {decoder.context} rows does not hold {most} x {tokens} visual tokens: "
                                "choose a larger --context, smaller pictures or fewer --max-images")
        return VisionInfo(tokens, self.tiles(), self.texts(), most, *self.tower())

    def decoder_info(self, context: int | None) -> DecoderInfo:
        """The decoder's shape; `context` rows of window, or a default within what the model was trained for."""
        text = self.config.get_text_config()
        trained = text.max_position_embeddings
        if context is not None and context > trained:
            raise EdgecompError(f"--context {context} exceeds the {trained} positions that this model was trained for")
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        rows = max(DEFAULT_CONTEXT, (self.geometry.max_images or 1) * self.tokens() + TEXT_ROWS)
        return DecoderInfo(text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads, head_dim, text.hidden_size,
                           context or min(rows, trained), self.position_axes, self.first_position, self.bidirectional)

    def refuse_choices(self, *names: str) -> None:
        """Raises EdgecompError for a choice that has no effect on this family: 'image_size', 'tiles'."""
        reasons = {"image_size": "have one size", "tiles": "are not cut up"}
        for name in names:
            if getattr(self.geometry, name) is not None:
                raise EdgecompError(f"--{name.replace('_', '-')} has no effect on a {self.config.model_type} model, "
                                    f"whose pictures {reasons[name]}: leave it out")

    # modules to trace

    @abstractmethod
    def encoder_layers(self, model: Any) -> torch.nn.ModuleList:
        """HF's layers of the vision tower."""

    @abstractmethod
    def vision(self, model: Any) -> torch.nn.Module:
        """A module from pixels [images, 3, H, W] (or [images, tiles, 3, H, W]) to visual tokens [images, N, D], with a mark at each
        layer and on the result; with deepstack, a tuple of those and the features [images, N, D] of each decoder layer, marked too."""

    def text_model(self, model: Any) -> Any:
        """HF's decoder inside the model."""
        return model.model.language_model

    def language(self, model: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
        """The decoder (embeddings to last hidden state, `layers` inside) and the head (hidden state to logits)."""
        decoder = self.text_model(model)
        if not hasattr(decoder, "layers"):
            raise EdgecompError(f"the text model {type(decoder).__name__} has no list of layers; edgecomp takes Llama-like decoders here")
        return decoder, model.lm_head

    def decode(self, decoder: torch.nn.Module, embeddings: torch.Tensor, positions: torch.Tensor, cache: Any,
               deepstack: Sequence[torch.Tensor]) -> torch.Tensor:
        """Runs the decoder on new rows while it is traced: the last hidden state."""
        hidden: torch.Tensor = decoder(inputs_embeds=embeddings, position_ids=positions, past_key_values=cache, use_cache=True).last_hidden_state
        return hidden

    # Hugging Face as the oracle

    def hf_preprocess(self, processor: Any, picture: Any) -> torch.Tensor | None:
        """HF's image processor on a picture, in our layout [1, ...]; None where it would cut this picture up in another way."""
        pixels: torch.Tensor = processor(images=picture, return_tensors="pt")["pixel_values"]
        return pixels.float()

    def hf_pixels(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pixels of our layout [images, ...] as the arguments that HF's model takes pictures by."""
        return {"pixel_values": pixels}

    def hf_generate(self, model: Any, pixels: torch.Tensor) -> dict[str, Any]:
        """The same for HF's `generate`."""
        return self.hf_pixels(pixels)

    def hf_prompt(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What HF's model takes beside the ids [1, rows] of a prompt and their attention mask."""
        return {}

    def hf_features(self, model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """HF's own visual tokens [images, N, D] of pixels of our layout, and the deepstack features."""
        found = model.get_image_features(**self.hf_pixels(pixels))

        def batch(values: Any) -> torch.Tensor:  # some families give one tensor, others one each picture
            every: torch.Tensor = torch.cat(list(values)) if isinstance(values, (list, tuple)) else values
            return every.reshape(len(pixels), -1, every.shape[-1])
        return batch(found.pooler_output), [batch(layer) for layer in getattr(found, "deepstack_features", None) or []]

    def hf_hidden(self, hidden: NDArray[np.float32], images: int) -> NDArray[np.float32]:
        """A hidden state between HF's vision layers in the layout that it has in the graph."""
        return hidden.reshape(images, -1, hidden.shape[-1]) if hidden.ndim == 2 else hidden

    def hf_positions(self, model: Any, ids: torch.Tensor, images: int) -> NDArray[np.int64]:
        """HF's own positions [axes, rows] of an unpruned prompt's ids [1, rows]."""
        return np.arange(self.first_position, self.first_position + ids.shape[1])[None]

    def window(self, layer: int) -> int | None:
        """The rows that a decoder layer looks back, itself among them; None: all."""
        text = self.config.get_text_config()
        kinds = getattr(text, "layer_types", None)
        return getattr(text, "sliding_window", None) if kinds is None or kinds[layer] == "sliding_attention" else None

    def hf_decode(self, model: Any, embeddings: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor,
                  deepstack: list[torch.Tensor]) -> torch.Tensor:
        """HF's decoder over whole sequences: the last hidden state [1, rows, D].

        Args:
            model: HF's.
            embeddings: [1, rows, D].
            positions: [1, rows], or [axes, 1, rows].
            segments: [1, rows], see `Rows`.
            deepstack: each [1, rows, D], zero at text; of the rows that its layer has, where some were cut before.
        """
        # without a mask, transformers takes a jump in the positions for the start of another packed sequence
        found: torch.Tensor = self.text_model(model)(inputs_embeds=embeddings, attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.int64),
                                                     use_cache=False, position_ids=positions).last_hidden_state
        return found


def visible(segments: torch.Tensor, window: int | None = None, bounded: bool = True) -> torch.Tensor:
    """Which rows [rows, rows] see which: those before them, within a window where there is one, and those of their segment,
    within it too where it bounds segments."""
    at, own = torch.arange(segments.shape[-1]), segments.reshape(-1)
    before, same = at[None] <= at[:, None], (own[None] == own[:, None]) & (own > 0)[:, None]
    near = torch.ones_like(before) if window is None else at[None] > at[:, None] - window
    return (before | same) & near if bounded else (before & near) | same


def additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask [1, 1, rows, rows] that HF adds to scores, from what is seen [rows, rows]."""
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None, None]
