"""A plan's graphs with what each rule saw and did as results: what a method's numpy rule is then fed."""
from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgecomp.budget import Reduction, places_of
from edgecomp.compress import Cut
from edgecomp.dialects import lowering
from edgecomp.ir.graphs import load, save
from edgecomp.methods import reference as rules
from edgecomp.methods.base import Averaging, Merging
from edgecomp.passes.decoder import in_decoder
from edgecomp.passes.encoder import in_encoder
from edgecomp.passes.splice import at_projector
from edgecomp_runtime.bundle import Bundle


@dataclass(frozen=True)
class Seen:
    """What one step of a plan saw of each picture, [pictures, N, D] and signals likewise, and the order of choice [pictures, K] where it is whole."""
    features: np.ndarray
    signals: list[np.ndarray]
    order: np.ndarray | None


class Exposed:
    """Runs exposed graphs of a bundle. They lie in a folder of their own, beside a link to the bundle's weights."""

    def __init__(self, bundle: Bundle, folder: Path):
        self.bundle, self.folder = bundle, folder
        os.link(bundle.file("graphs/weights.bin"), folder / "weights.bin")

    def vision(self, cuts: Sequence[Cut], pixels: np.ndarray) -> list[Seen]:
        """Each of the steps in the vision graph, with those before it in place."""
        found = []
        for last, cut in enumerate(cuts):
            model = load(self.bundle.file("graphs/vision.onnx"))
            for number, one in enumerate(cuts[:last + 1]):
                if one.kind == "encoder":
                    in_encoder(model, self.bundle.manifest.vision, one.layer, one.step, expose=number == last)
                else:
                    at_projector(model, self.bundle.manifest.vision, one.step, expose=number == last)
            found.append(self._run(model, {"pixels": pixels}, [(cut, "")])[0])
        return found

    def decoder(self, cuts: Sequence[Cut], feeds: dict[str, np.ndarray], *, compact: bool = False) -> list[Seen]:
        """Each of the cuts in the decoder's graph, for a prefill by role."""
        model = load(self.bundle.file("graphs/decoder.onnx"))
        for cut in cuts:
            in_decoder(model, self.bundle.manifest.decoder, cut.layer, cut.step, compact=compact, expose=True)
        return self._run(model, {**feeds, **ends(feeds)}, [(cut, f".{cut.layer}") for cut in cuts])

    def _run(self, model: ir.Model, feeds: dict[str, np.ndarray], cuts: Sequence[tuple[Cut, str]]) -> list[Seen]:
        """The graph as far as these steps, each with its results' suffix. Caches are as long as the window, and empty."""
        lowering("onnxruntime")(model)
        seen = [(f"features{end}", [f"{name}{end}" for name in cut.stage.method.signals(cut.kind)], f"order{end}") for cut, end in cuts]
        wanted = {name for features, signals, order in seen for name in (features, *signals, order)}
        model.graph.outputs[:] = [value for value in model.graph.outputs if value.name in wanted]
        RemoveUnusedNodesPass()(model)
        read = {value for node in ir.traversal.RecursiveGraphIterator(model.graph) for value in node.inputs}
        model.graph.inputs[:] = [value for value in model.graph.inputs if value in read]
        path = self.folder / "exposed.onnx"
        save(model, path)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session, given = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]), {}
        for value in session.get_inputs():
            if value.name.startswith("cache_"):
                shape = [1, value.shape[1], self.bundle.manifest.decoder.context, value.shape[3]]
                given[value.name] = np.zeros(shape, np.float16 if "16" in value.type else np.float32)
            else:
                given[value.name] = feeds[value.name]
        out = dict(zip((value.name for value in session.get_outputs()), session.run(None, given)))
        return [Seen(out[features], [out[name] for name in signals], out.get(order)) for features, signals, order in seen]


def ends(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What onnxruntime's attention takes for a prefill: where the new rows end in each cache, and their numbers."""
    counts = {"": feeds["embeddings"].shape[1], **{f".{name.split('.')[1]}": len(feeds[name]) for name in feeds if name.startswith("row_map.")}}
    found: dict[str, np.ndarray] = {}
    for layer, rows in counts.items():
        found |= {f"last_row{layer}": np.array([rows - 1], np.int32), f"total_rows{layer}": np.array(rows, np.int32),
                  f"row_numbers{layer}": np.arange(rows)[None]}
    return found


def by_rule(cut: Cut, seen: Seen, picture: int) -> tuple[np.ndarray, np.ndarray]:
    """What the method's numpy rule makes of one picture, tile by tile and window by window: weights [K, N] and places [K], ascending."""
    step, method, features = cut.step, cut.stage.method, seen.features[picture].astype(np.float64)
    if step.nothing:
        return np.eye(step.tokens.count), np.arange(step.tokens.count)
    weights, places = [], []
    for part in step.parts:
        at = places_of(part.tile)
        mine = [_of_part(name, signal[picture].astype(np.float64), at) for name, signal in zip(method.signals(cut.kind), seen.signals)]
        if isinstance(method, Merging):
            matrix, kept = method.matrix(part.place, features[at], *mine)
        else:
            kept = np.sort(rules.select(method.rule(part.place, features[at], *mine)))  # type: ignore[attr-defined]
            matrix = np.eye(len(at))[kept]
        whole = np.zeros((len(kept), step.tokens.count))
        whole[:, at] = matrix
        weights.append(whole)
        places.append(at[kept])
    order = np.argsort(np.concatenate(places), kind="stable")
    return np.concatenate(weights)[order], np.concatenate(places)[order]


def _of_part(name: str, signal: np.ndarray, at: np.ndarray) -> np.ndarray:
    """A signal of a picture's part: those of the prompt are the same for all, but for attention to the picture's tokens."""
    return signal[:, at] if name == "text_attention" else signal if name.startswith("text_") else signal[at]


def follows(step: Reduction) -> bool:
    """Whether deepstack features are averaged as the tokens are."""
    return isinstance(step.method, Averaging) and not step.nothing
