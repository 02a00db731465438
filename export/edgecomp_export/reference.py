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


class Reference:
    """A checkpoint in fp32 on the CPU, run by transformers with attention `sdpa` or `eager`."""

    def __init__(self, model: str, attention: str = "sdpa"):
        from transformers import AutoImageProcessor, AutoTokenizer
        folder: Path = checkpoint.find(model)
        self.model: Any = checkpoint.load(folder, "fp32")
        try:
            self.model.set_attn_implementation(attention)
        except ValueError:  # some text models have no sdpa
            self.model.set_attn_implementation("eager")
        # taken separately: composite processors fail without torchvision where they hold a video processor
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.image_processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True)  # type: ignore[no-untyped-call]
        self.template = checkpoint.chat_template(folder)
        config = self.model.config
        self.image_id = int(getattr(config, "image_token_index", None) or config.image_token_id)

    def ids(self, question: str, images: int, tokens: int) -> list[int]:
        """The prompt's ids as HF's processor makes them, `tokens` image ids for each image."""
        content = [*[{"type": "image"}] * images, {"type": "text", "text": question}]
        ids = self.tokenizer.apply_chat_template([{"role": "user", "content": content}], chat_template=self.template,
                                                 add_generation_prompt=True, tokenize=True, return_dict=False)
        return [i for each in ids for i in ([each] * tokens if each == self.image_id else [each])]

    def pixels(self, image: Any) -> torch.Tensor:
        """[1, 3, H, W] by HF's own loader and image processor, from a path, PIL image or uint8 array."""
        from transformers.image_utils import load_image
        if isinstance(image, (str, os.PathLike)):
            image = load_image(os.fspath(image))
        pixels: torch.Tensor = self.image_processor(images=image, return_tensors="pt")["pixel_values"]
        return pixels.float()

    @torch.no_grad()
    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """The unpruned visual tokens [1, N, D]."""
        return torch.stack(list(self.model.get_image_features(
            pixels, vision_feature_layer=self.model.config.vision_feature_layer,
            vision_feature_select_strategy=self.model.config.vision_feature_select_strategy).pooler_output))

    @torch.no_grad()
    def generate(self, ids: list[int], pixels: torch.Tensor, most: int) -> list[int]:
        """Greedy ids by HF's own `generate`, end token included where it came."""
        prompt = torch.tensor([ids])
        out = self.model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), pixel_values=pixels, max_new_tokens=most, do_sample=False)
        return [int(i) for i in out[0, len(ids):]]

    @torch.no_grad()
    def greedy(self, ids: list[int], visual: torch.Tensor, positions: Callable[[int], NDArray[np.int64]], ends: Sequence[int],
               most: int) -> list[int]:
        """Greedy ids with given visual tokens, end token included; `positions(n)` are those of the prompt and n more rows."""
        answer: list[int] = []
        while len(answer) < most and not (answer and answer[-1] in ends):
            answer.append(int(self.logits(ids, visual, positions(len(answer)), answer)[-1].argmax()))
        return answer

    @torch.no_grad()
    def logits(self, ids: list[int], visual: torch.Tensor, positions: NDArray[np.int64], answer: list[int]) -> NDArray[np.float32]:
        """Teacher-forced logits [len(answer) + 1, V] with given visual tokens and positions.

        Args:
            ids: the prompt with as many image ids as there are visual tokens.
            visual: [K, D], in the order of the image ids.
            positions: of the prompt's rows and the answer's.
            answer: the answer's ids.
        """
        every = torch.tensor([ids + answer])
        embeddings = self.model.get_input_embeddings()(every)
        places = torch.tensor([ids]) == self.image_id  # an answer may have image ids too, which are just tokens there
        embeddings[:, :len(ids)][places] = visual.to(embeddings.dtype)
        # without a mask, transformers takes a jump in the positions for the start of another packed sequence
        hidden = self.model.model.language_model(inputs_embeds=embeddings, attention_mask=torch.ones_like(every), use_cache=False,
                                                 position_ids=torch.from_numpy(np.ascontiguousarray(positions))[None]).last_hidden_state
        found: NDArray[np.float32] = self.model.lm_head(hidden[0, len(ids) - 1:]).numpy()
        return found
