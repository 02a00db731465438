"""Comparing a bundle with the Hugging Face model it came from: greedy text, and the logits at every step."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgecomp import methods
from edgecomp.budget import places
from edgecomp.evaluate import MOST_TOKENS
from edgecomp.methods.base import Merging
from edgecomp.passes.splice import places_of
from edgecomp_export.families.base import Geometry
from edgecomp_export.reference import Reference
from edgecomp_runtime import Session
from edgecomp_runtime.images import load, preprocess
from edgecomp_runtime.manifest import Manifest, PlanInfo
from edgecomp_runtime.rows import Layout

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


def reference_of(manifest: Manifest, model: str | None = None) -> Reference:
    """The model that a bundle was made from, with pictures of the bundle's geometry."""
    return Reference(model or manifest.source.model, geometry=geometry_of(manifest))


def geometry_of(manifest: Manifest) -> Geometry:
    """What was chosen of a bundle's pictures."""
    return Geometry(manifest.source.image_size, manifest.source.tiles)


def compare(session: Session, reference: Reference, image: Any, question: str, pixels: torch.Tensor,
            features: tuple[torch.Tensor, list[torch.Tensor]], most: int = MOST_TOKENS) -> Comparison:
    """Asks both. The unpruned plan meets HF's own `generate`; a compressed one the HF model with the graph's kept tokens and
    positions imposed on HF's own features.

    Args:
        session: the bundle's plan.
        reference: the HF model.
        image: as `Session.generate` takes it.
        question: about it.
        pixels: HF's own of that image, `seen(session, reference, image)`.
        features: HF's own of those, `reference.features(pixels)`.
        most: tokens of the answer.
    """
    generation = session.generate(question, [image], max_new_tokens=most)
    said = generation.finish()
    ended = generation.statistics.stopped_by == "end"
    mine = session.score(question, [image], generation.token_ids)
    visual, stacked, kept = imposed(session, features, image)
    runs = Layout.of(session.bundle.manifest.vision, session.bundle.manifest.decoder, session.plan).runs
    prompt = reference.ids(question, 1, [run.kept for run in runs])
    unpruned = reference.ids(question, 1, [run.span for run in runs])

    def positions(answer: int) -> NDArray[np.int64]:
        return place(reference.positions(unpruned, 1), unpruned, kept, reference.image_id, session, answer)
    theirs = reference.logits(prompt, visual, stacked, positions(len(generation.token_ids)), generation.token_ids)
    greedy, ends = [int(i) for i in theirs.argmax(1)], session.bundle.manifest.text.end_ids
    if not session.plan.steps:
        expected = reference.generate(prompt, pixels, most)
    elif greedy[:len(generation.token_ids)] == generation.token_ids and (not ended or greedy[-1] in ends):
        expected = generation.token_ids  # every step's argmax is the bundle's own token: this is what greedy decoding gives
    else:
        expected = reference.greedy(prompt, visual, stacked, positions, ends, most)
    text = reference.tokenizer.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Comparison(question, text.strip(), said.strip(), float(np.abs(mine - theirs).max()))


def seen(session: Session, reference: Reference, image: Any) -> torch.Tensor:
    """HF's own pixels [1, ...] of a picture, or the bundle's where HF's processor would have cut that picture up in another way."""
    pixels = reference.pixels(image)
    return torch.from_numpy(preprocess(load(image), session.bundle.manifest.image))[None] if pixels is None else pixels


def imposed(session: Session, features: tuple[torch.Tensor, list[torch.Tensor]],
            image: Any) -> tuple[torch.Tensor, list[torch.Tensor], NDArray[np.int64]]:
    """HF's own features of one picture, reduced as the bundle's graph reduced its own: tokens [K, D], deepstack, raster places [K]."""
    kept, manifest = session.visual_tokens(image).kept, session.bundle.manifest
    tokens, stacked = (features[0][0].numpy(), [layer[0].numpy() for layer in features[1]])
    return (torch.from_numpy(reduced(manifest, session.plan, tokens, kept)),
            [torch.from_numpy(reduced(manifest, session.plan, layer, kept)) for layer in stacked], kept)


def reduced(manifest: Manifest, plan: PlanInfo, values: NDArray[Any], kept: NDArray[np.int64]) -> NDArray[Any]:
    """One picture's features [N, D] as a plan reduces them, given the places [K] that it keeps: those rows, or its averages."""
    for step in plan.steps:
        method = methods.make(step.method, **step.parameters)
        if isinstance(method, Merging) and step.keep < manifest.vision.tokens:
            parts = list(zip(places(manifest, step.keep), manifest.vision.tiles))
            merged = np.concatenate([method.weights(part).astype(values.dtype) @ values[places_of(tile)] for part, tile in parts])
            taken = np.concatenate([places_of(tile)[method.places(part)] for part, tile in parts])
            ascending: NDArray[Any] = merged[np.argsort(taken, kind="stable")]
            return ascending
    return values[kept]


def place(unpruned: NDArray[np.int64], ids: Sequence[int], kept: NDArray[np.int64], image_id: int, session: Session,
          answer: int) -> NDArray[np.int64]:
    """Positions [axes, rows] of a one-image prompt and its answer under the plan's policy, from HF's own of the unpruned prompt."""
    image = np.flatnonzero(np.array(ids) == image_id)
    mine = np.ones(len(ids), bool)
    mine[image] = np.isin(np.arange(len(image)), kept)
    found, after = unpruned[:, mine], int(unpruned.max()) + 1
    if session.plan.position == "compact":
        # places that no row is at any more close up: on one axis all of them, in M-RoPE rows and columns of the picture
        used = np.isin(np.arange(int(unpruned.max()) + 1), found) if len(found) == 1 else None
        if used is not None:
            found, after = (np.cumsum(used) - 1 + int(unpruned.min()))[found], int(used.sum()) + int(unpruned.min())
        else:
            found, after = _compact(found, mine, image)
    return np.concatenate([found, np.tile(np.arange(after, after + answer), (len(found), 1))], 1).astype(np.int64)


def _compact(found: NDArray[np.int64], mine: NDArray[np.bool_], image: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """M-RoPE positions of a one-image prompt with the picture's rows and columns that nothing is left of closed up."""
    start, count = int(image[0]), int(mine[image].sum())
    first, picture, rest = found[:, :start], found[:, start:start + count], found.shape[1] - start - count
    anew = np.stack([np.searchsorted(np.unique(axis), axis) for axis in picture]) + start
    after = int(anew.max()) + 1
    return np.concatenate([first, anew, np.tile(np.arange(after, after + rest), (3, 1))], 1), after + rest


def verify(session: Session, reference: Reference, questions: Sequence[tuple[Any, str]], tick: Callable[[], None] = lambda: None,
           most: int = MOST_TOKENS) -> list[Comparison]:
    """`compare` for each (image, question). Questions about one picture should follow each other."""
    found, last = [], None
    for image, question in questions:
        name = id(image) if isinstance(image, np.ndarray) else image
        if last is None or name != last:
            last, pixels = name, seen(session, reference, image)
            features = reference.features(pixels)
        found.append(compare(session, reference, image, question, pixels, features, most))
        tick()
    return found
