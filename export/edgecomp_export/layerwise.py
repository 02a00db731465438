"""Verification one layer at a time: Hugging Face's and the bundle's on the same input, and Hugging Face's output carried on.

A model of which neither copy fits into memory twice is verified this way: Hugging Face's weights are filled in for the layer
that computes, the bundle's graph is cut at its marks and run piece by piece, both in fp32. The weights of an fp16 bundle are
judged as what they are, so Hugging Face's are rounded to fp16 first; quantized ones take the place of Hugging Face's.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from edgecomp import methods
from edgecomp.ir.graphs import load
from edgecomp.ir.rewrite import marks
from edgecomp.methods.base import Averaging, Merging
from edgecomp_export.captured import ANSWER, Captured
from edgecomp_export.dequantized import contents
from edgecomp_export.pieces import Piece, cut
from edgecomp_export.reference import Prompts
from edgecomp_export.verify import geometry_of, in_decoder, reduced
from edgecomp_runtime import images
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import Manifest
from edgecomp_runtime.rows import Layout, Rows, VisualTokens, embedded, lay_out
from edgecomp_runtime.text import Text

# Differences are relative to how far a layer moves its input. Measured: under 3e-6 in fp32; under 5e-4 in fp16, whose graph has its
# constants rounded to fp16 too, the vision tower's rotations among them.
TOLERANCE = {"fp32": 5e-5, "fp16": 2e-3}
PIXEL_TOLERANCE = 1e-5


class VerificationError(EdgecompError):
    """A bundle differs from the model that it was made from."""


@dataclass(frozen=True)
class Check:
    """One comparison: which graph, layer and tensor, and the difference by the measure that `tolerance` is of."""
    graph: str
    layer: int | None
    tensor: str
    difference: float
    tolerance: float

    @property
    def good(self) -> bool:
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        where = self.graph if self.layer is None else f"{self.graph} graph, layer {self.layer}"
        return f"{where}: {self.tensor} differs by {self.difference:.1e} (tolerance {self.tolerance:.0e})"


def verify_layers(bundle: Bundle, pictures: Sequence[Any], question: str, *, model: str | None = None,
                  tick: Callable[[Check], None] = lambda check: None) -> list[Check]:
    """Compares every part of a bundle with Hugging Face's: prompt, pixels, each layer of both graphs, logits; and that each plan's
    visual tokens are those of Hugging Face's that it keeps, or their averages.

    Args:
        bundle: the bundle.
        pictures: as `Session.generate` takes them; as many as the bundle takes in one prompt go into one prompt.
        question: about them.
        model: the checkpoint; the one that the bundle names where None.
        tick: told each comparison as it is made.

    Returns:
        The comparisons in the order of the computation: the first that is not good is where the two part.
    """
    checks: list[Check] = []

    def note(graph: str, layer: int | None, tensor: str, difference: float, tolerance: float = TOLERANCE[bundle.manifest.precision]) -> None:
        checks.append(Check(graph, layer, tensor, difference, tolerance))
        tick(checks[-1])
    manifest = bundle.manifest
    prompts = Prompts(model or manifest.source.model, geometry_of(manifest))
    layout = Layout.of(manifest.vision, manifest.decoder, manifest.plans["full"])
    asked = list(pictures[:manifest.vision.max_images])
    ids = _ids(bundle, question, len(asked))
    expected = prompts.ids(question, len(asked), [1] * len(layout.runs))
    note("prompt", None, "ids", float(ids != expected), 0.0)
    if ids != expected:
        return checks  # what follows would compare different rows
    pixels = np.stack([images.preprocess(images.load(picture), manifest.image) for picture in pictures])
    theirs = [prompts.pixels(picture) for picture in pictures]
    if known := [(mine, other[0].numpy()) for mine, other in zip(pixels, theirs) if other is not None]:
        note("pixels", None, "pixels", max(float(np.abs(a - b).max()) for a, b in known), PIXEL_TOLERANCE)
    hugging = Captured(prompts, manifest.precision, contents(bundle))
    features, stacked = hugging.vision(torch.from_numpy(pixels))
    _vision(bundle, pixels, hugging, features, stacked, note)
    _plans(bundle, hugging, features, stacked, note)
    rows, answer = _rows(bundle, ids, layout, features[:len(asked)], stacked), ids[-ANSWER:]
    every = rows.then(answer, _embed(bundle, answer))
    unpruned = prompts.ids(question, len(asked), [run.span for run in layout.runs])
    note("prompt", None, "positions", float(np.abs(rows.positions - hugging.positions(unpruned, len(asked))).max()), 0.0)
    note("prompt", None, "embeddings", relative(every.embeddings, hugging.embeddings(unpruned + answer, features[:len(asked)])))
    logits = hugging.decoder(every)
    _decoder(bundle, every, len(rows.sources), hugging, logits, note)
    return checks


def gate(bundle: Bundle, say: Callable[[str], None]) -> None:
    """`verify_layers` on two made-up pictures, for `compile`. Raises VerificationError naming where the two part."""
    last = time.monotonic()

    def tick(check: Check) -> None:
        nonlocal last
        if time.monotonic() - last > 10:
            last = time.monotonic()
            say(f"verified: {check}")
    checks = verify_layers(bundle, pictures(bundle.manifest), "Describe the image.", tick=tick)
    if bad := [check for check in checks if not check.good]:
        raise VerificationError(f"the bundle differs from Hugging Face's model at the {bad[0]}, and in {len(bad) - 1} of {len(checks) - 1} "
                                "comparisons behind that: nothing was written; --no-verify writes it all the same")
    say(f"verified against Hugging Face: {len(checks)} comparisons, the largest difference: {worst(checks)}")


def worst(checks: Sequence[Check]) -> Check:
    """The comparison that is nearest to, or furthest beyond, its tolerance."""
    return max(checks, key=lambda check: check.difference / max(check.tolerance, 1e-30))


def pictures(manifest: Manifest) -> list[NDArray[np.uint8]]:
    """Two made-up pictures of the shape that the bundle expects, the same ones on every machine: a gradient, and coarse noise."""
    height, width = manifest.source.image_size or manifest.image.canvas
    down, across = np.linspace(0, 255, height), np.linspace(0, 255, width)
    gradient = np.stack([np.add.outer(down, across) / 2, np.subtract.outer(down, across) / 2 + 128, np.tile(across, (height, 1))], -1)
    noise = np.random.default_rng(0).integers(0, 256, (-(-height // 40), -(-width // 40), 3), np.uint8).repeat(40, 0).repeat(40, 1)
    return [gradient.astype(np.uint8), np.ascontiguousarray(noise[:height, :width])]


def relative(mine: NDArray[Any], theirs: NDArray[Any], before: NDArray[Any] | None = None) -> float:
    """The largest difference, relative to the largest change from `before` (or from nothing), or a hundredth of the largest value."""
    if mine.shape != theirs.shape or not np.isfinite(mine).all():
        return float("inf")
    largest = float(np.abs(theirs).max())
    moved = largest if before is None or before.shape != theirs.shape else float(np.abs(theirs - before).max())
    return float(np.abs(mine.astype(np.float32) - theirs).max()) / max(moved, largest / 100, 1e-30)


Note = Callable[..., None]


def _vision(bundle: Bundle, pixels: NDArray[np.float32], hugging: Captured, features: NDArray[np.float32],
            stacked: list[NDArray[np.float32]], note: Note) -> None:
    model = load(bundle.file(bundle.manifest.plans["full"].variants["neutral"]["vision"]))
    starts = marks(model, "hidden")
    stops = {mark.outputs[0]: f"hidden.{layer}" for layer, mark in starts.items()}
    feeds = {"pixels": pixels, **{f"hidden.{layer}": hugging.hidden["vision"][layer] for layer in starts}}
    results = {"visual_tokens": features, **{f"deepstack.{n}": layer for n, layer in enumerate(stacked)}}
    ends: list[tuple[int, ir.Value, str, NDArray[np.float32]]] = [
        (layer - 1, _input(mark), f"hidden.{layer}", hugging.hidden["vision"][layer]) for layer, mark in starts.items()]
    ends += [(max(starts), value, str(value.name), results[str(value.name)]) for value in model.graph.outputs]
    for layer, value, name, expected in ends:
        found = Piece(cut(model, [value], [name], stops)).run(feeds)[name]
        before = feeds.get(f"hidden.{layer}") if name.startswith("hidden") else None
        note("vision", max(layer, 0), "the hidden state behind it" if name.startswith("hidden") and layer >= 0 else
             "the first hidden state" if layer < 0 else name, relative(found, expected, before))


def _plans(bundle: Bundle, hugging: Captured, features: NDArray[np.float32], stacked: list[NDArray[np.float32]], note: Note) -> None:
    manifest = bundle.manifest
    for name, plan in manifest.plans.items():
        before = [step for step in plan.steps if not in_decoder(step)]
        made = [methods.make(step.method, **step.parameters) for step in before]
        # what else there is cannot be told from features alone: `verify --whole` imposes it on Hugging Face's model
        if [step.site for step in before] != ["projector"] or (isinstance(made[0], Merging) and not isinstance(made[0], Averaging)):
            continue
        model = load(bundle.file(plan.variants["neutral"]["vision"]))
        stops = {mark.outputs[0]: f"hidden.{layer}" for layer, mark in marks(model, "hidden").items()}
        stops |= {mark.outputs[0]: "features" for mark in marks(model, "visual_tokens").values()}
        stops |= {mark.outputs[0]: f"features.{layer}" for layer, mark in marks(model, "deepstack").items()}
        feeds = {f"hidden.{n}": layer for n, layer in enumerate(hugging.hidden["vision"])}
        feeds |= {"features": features, **{f"features.{n}": layer for n, layer in enumerate(stacked)}}
        names = [str(value.name) for value in model.graph.outputs]
        found = Piece(cut(model, list(model.graph.outputs), names, stops)).run(feeds)
        for key, source in (("visual_tokens", features), *((f"deepstack.{n}", layer) for n, layer in enumerate(stacked))):
            expected = np.stack([reduced(manifest, plan, one, kept) for one, kept in zip(source, found["kept"])])
            note("vision", None, f"{key} of plan {name}", relative(found[key], expected))


def _decoder(bundle: Bundle, rows: Rows, prompt: int, hugging: Captured, logits: NDArray[np.float32], note: Note) -> None:
    model = load(bundle.file(bundle.manifest.plans["full"].variants["neutral"]["prefill"]))
    starts, count = marks(model, "hidden"), len(rows.sources)
    states = hugging.hidden["decoder"]
    outputs = {str(value.name): value for value in model.graph.outputs}
    for layer, mark in starts.items():
        last = layer == max(starts)
        name = "logits" if last else f"hidden.{layer + 1}"
        caches = [f"new_key.{layer}", f"new_value.{layer}"]
        ends = [outputs["logits"] if last else _input(starts[layer + 1]), *(outputs[cache] for cache in caches)]
        # GroupQueryAttention's lowering takes the number of rows from an input of this name
        piece = Piece(cut(model, ends, [name, *caches], {mark.outputs[0]: "embeddings"}), capacity=count)
        found = []
        for start, end in ((0, prompt), (prompt, count)):  # the second run reads the first one's cache
            wanted = np.arange(prompt - 1, prompt) if start == 0 else np.arange(end - start)
            feeds = rows.feeds(start, end, start, wanted, 0 if rows.deepstack is None else len(rows.deepstack))
            feeds |= {"last_row": np.array([end - 1], np.int32), "total_rows": np.array(end, np.int32),
                      "row_numbers": np.arange(end - start)[None], "embeddings": states[layer][:, start:end]}
            found.append(piece.run(feeds)[name][0])
        mine = np.concatenate(found)
        if last:
            note("decoder", layer, "logits", relative(mine, logits))
        else:
            note("decoder", layer, "the hidden state behind it", relative(mine[None], states[layer + 1], states[layer]))


def _input(mark: ir.Node) -> ir.Value:
    value = mark.inputs[0]
    assert value is not None
    return value


def _ids(bundle: Bundle, question: str, pictures: int) -> list[int]:
    """The prompt's ids as the runtime makes them, one image id a run."""
    info, vision = bundle.manifest.text, bundle.manifest.vision
    text = Text(info, bundle.file(info.tokenizer), bundle.read_text(info.chat_template) if info.chat_template else None)
    content = [*[{"type": "image"}] * pictures, {"type": "text", "text": question}]
    rendered = text.render([{"role": "user", "content": content}])
    found, ids = text.encode_prompt(rendered, vision.texts)
    if found != pictures:
        raise VerificationError(f"the chat template's output {rendered!r:.100} has {info.placeholder} {found} times for {pictures} pictures: "
                                "the checkpoint's template is not its model's")
    return ids


def _embed(bundle: Bundle, ids: Sequence[int]) -> NDArray[Any]:
    """The runtime's embeddings, widened."""
    return embedded(bundle.embeddings(), bundle.manifest.embeddings.scale, ids).astype(np.float32)


def _rows(bundle: Bundle, ids: list[int], layout: Layout, features: NDArray[np.float32], stacked: list[NDArray[np.float32]]) -> Rows:
    """The prompt's rows with Hugging Face's visual tokens."""
    pictures = [VisualTokens(str(n), tokens, np.arange(len(tokens)), np.stack([layer[n] for layer in stacked]) if stacked else None)
                for n, tokens in enumerate(features)]
    return lay_out(ids, bundle.manifest.text.image_id, pictures, partial(_embed, bundle), layout)
