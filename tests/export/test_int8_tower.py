"""Vision towers in int8 against torch, whose inputs and weights of every linear layer are rounded by plain arithmetic."""
from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny
import torch

from edgecomp import methods
from edgecomp.compress import Recipe, compress
from edgecomp.ir.graphs import load
from edgecomp.ir.rewrite import inputs, made_by, nodes
from edgecomp.lowering import lowered
from edgecomp.quantize import calibrate
from edgecomp.quantize.activations import entering
from edgecomp.quantize.apply import quantize
from edgecomp.quantize.subset import Calibration
from edgecomp.writer import copy_files, writing
from edgecomp_export.layerwise import pictures, verify_layers
from edgecomp_export.reference import Reference
from edgecomp_runtime import Bundle, Session, images
from edgecomp_runtime.backends import onnxruntime as backend
from edgecomp_runtime.errors import EdgecompError

SCENES = Path(__file__).parents[2] / "examples" / "scenes" / "images"
COUNT = 3  # pictures to calibrate on
Compiled = Callable[..., tuple[Path, Path]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures."""
    (tmp_path / "pictures").mkdir()
    for n in range(6):
        (tmp_path / "pictures" / f"scene-{n:02d}.jpg").symlink_to(SCENES / f"scene-{n:02d}.jpg")
    return tmp_path / "pictures"


def linears(model: Any, names: set[str]) -> Iterator[tuple[str, torch.nn.Linear]]:
    """The linear layers with the named weights."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" in names:
            yield f"{name}.weight", module


def scales_of(model: ir.Model) -> dict[str, float]:
    """The scale of what enters each product in int8, by the weight's name."""
    found = {}
    for product in nodes(model, "MatMul"):
        entering, weight = made_by(product.inputs[0], "DequantizeLinear"), made_by(product.inputs[1], "Transpose")
        if entering and weight:
            scale = inputs(entering)[1].const_value
            assert scale is not None
            found[str(inputs(made_by(inputs(weight)[0], "DequantizeLinear"))[0].name)] = float(scale.numpy())  # type: ignore[arg-type]
    return found


def rounded(values: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    return (values / scale).round().clamp(-127, 127) * scale


@contextmanager
def watched(model: Any, names: set[str], change: Callable[[str, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """What enters the named layers goes through `change` first."""
    hooks = [module.register_forward_pre_hook(lambda _, given, name=name: (change(name, given[0]),)) for name, module in linears(model, names)]
    yield
    for hook in hooks:
        hook.remove()


def chosen(bundle: Bundle, folder: Path) -> list[Path]:
    """The pictures whose hashes the manifest has."""
    assert bundle.manifest.calibrated is not None
    return [path for path in sorted(folder.iterdir()) if hashlib.sha256(path.read_bytes()).hexdigest() in bundle.manifest.calibrated.images]


def squared_error(values: np.ndarray, step: float) -> float:
    return float(np.square(np.clip(np.rint(values / step), -127, 127) * step - values).sum())


def assert_ranges(model: Any, scales: dict[str, float], pixels: list[torch.Tensor], reference: Reference,
                  taken: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, rows: rows) -> None:
    """The scales round what torch's own layers are given, on all pictures together, about as well as the best that are tried."""
    seen: dict[str, list[np.ndarray]] = {name: [] for name in scales}

    def note(name: str, values: torch.Tensor) -> torch.Tensor:
        seen[name].append(taken(name, values).double().numpy().reshape(-1))
        return values
    with watched(model, set(scales), note):
        for picture in pixels:
            reference.features(picture)
    for name, parts in seen.items():
        values = np.concatenate(parts)
        largest = np.abs(values).max()
        tried = min(squared_error(values, largest * share / 127) for share in np.linspace(0.1, 1.02, 93))
        assert squared_error(values, scales[name]) <= 1.2 * tried, name  # of few numbers, some step fits by chance


@pytest.mark.parametrize("variant", ["gqa-tied", "siglip-full"])
def test_the_tower_says_what_torch_says_with_rounded_products(compiled: Compiled, tmp_path: Path, folder: Path, variant: str,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Both as onnxruntime computes it on CPUs with VNNI and as on those without."""
    checkpoint, neutral = compiled(tiny, variant)
    quantize(neutral, tmp_path / "bundle", None, calibration=Calibration(folder, COUNT))
    bundle, reference = Bundle.open(tmp_path / "bundle"), Reference(str(checkpoint))
    scales = scales_of(load(bundle.file(bundle.manifest.plans["full"].variants["neutral"]["vision"])))
    layers = [module for module in reference.model.modules() if isinstance(module, torch.nn.Linear)]
    assert 12 <= len(scales) < len(layers)
    calibrated = [reference.pixels(path) for path in chosen(bundle, folder)]
    assert len(calibrated) == COUNT
    assert_ranges(reference.model, scales, calibrated, reference)
    picture = SCENES / "scene-20.jpg"
    exact = reference.features(reference.pixels(picture))[0].numpy()
    with torch.no_grad():
        for _, module in linears(reference.model, set(scales)):
            step = (module.weight.abs().amax(1, keepdim=True) / 127).half().float()
            module.weight.copy_((module.weight / step).round().clamp(-128, 127) * step)
    with watched(reference.model, set(scales), lambda name, values: rounded(values, scales[name])):
        expected = reference.features(reference.pixels(picture))[0].numpy()
    error = float(np.abs(expected - exact).max())
    for exactly in (True, False):
        monkeypatch.setattr(backend, "sums_exactly", lambda exactly=exactly: exactly)
        found = Session(bundle, threads=1).visual_tokens(picture).tokens
        assert np.abs(found - expected.reshape(found.shape)).max() < 0.02 * error


def test_a_plan_cut_in_the_tower_is_calibrated_on_the_rows_that_are_left(compiled: Compiled, tmp_path: Path, folder: Path) -> None:
    """`stride` keeps the same patches of every picture, so that what enters the first layer behind it is some of the rows that torch has there."""
    checkpoint, neutral = compiled(tiny, "gqa-tied")
    compress(neutral, tmp_path / "plans", [Recipe.of(methods.make("stride"), "7", "encoder:2")])
    quantize(tmp_path / "plans", tmp_path / "bundle", None, calibration=Calibration(folder, COUNT))
    bundle, reference = Bundle.open(tmp_path / "bundle"), Reference(str(checkpoint))
    full, cut = (scales_of(load(bundle.file(plan.variants["neutral"]["vision"]))) for plan in bundle.manifest.plans.values())
    assert set(full) == set(cut)
    layer = {name: int(name.split("layers.")[1].split(".")[0]) if "layers." in name else 9 for name in full}
    assert all(full[name] == cut[name] for name in full if layer[name] < 2)
    assert sum(full[name] != cut[name] for name in full if layer[name] >= 2) >= 3
    kept = Session(bundle, plan="stride-7-encoder2").visual_tokens(SCENES / "scene-00.jpg").kept
    rows = [0, *(1 + kept)]
    first = {name: scale for name, scale in cut.items() if layer[name] == 2 and "k_proj" in name}
    calibrated = [reference.pixels(path) for path in chosen(bundle, folder)]
    assert_ranges(reference.model, first, calibrated, reference, lambda name, values: values[:, rows])


def test_what_a_plan_is_made_of_does_not_depend_on_the_order(compiled: Compiled, tmp_path: Path, folder: Path) -> None:
    """A cut behind the tower may be made before or after; one inside it is refused, for it would not have been measured."""
    _, neutral = compiled(tiny, "gqa-tied")
    recipes, calibration = [Recipe.of(methods.make("cls"), "7")], Calibration(folder, COUNT, "cover")
    compress(neutral, tmp_path / "c", recipes)
    quantize(tmp_path / "c", tmp_path / "cq", None, calibration=calibration)
    quantize(neutral, tmp_path / "q", None, calibration=calibration)
    compress(tmp_path / "q", tmp_path / "qc", recipes)
    one, other = Bundle.open(tmp_path / "cq"), Bundle.open(tmp_path / "qc")
    assert one.manifest.calibrated == other.manifest.calibrated
    mine, theirs = (Session(bundle, plan="cls-7", threads=1).visual_tokens(SCENES / "scene-20.jpg") for bundle in (one, other))
    np.testing.assert_array_equal(mine.kept, theirs.kept)
    np.testing.assert_array_equal(mine.tokens, theirs.tokens)
    with pytest.raises(EdgecompError, match=r"^the vision tower of .*q is in int8, measured without a cut inside it: compress the bundle that "):
        compress(tmp_path / "q", tmp_path / "no", [Recipe.of(methods.make("stride"), "7", "encoder:2")])
    with pytest.raises(EdgecompError, match=r"q has activations in int8 already: quantize the bundle that it was made from"):
        quantize(tmp_path / "q", tmp_path / "no", "int8", block=16)


@pytest.mark.parametrize("choice", ["random", "cover"])
def test_products_that_stay_are_not_measured(compiled: Compiled, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, choice: str) -> None:
    """Nor have they a say in which pictures are taken; the others' scales are what they were."""
    _, neutral = compiled(tiny, "gqa-tied")
    file = Bundle.open(neutral).manifest.plans["full"].variants["neutral"]["vision"]
    measured, covered, scales = list[int](), list[int](), []
    monkeypatch.setattr(calibrate, "histogram", lambda values, real=calibrate.histogram: measured.append(values.size) or real(values))
    monkeypatch.setattr(calibrate, "cover", lambda rows, count: covered.append(len(rows)) or [*range(count)])
    for name, stays in (("all", []), ("some", ["model.multi_modal_projector.*"])):
        quantize(neutral, tmp_path / name, None, calibration=Calibration(folder, COUNT, choice), unquantized=stays)
        scales.append(scales_of(load(tmp_path / name / file)))
    every, some = scales
    assert 0 < len(some) == len(every) - 2 and some == {name: every[name] for name in some}
    values = {name: len({value.name for value in entering(load(neutral / file), of)}) for name, of in (("all", every), ("some", some))}
    assert values["some"] == values["all"] - 2 and len(measured) == COUNT * sum(values.values())
    assert covered == ([*values.values()] if choice == "cover" else [])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_backend_is_given_the_same(compiled: Compiled, tmp_path: Path, folder: Path, precision: str) -> None:
    """The graph for onnxruntime has products of whole numbers alone; TensorRT's pairs mean the same, and 8.6 is not given weights in int8."""
    _, neutral = compiled(tiny, "gqa-tied", precision=precision)
    quantize(neutral, tmp_path / "bundle", None, calibration=Calibration(folder, COUNT), unquantized=["model.multi_modal_projector.*"])
    bundle = Bundle.open(tmp_path / "bundle")
    plan, graphs = bundle.manifest.plans["full"], dict(bundle.manifest.graphs)
    products = [node.op_type for node in load(bundle.file(plan.variants["onnxruntime"]["vision"])).graph if "MatMul" in node.op_type]
    assert products.count("FusedMatMul") == 2 and products.count("MatMulIntegerToFloat") == len(products) - 2 == 18
    pixels = images.preprocess(images.load(SCENES / "scene-20.jpg"), bundle.manifest.image, "float32" if precision == "fp32" else "float16")[None]
    expected = Session(bundle, threads=1).visual_tokens(SCENES / "scene-20.jpg").tokens.astype(np.float32)
    exact = Session(Bundle.open(neutral), threads=1).visual_tokens(SCENES / "scene-20.jpg").tokens.astype(np.float32)
    error = np.abs(expected - exact).max()
    assert 0 < error < 0.1 * np.abs(exact).max()
    plainly = ort.SessionOptions()  # onnxruntime 1.31 writes pairs of opset 24 anew for x86, and then cannot load what it wrote
    plainly.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    with writing(tmp_path / "both") as (partial, finish):
        copy_files(bundle, partial)
        for release in ("tensorrt-10.3", "tensorrt-rtx-1.7"):
            file = lowered(plan, release, graphs, partial)["vision"]
            found, = ort.InferenceSession(partial / file, plainly, providers=["CPUExecutionProvider"]).run(["visual_tokens"], {"pixels": pixels})
            limit = 0.02 * error if precision == "fp32" else 0.01 * np.abs(exact).max()
            assert np.abs(found[0].astype(np.float32) - expected).max() < limit, release
        with pytest.raises(EdgecompError, match=r"^tensorrt-8.6 does not take the vision graph of this plan: DequantizeLinear: .* is in int8, "):
            lowered(plan, "tensorrt-8.6", graphs, partial)
        finish(dataclasses.replace(bundle.manifest))


def test_verification_refuses_what_hugging_face_does_not_compute(compiled: Compiled, tmp_path: Path, folder: Path) -> None:
    _, neutral = compiled(tiny, "gqa-tied")
    quantize(neutral, tmp_path / "bundle", None, calibration=Calibration(folder, COUNT))
    bundle = Bundle.open(tmp_path / "bundle")
    with pytest.raises(EdgecompError, match=r"has the products of its vision tower in int8, and Hugging Face's model does not: verify the bundle "):
        verify_layers(bundle, pictures(bundle.manifest), "what is this?")
