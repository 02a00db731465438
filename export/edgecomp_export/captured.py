"""Hugging Face's model run with the weights of one layer at a time, and what went into each layer."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgecomp_export import checkpoint
from edgecomp_export.dequantized import Contents, own_parameters
from edgecomp_export.reference import Prompts
from edgecomp_export.weights import Weights
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.rows import Rows

ANSWER = 4  # rows behind the prompt that are computed in a second run, on the cache of the first


@contextmanager
def _running(part: str) -> Iterator[None]:
    """Says in one line where Hugging Face's own code fails on this checkpoint's prompts or pictures."""
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "no reason given")[:200]
        raise EdgecompError(f"transformers' {part} fails on this checkpoint ({type(error).__name__}: {reason}), so that there is nothing to "
                            "compare with; `compile --no-verify` goes without") from error


class Captured:
    """Hugging Face's model, run with the weights of one layer at a time, and what went into each layer.

    precision: 'fp32' or 'fp16', to which its weights are rounded. quantized: those that are a bundle's instead.
    """

    def __init__(self, prompts: Prompts, precision: str, quantized: Contents):
        self.family, self.image_id = prompts.family, prompts.image_id
        self.model = checkpoint.as_oracle(checkpoint.load(prompts.folder))
        own_parameters(self.model, quantized)
        self.weights = Weights(self.model, "fp32", through=precision)
        for name, content in quantized.items():
            self.weights.replace(name, content)
        decoder, self.head = self.family.language(self.model)
        self.stacks = {"vision": list(self.family.encoder_layers(self.model)), "decoder": list(decoder.layers)}  # type: ignore[arg-type]
        self.hidden: dict[str, list[NDArray[np.float32]]] = {"vision": [], "decoder": []}
        streamed = [*self.stacks["vision"], *self.stacks["decoder"], self.model.get_input_embeddings(), self.head]
        self.weights.fill_except(streamed)
        for module in streamed:
            module.register_forward_pre_hook(lambda module, _: self.weights.fill(module))
            module.register_forward_hook(lambda module, *_: self.weights.empty(module))

    @contextmanager
    def _watched(self, graph: str) -> Iterator[None]:
        def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self.hidden[graph].append(hidden.detach().clone().numpy())
        handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in self.stacks[graph]]
        with torch.no_grad(), _running(f"{graph} model"):
            yield
        for handle in handles:
            handle.remove()

    def vision(self, pixels: torch.Tensor) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
        """Visual tokens [images, N, D] and deepstack features; the layers' inputs are in `hidden['vision']`, in the graph's layout."""
        with self._watched("vision"):
            tokens, stacked = self.family.hf_features(self.model, pixels)
        self.hidden["vision"] = [self.family.hf_hidden(hidden, len(pixels)) for hidden in self.hidden["vision"]]
        return tokens.numpy(), [layer.numpy() for layer in stacked]

    def positions(self, ids: list[int], pictures: int) -> NDArray[np.int64]:
        """HF's own, [axes, rows]."""
        with _running("position rule"):
            return self.family.hf_positions(self.model, torch.tensor([ids]), pictures)

    def embeddings(self, ids: list[int], features: NDArray[np.float32]) -> NDArray[np.float32]:
        """[rows, D]: HF's of the ids, with the visual tokens in their places."""
        places, table = np.array(ids) == self.image_id, self.model.get_input_embeddings()
        places[len(ids) - ANSWER:] = False
        with torch.no_grad():
            found: NDArray[np.float32] = table(torch.tensor(np.where(places, 0, ids))).numpy()
        found[places] = features.reshape(-1, found.shape[-1])
        return found

    def decoder(self, rows: Rows) -> NDArray[np.float32]:
        """Logits [ANSWER + 1, V] of the last rows; the layers' inputs are in `hidden['decoder']`."""
        embeddings = torch.from_numpy(rows.embeddings.astype(np.float32))[None]
        where, segments = torch.from_numpy(rows.positions), torch.from_numpy(rows.segments)[None]
        stacked = [torch.from_numpy(layer.astype(np.float32))[None] for layer in ([] if rows.deepstack is None else rows.deepstack)]
        with self._watched("decoder"):
            hidden = self.family.hf_decode(self.model, embeddings, where if len(where) == 1 else where[:, None], segments, stacked)
            found: NDArray[np.float32] = self.head(hidden[0, -ANSWER - 1:]).numpy()
        return found
