"""The Hugging Face model as the oracle: its own generate on the whole model, and with a plan's visual tokens imposed."""
from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgecomp_export import checkpoint
from edgecomp_export.families.base import DEFAULTS, Geometry, additive, visible
from edgecomp_export.pruned import LiveCut, pruned


class Prompts:
    """What needs no weights: Hugging Face's tokenizer, chat template and image processor, and the family.

    The parts of a composite processor are taken one by one: it fails without torchvision where it has a video processor.
    """

    def __init__(self, model: str, geometry: Geometry = DEFAULTS):
        from transformers import AutoImageProcessor
        self.folder: Path = checkpoint.find(model)
        self.family = checkpoint.family_at(self.folder, geometry)
        self.tokenizer: Any = self.family.prepare_tokenizer(checkpoint.load_tokenizer(self.folder))
        self.image_processor: Any = AutoImageProcessor.from_pretrained(self.folder, local_files_only=True)  # type: ignore[no-untyped-call]
        self.template = checkpoint.chat_template(self.folder) or self.family.template()
        self.image_id = checkpoint.image_id(self.family.config)

    def ids(self, question: str, images: int, runs: Sequence[int]) -> list[int]:
        """The prompt's ids as HF's processor makes them, `runs` image ids for each run of an image's visual tokens."""
        content = [*[{"type": "image"}] * images, {"type": "text", "text": question}]
        text = self.tokenizer.apply_chat_template([{"role": "user", "content": content}], chat_template=self.template,
                                                  add_generation_prompt=True, tokenize=False)
        token, texts = str(self.tokenizer.convert_ids_to_tokens(self.image_id)), self.family.texts()
        picture = texts[0] + "".join(token * run + after for run, after in zip(runs, texts[1:]))
        start = self.tokenizer.bos_token
        ids: list[int] = self.tokenizer(text.replace(self.family.placeholder(token), picture),
                                        add_special_tokens=start is None or not text.startswith(start))["input_ids"]
        return ids

    def pixels(self, image: Any) -> torch.Tensor | None:
        """Pixels [1, ...] in our layout by HF's own loader and image processor, from a path, PIL image or uint8 array; None where the
        processor would have cut this picture up in another way."""
        from transformers.image_utils import load_image
        if isinstance(image, (str, os.PathLike)):
            image = load_image(os.fspath(image))
        return self.family.hf_preprocess(self.image_processor, image)


class Reference(Prompts):
    """A checkpoint in fp32 on the CPU, run by transformers with attention `sdpa` or `eager`."""

    def __init__(self, model: str, attention: str = "sdpa", geometry: Geometry = DEFAULTS):
        super().__init__(model, geometry)
        self.model: Any = checkpoint.as_oracle(checkpoint.load(self.folder, torch.float32), attention)

    @torch.no_grad()
    def features(self, pixels: torch.Tensor, cuts: Sequence[LiveCut] = ()) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The visual tokens [images, N, D] and deepstack features of pixels in our layout, with cuts between the layers of the tower."""
        with pruned(self.family.encoder_layers(self.model), cuts):
            return self.family.hf_features(self.model, pixels)

    @torch.no_grad()
    def generate(self, ids: list[int], pixels: torch.Tensor, most: int) -> list[int]:
        """Greedy ids by HF's own `generate`, end token included where it came."""
        prompt = torch.tensor([ids])
        out = self.model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=most, do_sample=False,
                                  **self.family.hf_prompt(prompt), **self.family.hf_generate(self.model, pixels))
        return [int(i) for i in out[0, len(ids):]]

    @torch.no_grad()
    def positions(self, ids: list[int], images: int) -> NDArray[np.int64]:
        """HF's own positions [axes, rows] of an unpruned prompt."""
        return self.family.hf_positions(self.model, torch.tensor([ids]), images)

    @torch.no_grad()
    def greedy(self, ids: list[int], visual: torch.Tensor, stacked: list[torch.Tensor], positions: Callable[[int], NDArray[np.int64]],
               ends: Sequence[int], most: int, cuts: Callable[[int], Sequence[LiveCut]] = lambda answer: ()) -> list[int]:
        """Greedy ids with given visual tokens, end token included; `positions(n)` and `cuts(n)` are those of the prompt and n more rows."""
        answer: list[int] = []
        while len(answer) < most and not (answer and answer[-1] in ends):
            answer.append(int(self.logits(ids, visual, stacked, positions(len(answer)), answer, cuts(len(answer)))[-1].argmax()))
        return answer

    @torch.no_grad()
    def logits(self, ids: list[int], visual: torch.Tensor, stacked: list[torch.Tensor], positions: NDArray[np.int64],
               answer: list[int], cuts: Sequence[LiveCut] = ()) -> NDArray[np.float32]:
        """Teacher-forced logits [len(answer) + 1, V] with given visual tokens and positions.

        Args:
            ids: the prompt with as many image ids as there are visual tokens.
            visual: [K, D], in the order of the image ids; stacked: the deepstack features, each [K, D].
            positions: [axes, rows] of the prompt's rows and the answer's.
            answer: the answer's ids.
            cuts: between the decoder's layers, of the rows of prompt and answer.
        """
        every = torch.tensor([ids + answer])
        places = torch.tensor([ids]) == self.image_id  # an answer may have image ids too, which are just tokens there
        embeddings = self.model.get_input_embeddings()(torch.where(every < self.model.get_input_embeddings().weight.shape[0], every, 0))
        embeddings[:, :len(ids)][places] = visual.to(embeddings.dtype)
        deepstack = [torch.zeros_like(embeddings) for _ in stacked]
        for rows, features in zip(deepstack, stacked):
            rows[:, :len(ids)][places] = features.to(rows.dtype)
        for layer in range(len(deepstack)):
            for cut in (cut for cut in cuts if cut.layer <= layer):
                deepstack[layer] = cut.hidden(deepstack[layer])
        where, segments = torch.from_numpy(np.ascontiguousarray(positions)), self.segments(places[0], len(answer))

        def seen(layer: int, rows: torch.Tensor) -> torch.Tensor:
            return additive(visible(segments[:, rows], self.family.window(layer), self.family.segments_bounded), embeddings.dtype)
        text = self.family.text_model(self.model)
        with pruned(text.layers, cuts, seen, text.rotary_emb if self.family.position_axes > 1 else None):
            hidden = self.family.hf_decode(self.model, embeddings, where if len(where) == 1 else where[:, None], segments, deepstack)
        found: NDArray[np.float32] = self.family.language(self.model)[1](hidden[0, -len(answer) - 1:]).numpy()
        return found

    def segments(self, places: torch.Tensor, answer: int) -> torch.Tensor:
        """Which rows [1, rows] of a prompt and its answer see each other both ways: stretches of image ids, or all of the prompt."""
        if self.family.bidirectional == "images":
            starts = places & ~torch.nn.functional.pad(places, (1, 0))[:-1]
            prompt = torch.where(places, starts.cumsum(0), 0)
        else:
            prompt = torch.full_like(places, self.family.bidirectional == "prompt", dtype=torch.int64)
        return torch.nn.functional.pad(prompt, (0, answer))[None]
