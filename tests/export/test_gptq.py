"""Checkpoints that GPTQ and AWQ quantized: bundles of the same numbers, which say what Hugging Face's model says with what those stand for."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import tiny_gptq
import torch
from click.testing import CliRunner
from conftest import TOLERANCE
from safetensors.torch import load_file, save_file
from test_llava import PICTURE, QUESTION, assert_same
from tiny_gptq import AWQ, LAYOUTS, V1, Layout, pack, weights, write

from edgecomp.cli import main
from edgecomp.compile import compile_model
from edgecomp.dialects import quantized as dialect
from edgecomp.ir.graphs import load, read
from edgecomp.ir.rewrite import inputs, nodes
from edgecomp.lowering import lowered
from edgecomp.quantize.apply import quantize
from edgecomp.writer import copy_files, writing
from edgecomp_export.layerwise import pictures, verify_layers
from edgecomp_export.prequantized import Prequantized
from edgecomp_export.verify import ROUNDED_INPUTS, reference_of, verify
from edgecomp_runtime import Bundle, Session
from edgecomp_runtime.backends.onnxruntime import OnnxRuntimeBackend
from edgecomp_runtime.errors import EdgecompError

Compiled = Callable[..., tuple[Path, Path]]
LAYER = "language_model.layers."
PLAIN = {f"{LAYER}{name}": torch.zeros(shape) for name, shape in tiny_gptq.SHAPES.items()}  # a checkpoint of which only these are looked at


def packed(layout: Layout, folder: Path) -> dict[str, torch.Tensor]:
    found = pack(layout, {**PLAIN})
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    return found


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_numbers_are_the_checkpoints_own(layout: Layout, tmp_path: Path) -> None:
    packed(layout, tmp_path)
    stored, middle = Prequantized(tmp_path, layout.config), 2**(layout.bits - 1)
    # 96 is of 3 groups of 32, and zeros of 4 bits go two a byte
    assert stored.block == (32 if layout.bits == 8 else 16)
    for name, weight in weights(layout).items():
        found = stored.read(f"{LAYER}{name}".removesuffix(".weight"))
        width, repeats = weight.numbers.shape[1], weight.numbers.shape[1] // weight.zeros.shape[1] // stored.block
        order = np.arange(width) if found.order is None else found.order
        assert (found.order is not None) == layout.act_order and sorted(order) == [*range(width)]
        np.testing.assert_array_equal(found.numbers.astype(int) + middle, weight.numbers[:, order])
        np.testing.assert_array_equal(np.repeat(weight.groups[order][::stored.block], stored.block), weight.groups[order])
        assert found.scales.dtype == np.float16 and (found.zeros is None) == layout.symmetric
        np.testing.assert_array_equal(found.scales, np.repeat(weight.scales.numpy(), repeats, 1))
        if found.zeros is not None:
            np.testing.assert_array_equal(found.zeros.astype(int) + middle, np.repeat(weight.zeros, repeats, 1))


def lower(source: Path, out: Path, name: str) -> Bundle:
    """The bundle with its graphs lowered anew."""
    bundle = Bundle.open(source)
    graphs, plan = {file: info for file, info in bundle.manifest.graphs.items() if "onnxruntime" not in file}, bundle.manifest.plans["full"]
    files = {file: info for file, info in bundle.manifest.files.items() if "onnxruntime" not in file}
    with writing(out) as (partial, finish):
        copy_files(bundle, partial, files)
        variants = {"neutral": plan.variants["neutral"], **{one: lowered(plan, one, graphs, partial) for one in {"onnxruntime", name}}}
        finish(dataclasses.replace(bundle.manifest, plans={"full": dataclasses.replace(plan, variants=variants)}, graphs=graphs, files=files))
    return Bundle.open(out)


def content(value: ir.Value) -> np.ndarray:
    """A constant's numbers as they are stored: scales are cast to fp32 where the graph is."""
    cast = value.producer()
    tensor = (inputs(cast)[0] if cast else value).const_value
    assert tensor is not None
    return np.asarray(read(tensor))


@pytest.mark.parametrize("variant", ["gptq by importance", "gptq_v2 with zeros in int8", "awq"])
def test_a_bundle_says_what_its_checkpoint_says(variant: str, compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, neutral = compiled(tiny_gptq, variant)
    rounding, layout = Bundle.open(neutral), LAYOUTS[variant]
    quantized, known = rounding.manifest.quantized, weights(layout)
    assert quantized and (quantized.precision, set(quantized.bits.values())) == (f"int{layout.bits}", {layout.bits})
    assert set(quantized.bits) == {f"model.language_model.layers.{name}" for name in known}
    decoder = load(rounding.file(rounding.manifest.plans["full"].variants["neutral"]["decode"]))
    for node in nodes(decoder, "DequantizeLinear"):
        numbers, scales, *zeros = map(content, inputs(node))
        assert numbers.dtype.itemsize == 1 and str(numbers.dtype) == f"int{layout.bits}" and scales.dtype == np.float16
        assert len(zeros) == (not layout.symmetric)
    monkeypatch.setattr(dialect, "ACCURACY_LEVEL", 0)  # products in fp32
    exact = Session(lower(neutral, tmp_path / "exact", "onnxruntime"))
    assert_same(folder / "plain", exact, PICTURE, QUESTION, "sdpa")
    assert all(check.good for check in verify_layers(rounding, pictures(rounding.manifest), QUESTION))
    compared, = verify(Session(rounding), reference_of(rounding), [(PICTURE, QUESTION)], most=4)
    assert 0 < compared.logits < ROUNDED_INPUTS
    with pytest.raises(EdgecompError, match=f"has weights in int{layout.bits} already: quantize the bundle that it was made from"):
        quantize(neutral, tmp_path / "again", "int8")


def test_in_fp16(compiled: Compiled) -> None:
    _, bundle = compiled(tiny_gptq, "awq", precision="fp16")
    mine = Bundle.open(bundle)
    assert all(check.good for check in verify_layers(mine, pictures(mine.manifest), QUESTION))


def test_tensorrt_takes_columns_in_another_order(compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime runs its graphs as they stand, by ONNX's own DequantizeLinear."""
    monkeypatch.setattr(dialect, "ACCURACY_LEVEL", 0)
    _, neutral = compiled(tiny_gptq, "gptq by importance")
    both, answer = lower(neutral, tmp_path / "both", "tensorrt-11.4"), [5, 9, 30, 7]
    expected = Session(both, threads=1).score(QUESTION, [PICTURE], answer)
    found = Session(both, backend=OnnxRuntimeBackend(1, "tensorrt-11.4")).score(QUESTION, [PICTURE], answer)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE["fp32 logits"])


def test_tensorrt_takes_no_zeros_but_0(compiled: Compiled, tmp_path: Path) -> None:
    _, neutral = compiled(tiny_gptq, "awq")
    with pytest.raises(EdgecompError) as error:
        lower(neutral, tmp_path / "out", "tensorrt-11.4")
    assert "has zeros other than 0, which tensorrt-11.4 does not take: compile a checkpoint that was quantized around zero (GPTQ with sym)" in str(
        error.value)


@pytest.mark.parametrize(("layout", "says"), [
    (Layout(bits=2, settings=V1), "mlp.down_proj of {} is in 2 bits: 4 and 8 are taken of gptq; give the checkpoint in bf16, fp16 or fp32 that it"),
    (Layout(group=8, settings=V1), "{} has groups of 8, which are not made of an even number a row of blocks of 16, 32, 64, 128, 256: give the"),
    (Layout(settings={"checkpoint_format": "marlin"}), "{} has its weights in gptq's layout 'marlin', of gptq or gptq_v2 they are taken: save the"),
    (Layout(settings={"is_marlin_format": True}), "{} has its weights in gptq's layout 'marlin', of gptq or gptq_v2 they are taken: save the"),
    (Layout("awq", settings={**AWQ, "version": "gemv"}), "{} has its weights in awq's layout 'gemv', of gemm they are taken: save the checkpoint"),
])
def test_what_is_no_matter_of_layout_is_refused(layout: Layout, says: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = tiny_gptq.tiny.make("mha-untied-biased", tmp_path / "model", checkpoint)
    plain: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        plain |= load_file(file)
        file.unlink()
    write(layout, pack(layout, plain), folder)
    result = CliRunner().invoke(main, ["compile", str(folder), "-o", str(tmp_path / "out")])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert says.format(folder) in result.stderr and len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_tensors_that_cannot_be_read(tmp_path: Path) -> None:
    layout, one = LAYOUTS["gptq with zeros"], f"{LAYER}0.self_attn.q_proj"
    whole = packed(layout, tmp_path)

    def refused(**changed: torch.Tensor | None) -> str:
        parts = {**whole, **{f"{one}.{part}": tensor for part, tensor in changed.items()}}
        save_file({key: tensor for key, tensor in parts.items() if tensor is not None}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(EdgecompError) as error:
            Prequantized(tmp_path, layout.config).read(one)
        assert len(str(error.value).splitlines()) == 1
        return str(error.value)
    zeros, group = whole[f"{one}.qzeros"], whole[f"{one}.g_idx"]
    assert f"{tmp_path} has no {one}.scales, without which {one}." in refused(scales=None)
    assert f"{one}.g_idx of {tmp_path} makes groups of different sizes, which blocks cannot be" in refused(g_idx=torch.where(group == 1, 0, group))
    said = refused(qzeros=torch.full_like(zeros, -1))
    assert f"{one}.qzeros of {tmp_path} has 15, for which some programs read a zero of 0 and others of 16" in said
    said = refused(qzeros=zeros[:1].contiguous())
    assert f"{one} of {tmp_path} is 64 wide, with scales [2, 64] and qzeros [1, 8], which do not fit together" in said
    assert f"{one}.qweight of {tmp_path} is in words of int64, of int32 they are taken" in refused(qweight=whole[f"{one}.qweight"].long())
    assert f"{one} of {tmp_path} has tensors of the shapes" in refused(qweight=whole[f"{one}.qweight"].reshape(-1))
    scales = whole[f"{one}.scales"].float()
    assert refused(scales=scales + 1e-7).startswith(f"{one}.scales of {tmp_path} are in float32, and not all are numbers that fp16")
    save_file({**whole, f"{one}.scales": scales}, tmp_path / "model.safetensors", {"format": "pt"})
    assert np.array_equal(Prequantized(tmp_path, layout.config).read(one).scales[:, ::2], scales.T.numpy())


def test_weights_that_are_quantized_are_not_quantized_again(compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the checkpoint's config says, before anything is exported."""
    folder, _ = compiled(tiny_gptq, "awq")
    monkeypatch.setattr("edgecomp_export.export.export", lambda *args, **choices: pytest.fail("it is exported"))
    with pytest.raises(EdgecompError, match=f"^{folder} has its weights in int4 already: leave out --weights and --activations$"):
        compile_model(str(folder), tmp_path / "out", [], weights="int8")


def test_a_config_that_says_so_of_plain_weights(tmp_path: Path) -> None:
    save_file(PLAIN, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(EdgecompError, match="says gptq, but no weight is quantized: take quantization_config out of it"):
        Prequantized(tmp_path, LAYOUTS["gptq"].config)
