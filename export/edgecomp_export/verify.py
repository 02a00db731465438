"""Comparing a bundle with the Hugging Face model it came from: greedy text, and the logits at every step."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgecomp import methods
from edgecomp.budget import Reduction, Tokens, places_of
from edgecomp.evaluate import MOST_TOKENS
from edgecomp.methods.base import Averaging, Merging
from edgecomp_export.dequantized import contents, impose
from edgecomp_export.families.base import Geometry
from edgecomp_export.pruned import LiveCut
from edgecomp_export.reference import Reference
from edgecomp_runtime import Bundle, Session
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.images import load, preprocess
from edgecomp_runtime.manifest import Manifest, PlanInfo, StepInfo
from edgecomp_runtime.rows import Layout

# measured: fp32 differences on the demonstration model stay under 2e-5; fp16 arithmetic against fp32 reaches a few hundredths
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-1}


# the same with products in int8, whose inputs are rounded: under 0.15 on the demonstration model, in int8 and in int4
ROUNDED_INPUTS = 4e-1


def tolerance(manifest: Manifest) -> float:
    """The largest difference of logits that a bundle may have from its Hugging Face model, with the bundle's weights."""
    return ROUNDED_INPUTS if manifest.quantized else TOLERANCE[manifest.precision]


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


def reference_of(bundle: Bundle, model: str | None = None) -> Reference:
    """The model that a bundle was made from, with pictures of the bundle's geometry, and its weights where they are quantized."""
    reference = Reference(model or bundle.manifest.source.model, geometry=geometry_of(bundle.manifest))
    impose(reference.model, contents(bundle))
    return reference


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
    visual, stacked, kept = imposed(session, reference, features, pixels, image)
    runs = Layout.of(session.bundle.manifest.vision, session.bundle.manifest.decoder, session.plan).runs
    prompt = reference.ids(question, 1, [run.kept for run in runs])
    unpruned = reference.ids(question, 1, [run.span for run in runs])

    def positions(answer: int) -> NDArray[np.int64]:
        return place(reference.positions(unpruned, 1), unpruned, kept, reference.image_id, session, answer)

    by_site = session.kept(image, question) if session.plan.cuts else {}

    def cuts(answer: int) -> list[LiveCut]:
        return live(session, np.array(prompt) == reference.image_id, kept, by_site, positions(answer))
    theirs = reference.logits(prompt, visual, stacked, positions(len(generation.token_ids)), generation.token_ids, cuts(len(generation.token_ids)))
    greedy, ends = [int(i) for i in theirs.argmax(1)], session.bundle.manifest.text.end_ids
    if not session.plan.steps:
        expected = reference.generate(prompt, pixels, most)
    elif greedy[:len(generation.token_ids)] == generation.token_ids and (not ended or greedy[-1] in ends):
        expected = generation.token_ids  # every step's argmax is the bundle's own token: this is what greedy decoding gives
    else:
        expected = reference.greedy(prompt, visual, stacked, positions, ends, most, cuts)
    text = reference.tokenizer.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Comparison(question, text.strip(), said.strip(), float(np.abs(mine - theirs).max()))


def seen(session: Session, reference: Reference, image: Any) -> torch.Tensor:
    """HF's own pixels [1, ...] of a picture, or the bundle's where HF's processor would have cut that picture up in another way."""
    pixels = reference.pixels(image)
    return torch.from_numpy(preprocess(load(image), session.bundle.manifest.image))[None] if pixels is None else pixels


def imposed(session: Session, reference: Reference, features: tuple[torch.Tensor, list[torch.Tensor]], pixels: torch.Tensor,
            image: Any) -> tuple[torch.Tensor, list[torch.Tensor], NDArray[np.int64]]:
    """HF's own features of one picture, reduced as the bundle's graph reduced its own: tokens [K, D], deepstack, raster places [K].

    Raises:
        EdgecompError: the plan merges by what it sees, or has several steps in the vision graph, which cannot be imposed.
    """
    kept, manifest = session.visual_tokens(image).kept, session.bundle.manifest
    steps = [step for step in session.plan.steps if not in_decoder(step)]
    made = [methods.make(step.method, **step.parameters) for step in steps]
    twice = len(steps) > 1 and not all(step.site == "projector" and not isinstance(m, Merging) for step, m in zip(steps, made))
    if twice or any(isinstance(m, Merging) and not isinstance(m, Averaging) for m in made):
        raise EdgecompError(f"plan {session.plan_name!r} merges tokens by what it sees, or in several steps, which Hugging Face's model "
                            "cannot be made to do: verify another plan")
    site, _, layer = steps[0].site.partition(":") if steps else ("", "", "")
    if site == "encoder" and isinstance(made[0], Averaging):
        raise EdgecompError(f"plan {session.plan_name!r} averages inside the vision tower, which verify does not compare: verify another plan")
    if site == "encoder" and int(layer) <= manifest.vision.select_layer:
        cls = int(manifest.vision.has_cls)
        cut = torch.from_numpy(np.concatenate([np.arange(cls), kept + cls]))
        features = reference.features(pixels, [LiveCut(int(layer), cut)])
        return features[0][0], [stacked[0] for stacked in features[1]], kept
    tokens, stacked = (features[0][0].numpy(), [layer[0].numpy() for layer in features[1]])
    return (torch.from_numpy(reduced(manifest, session.plan, tokens, kept)),
            [torch.from_numpy(reduced(manifest, session.plan, one, kept)) for one in stacked], kept)


def in_decoder(step: StepInfo) -> bool:
    """Whether a step is made in the decoder's graph."""
    return step.site.startswith("decoder") or step.needs_prompt


def reduced(manifest: Manifest, plan: PlanInfo, values: NDArray[Any], kept: NDArray[np.int64]) -> NDArray[Any]:
    """One picture's features [N, D] as a plan's step at the projector reduces them, given the places [K] that it keeps."""
    for step in plan.steps:
        method = methods.make(step.method, **step.parameters)
        if isinstance(method, Averaging) and step.keep < manifest.vision.tokens and not in_decoder(step):
            matrix = averaged(Reduction.of(method, Tokens.of(manifest), step.keep, "projector", step.windows))
            return np.asarray(matrix.astype(values.dtype) @ values)
    return values[kept]


def averaged(step: Reduction) -> NDArray[np.float64]:
    """The matrix [K, N] of a constant average over tiles and windows."""
    assert isinstance(step.method, Averaging)
    rows, taken = [], []
    for part in step.parts:
        mine = np.zeros((part.place.keep, step.tokens.count))
        mine[:, places_of(part.tile)] = step.method.weights(part.place)
        rows.append(mine)
        taken.append(places_of(part.tile)[step.method.places(part.place)])
    found: NDArray[np.float64] = np.concatenate(rows)[np.argsort(np.concatenate(taken), kind="stable")]
    return found


def live(session: Session, visual: NDArray[np.bool_], entering: NDArray[np.int64], by_site: dict[str, NDArray[np.int64]],
         positions: NDArray[np.int64]) -> list[LiveCut]:
    """A one-image prompt's cuts inside the decoder, for Hugging Face's: the rows that the bundle let go on, imposed.

    Args:
        session: of the plan.
        visual: which of the prompt's rows are visual tokens.
        entering: the places [K] of those; by_site: `Session.kept`.
        positions: [axes, rows] of the prompt's rows and the answer's behind them.
    """
    manifest, plan, found = session.bundle.manifest, session.plan, []
    is_visual = np.concatenate([visual, np.zeros(positions.shape[1] - len(visual), bool)])
    for cut, step in zip(plan.cuts, [step for step in plan.steps if in_decoder(step)]):
        after = by_site[f"decoder:{cut.layer}"]
        chosen, rows = np.flatnonzero(is_visual), np.arange(len(is_visual))
        stay = ~is_visual
        stay[chosen[np.isin(entering, after)]] = True
        method, weights = methods.make(step.method, **step.parameters), None
        if isinstance(method, Averaging):
            tokens = Tokens.of(manifest)
            if len(entering) != tokens.count:
                raise EdgecompError(f"plan {session.plan_name!r} averages what a step chose, which is not compared: verify another plan")
            matrix = np.eye(len(rows))[stay]
            matrix[np.isin(rows[stay], chosen)] = 0
            average = averaged(Reduction.of(method, tokens, step.keep, "decoder", step.windows))
            matrix[np.ix_(np.flatnonzero(np.isin(rows[stay], chosen)), chosen)] = average
            weights = torch.from_numpy(matrix.astype(np.float32))
        positions = positions[:, stay]
        if plan.position == "compact":
            positions = _compact(positions, stay, chosen)
        found.append(LiveCut(cut.layer, torch.from_numpy(rows[stay]), weights, torch.from_numpy(positions) if plan.position == "compact" else None))
        is_visual, entering = is_visual[stay], after
    return found


def place(unpruned: NDArray[np.int64], ids: Sequence[int], kept: NDArray[np.int64], image_id: int, session: Session,
          answer: int) -> NDArray[np.int64]:
    """Positions [axes, rows] of a one-image prompt and its answer under the plan's policy, from HF's own of the unpruned prompt."""
    image = np.flatnonzero(np.array(ids) == image_id)
    mine = np.ones(len(ids), bool)
    mine[image] = np.isin(np.arange(len(image)), kept)
    found, after = unpruned[:, mine], int(unpruned.max()) + 1
    if session.plan.position == "compact":
        found = _compact(found, mine, image)
        after = int(found.max()) + 1
    return np.concatenate([found, np.tile(np.arange(after, after + answer), (len(found), 1))], 1).astype(np.int64)


def _compact(found: NDArray[np.int64], mine: NDArray[np.bool_], image: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions [axes, rows] of a one-image prompt's rows with the places that no row is at any more closed up: on one axis all of them,
    in M-RoPE the picture's rows and columns.

    Args:
        found: of the rows that are left; mine: which those are of all.
        image: the picture's rows among all.
    """
    if len(found) == 1:
        return np.arange(found.shape[1])[None] + int(found.min())
    start, count = int(image[0]), int(mine[image].sum())
    first, picture, rest = found[:, :start], found[:, start:start + count], found.shape[1] - start - count
    anew = np.stack([np.searchsorted(np.unique(axis), axis) for axis in picture]) + start
    after = int(anew.max()) + 1
    return np.concatenate([first, anew, np.tile(np.arange(after, after + rest), (3, 1))], 1)


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
