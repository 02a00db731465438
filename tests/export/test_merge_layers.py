"""ToMe in every layer of a tower, against Hugging Face's own tower, its layers run one by one with the same rows merged by a plain loop."""
from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import tiny
import torch
from transformers import AutoModelForImageTextToText

from edgecomp import methods
from edgecomp.dialects import lowering
from edgecomp.ir.graphs import load, save
from edgecomp.ir.rewrite import DOMAIN, nodes
from edgecomp.methods.base import BudgetError
from edgecomp.methods.tome import ToMe
from edgecomp.passes.merge_layers import in_every_layer
from edgecomp_runtime import images
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.errors import EdgecompError

TOLERANCE = 1e-4  # absolute, of visual tokens about one in size
PICTURES = ("scene-03.jpg", "scene-17.jpg")
VARIANTS = {"clip-last-layer": "one-kv-head", "siglip": "siglip-full"}
TOME = methods.make("tome")
assert isinstance(TOME, ToMe)

Towers = Callable[[str], tuple[Path, Bundle]]


@pytest.fixture(scope="module")
def towers(checkpoint: Path, demo: Path, compiled: Callable[..., tuple[Path, Path]]) -> Towers:
    """A tower's checkpoint and bundle: "clip" is the demonstration model's, "siglip" has no CLS row."""
    def find(name: str) -> tuple[Path, Bundle]:
        folder, bundle = (checkpoint, demo) if name == "clip" else compiled(tiny, VARIANTS[name])
        return folder, Bundle.open(bundle)
    return find


def pixels_of(bundle: Bundle, scenes: Path) -> np.ndarray:
    """[pictures, 3, H, W]"""
    info = bundle.manifest.image
    return np.concatenate([images.preprocess(images.load(scenes / "images" / name), info).reshape(1, 3, *info.size) for name in PICTURES])


def run(bundle: Bundle, folder: Path, pixels: np.ndarray, first_layer: int, keep: int) -> dict[str, np.ndarray]:
    """The lowered graph with rows merged; `keys.LAYER` are what each layer merged by, [pictures, heads, rows, d]."""
    model = load(bundle.file("graphs/vision.onnx"))
    in_every_layer(model, bundle.manifest.vision, TOME, first_layer, keep)
    for node in nodes(model, "Attention", DOMAIN):
        key, layer = node.inputs[1], node.attributes["layer"].as_int()
        assert key is not None
        key.name = f"keys.{layer}"
        model.graph.outputs.append(key)
    lowering("onnxruntime")(model)
    shutil.copy(bundle.file("graphs/weights.bin"), folder / "weights.bin")
    save(model, folder / "vision.onnx")
    session = ort.InferenceSession(folder / "vision.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"pixels": pixels})
    for output, value in zip(session.get_outputs(), found):  # what the graph says of its shapes is so
        assert [len(pixels), *output.shape[1:]] == list(value.shape), output.name
    return dict(zip([o.name for o in session.get_outputs()], found))


class Oracle:
    """One picture through Hugging Face's tower in float64. A group of rows is (row, the patches it stands for); CLS is patch -1."""

    def __init__(self, checkpoint: Path, select_layer: int, cls: bool):
        self.model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float64, attn_implementation="eager")
        tower = self.model.model.vision_tower
        self.tower, self.select_layer, self.cls = getattr(tower, "vision_model", tower), select_layer, cls

    @torch.no_grad()
    def __call__(self, pixels: np.ndarray, keys: dict[int, np.ndarray], removed: list[int]) -> tuple[np.ndarray, list[int]]:
        """Visual tokens and their places; each layer's keys [H, rows, d] say what is alike, `removed` how many rows it merges away."""
        hidden = self.tower.embeddings(torch.from_numpy(pixels[None]).double())
        if hasattr(self.tower, "pre_layrnorm"):
            hidden = self.tower.pre_layrnorm(hidden)
        groups = [{n - self.cls} for n in range(hidden.shape[1])]
        for number, layer in enumerate(self.tower.encoder.layers[:self.select_layer + 1]):
            times = torch.tensor([len(group) for group in groups], dtype=torch.float64)
            hidden = hidden + layer.self_attn(hidden_states=layer.layer_norm1(hidden), attention_mask=times.log()[None, None, None])[0]
            if removed[number]:
                rows, groups = self.merge(hidden[0], groups, torch.from_numpy(keys[number]).double().mean(0), removed[number])
                hidden = rows[None]
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        tokens = self.model.model.multi_modal_projector(hidden[:, self.cls:])[0].numpy()
        places = [min(group) for group in groups[self.cls:]]
        rank = np.argsort(places)
        return tokens[rank], np.array(places)[rank].tolist()

    def merge(self, rows: torch.Tensor, groups: list[set[int]], metric: torch.Tensor, count: int) -> tuple[torch.Tensor, list[set[int]]]:
        alike = torch.nn.functional.cosine_similarity(metric[:, None], metric[None], dim=2).tolist()
        left, right = range(0, len(rows), 2), range(1, len(rows), 2)
        partner = {a: max(right, key=lambda b: alike[a][b]) for a in left}
        ranked = sorted((a for a in left if groups[a] != {-1}), key=lambda a: -alike[a][partner[a]])
        joining, staying = ranked[:count], [a for a in left if groups[a] == {-1}] + ranked[count:]
        together = [[a] for a in (sorted(staying) if self.cls else staying)] + [[b, *(a for a in joining if partner[a] == b)] for b in right]
        weight = [len(group) for group in groups]
        means = [sum(rows[i] * weight[i] for i in members) / sum(weight[i] for i in members) for members in together]
        return torch.stack(means), [set().union(*(groups[i] for i in members)) for members in together]  # type: ignore[arg-type]


# tower, first layer, tokens kept, rows merged away in each layer
CASES = [("clip", 0, 64, [64] * 8), ("clip", 2, 192, [0, 0, 64, 64, 64, 64, 64, 64]), ("clip", 7, 300, [0] * 7 + [276]), ("clip", 3, 576, [0] * 8),
         ("clip-last-layer", 0, 9, [6, 7, 7, 7]), ("clip-last-layer", 2, 10, [0, 0, 16, 10]), ("clip-last-layer", 1, 35, [0, 0, 0, 1]),
         ("siglip", 0, 5, [5, 5, 5, 5]), ("siglip", 1, 4, [0, 9, 8, 4]), ("siglip", 3, 13, [0, 0, 0, 12])]


@pytest.mark.parametrize(("name", "first_layer", "keep", "removed"), CASES)
def test_merged_towers_are_hugging_faces_with_those_rows_merged(towers: Towers, scenes: Path, tmp_path: Path, name: str, first_layer: int, keep: int,
                                                                removed: list[int]) -> None:
    checkpoint, bundle = towers(name)
    vision, pixels = bundle.manifest.vision, pixels_of(bundle, scenes)
    assert vision.has_cls == (name != "siglip") and vision.tokens - sum(removed) == keep
    out = run(bundle, tmp_path, pixels, first_layer, keep)
    oracle = Oracle(checkpoint, vision.select_layer, vision.has_cls)
    for picture in range(len(PICTURES)):
        tokens, places = oracle(pixels[picture], {layer: out[f"keys.{layer}"][picture] for layer in range(vision.select_layer + 1)}, removed)
        assert out["kept"][picture].tolist() == places
        np.testing.assert_allclose(out["visual_tokens"][picture], tokens, atol=TOLERANCE, rtol=0)


def test_attention_counts_a_merged_row_as_often_as_it_has_patches(towers: Towers, scenes: Path, tmp_path: Path) -> None:
    """The oracle above could not tell if sizes made no difference: without them in attention, tokens are others."""
    checkpoint, bundle = towers("clip")
    vision, pixels = bundle.manifest.vision, pixels_of(bundle, scenes)
    out = run(bundle, tmp_path, pixels, 0, 64)

    class Even(Oracle):
        def merge(self, rows: torch.Tensor, groups: list[set[int]], metric: torch.Tensor, count: int) -> tuple[torch.Tensor, list[set[int]]]:
            merged, found = super().merge(rows, groups, metric, count)
            return merged, [{min(group)} for group in found]

    tokens, _ = Even(checkpoint, vision.select_layer, True)(pixels[0], {layer: out[f"keys.{layer}"][0] for layer in range(8)}, [64] * 8)
    assert np.abs(out["visual_tokens"][0] - tokens).max() > 100 * TOLERANCE


def test_budgets_and_layers_that_cannot_be_are_refused(towers: Towers) -> None:
    _, bundle = towers("clip")
    with pytest.raises(BudgetError, match="2 layers leave at least 144 of 576, not 64"):
        in_every_layer(load(bundle.file("graphs/vision.onnx")), bundle.manifest.vision, TOME, 6, 64)
    with pytest.raises(EdgecompError, match="layers 0 to 7 before the projector; none is 8"):
        in_every_layer(load(bundle.file("graphs/vision.onnx")), bundle.manifest.vision, TOME, 8, 64)
