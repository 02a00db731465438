"""Comparing a bundle with the Hugging Face model it came from: greedy text, and the logits at every step."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgecomp import methods
from edgecomp.evaluate import MOST_TOKENS
from edgecomp.methods.base import Merging, Place
from edgecomp_export.reference import Reference
from edgecomp_runtime import Session

# measured: fp32 differences on the demonstration model stay under 2e-5; fp16 arithmetic against fp32 reaches a few hundredths
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-1}


@dataclass(frozen=True)
class Comparison:
    """One question: what both said, and the largest difference between their logits over the answer's steps."""
    question: str
    reference: str
    bundle: str
    logits: float

    @property
    def same(self) -> bool:
        return self.reference == self.bundle


def compare(session: Session, reference: Reference, image: Any, question: str, features: torch.Tensor, most: int = MOST_TOKENS) -> Comparison:
    """Asks both. The unpruned plan meets HF's own preprocessing and `generate`; a compressed one the HF model with the
    graph's kept tokens and positions imposed on HF's own features.

    Args:
        session: the bundle's plan.
        reference: the HF model.
        image: as `Session.generate` takes it.
        question: about it.
        features: HF's own of that image, `reference.features(reference.pixels(image))`.
        most: tokens of the answer.
    """
    generation = session.generate(question, [image], max_new_tokens=most)
    said = generation.finish()
    ended = generation.statistics.stopped_by == "end"
    mine = session.score(question, [image], generation.token_ids)
    visual, kept = imposed(session, features[0], image)
    prompt = reference.ids(question, 1, len(kept))
    theirs = reference.logits(prompt, visual, place(prompt, kept, reference.image_id, session, len(generation.token_ids)), generation.token_ids)
    greedy, ends = [int(i) for i in theirs.argmax(1)], session.bundle.manifest.text.end_ids
    if not session.plan.steps:
        expected = reference.generate(prompt, reference.pixels(image), most)
    elif greedy[:len(generation.token_ids)] == generation.token_ids and (not ended or greedy[-1] in ends):
        expected = generation.token_ids  # every step's argmax is the bundle's own token: this is what greedy decoding gives
    else:
        expected = reference.greedy(prompt, visual, lambda n: place(prompt, kept, reference.image_id, session, n), ends, most)
    text = reference.tokenizer.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Comparison(question, text.strip(), said.strip(), float(np.abs(mine - theirs).max()))


def imposed(session: Session, features: torch.Tensor, image: Any) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
    """HF's own features [N, D], reduced as the bundle's graph reduced its own: tokens [K, D] and their raster places [K]."""
    kept = session.visual_tokens(image).kept
    for step in session.plan.steps:
        method = methods.make(step.method, **step.parameters)
        if isinstance(method, Merging):
            weights = method.weights(Place(session.bundle.manifest.vision.grid, step.keep))
            return torch.from_numpy(weights).to(features) @ features, kept
    return features[torch.from_numpy(kept)], kept


def place(prompt: Sequence[int], kept: np.ndarray[Any, Any], image_id: int, session: Session, answer: int) -> np.ndarray[Any, Any]:
    """Positions of a one-image prompt and its answer under the plan's policy."""
    start = list(prompt).index(image_id)
    span = session.bundle.manifest.vision.tokens if session.plan.position == "keep" else len(kept)
    image = kept if session.plan.position == "keep" else np.arange(len(kept))
    rest = len(prompt) - start - len(kept) + answer
    return np.concatenate([np.arange(start), start + image, start + span + np.arange(rest)]).astype(np.int64)


def verify(session: Session, reference: Reference, questions: Sequence[tuple[Any, str]], tick: Callable[[], None] = lambda: None,
           most: int = MOST_TOKENS) -> list[Comparison]:
    """`compare` for each (image, question). Questions about one picture should follow each other."""
    found, last = [], None
    for image, question in questions:
        name = id(image) if isinstance(image, np.ndarray) else image
        if last is None or name != last:
            last, features = name, reference.features(reference.pixels(image))
        found.append(compare(session, reference, image, question, features, most))
        tick()
    return found
