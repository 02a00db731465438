"""Work counted from graphs: a graph by hand, tiny bundles of six families against torch's own counter and against their configs; memory's laws."""
from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from edgecomp import devices, methods
from edgecomp.cli import main
from edgecomp.compress import Recipe, compress
from edgecomp.predict.fits import judge
from edgecomp.predict.graph import count, counted
from edgecomp.predict.liveness import planned_bytes
from edgecomp.predict.memory import memory_of
from edgecomp.predict.model import Shape
from edgecomp.predict.resolve import Run, resolved
from edgecomp.predict.work import Work, work
from edgecomp_export.families.base import Geometry
from edgecomp_export.reference import Reference
from edgecomp_runtime import Bundle
from edgecomp_runtime.errors import EdgecompError, UnknownNameError

sys.path.insert(0, str(Path(__file__).parents[1] / "export"))
import tiny
import tiny_anyres
import tiny_qwen
import tiny_tiled

# family: the maker of a tiny checkpoint, its variant, and what is chosen of pictures
FAMILIES: dict[str, tuple[ModuleType, str, dict[str, Any]]] = {
    "llava": (tiny, "one-kv-head-finer", {}),
    "qwen2_5_vl": (tiny_qwen, "qwen2.5-ragged", {"image_size": (112, 224)}),
    "qwen3_vl": (tiny_qwen, "qwen3-wide-heads", {"image_size": (64, 160)}),
    "smolvlm": (tiny_tiled, "smolvlm", vars(tiny_tiled.VARIANTS["smolvlm"].geometry)),
    "internvl": (tiny_tiled, "internvl-finer", vars(tiny_tiled.VARIANTS["internvl-1x2"].geometry)),
    "llava_onevision": (tiny_anyres, "ov-qwen2", {"tiles": 0}),
}
# so many patches that a tile's class row is less than a hundredth of them: configs are counted without it
FINER = dataclasses.replace(tiny_tiled.VARIANTS["internvl-1x2"], vision={"patch_size": 4})
FINER_CLIP = ("llama", {"num_key_value_heads": 1, "head_dim": 32}, "clip", {"image_size": 84, "patch_size": 7}, {"vision_feature_layer": -1})
TEXT_ROWS = 20
HAND = """<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
decoder (float[1,rows,8] x, float[1,2,capacity,4] cache_key, float[1,2,capacity,4] cache_value, int32[1] last, int32 total, bool some)
  => (float[1,rows,8] out, float[1,2,capacity,4] key_out, float[1,2,capacity,4] value_out)
  <float[8,8] w = {}, float[8,16] up = {}, float[16,8] down = {}> {
  q = com.microsoft.FusedMatMul <transB = 1> (x, w)
  a, key_out, value_out = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 2> (q, x, x, cache_key, cache_value, last, total)
  wide = If (some) <
    then_branch = seen () => (float[1,rows,16] m) { m = MatMul (a, up) },
    else_branch = unseen () => (float[1,rows,16] e) { f = Concat <axis = -1> (a, a) e = Identity (f) }
  >
  g = Relu (wide)
  out = MatMul (g, down)
}"""


def by_hand() -> ir.Model:
    """The graph of HAND with zeros for weights, and the types that onnxruntime's operators give."""
    text = HAND
    for name, size in (("w", 64), ("up", 128), ("down", 128)):
        text = text.replace(f" {name} = {{}}", f" {name} = {{{', '.join(['0.0'] * size)}}}")
    model = ir.from_onnx_text(text)
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
            node.outputs[0].shape, node.outputs[0].type = ir.Shape([1, "rows", 8]), ir.TensorType(ir.DataType.FLOAT)
    for value in model.graph.inputs[1:3]:
        value.name = f"{value.name}.0"  # its layer, as bundles name it; ONNX's text knows no dots
    return model


def test_a_graph_by_hand() -> None:
    run = Run({"rows": 3, "capacity": 10}, {0: 5}, pictures=True)
    found = count(resolved(by_hand(), run), run)
    products = 2 * 3 * (8 * 8 + 8 * 16 + 16 * 8)
    attention = 4 * 8 * (6 + 7 + 8)  # each new row sees those before it and itself
    assert found.flops == {"fp32": products + attention}
    assert found.weight_bytes == 4 * (8 * 8 + 8 * 16 + 16 * 8)
    assert (found.cache_read_bytes, found.cache_write_bytes, found.layers) == (5 * 2 * 8 * 4, 3 * 2 * 8 * 4, 1)
    assert found.activation_bytes == 4 * 3 * (8 + 8 + 8 + 16 + 16 + 8)  # x, q, a, wide, g, out


def test_the_branch_that_is_not_taken_costs_nothing() -> None:
    run = Run({"rows": 1, "capacity": 10}, {0: 5})
    assert count(resolved(by_hand(), run), run).weight_bytes == 4 * (8 * 8 + 16 * 8)


def test_a_size_that_is_not_given_is_named() -> None:
    with pytest.raises(EdgecompError, match="'capacity', whose size is not given; given are rows"):
        resolved(by_hand(), Run({"rows": 1}))


def test_buffers_are_taken_over_by_values_of_one_shape() -> None:
    text = """<ir_version: 10, opset_import: ["" : 23]> chain (float[4] x) => (float[4] y) {
      a = Exp (x) b = Exp (a) c = Exp (b) d = Exp (c) y = Exp (d) }"""
    assert planned_bytes(resolved(ir.from_onnx_text(text), Run({}))) == 2 * 16  # one is read while the other is written


@pytest.fixture(params=FAMILIES)
def made(request: pytest.FixtureRequest, compiled: Callable[..., tuple[Path, Path]],
         monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Bundle, dict[str, Any]]:
    monkeypatch.setitem(tiny_tiled.VARIANTS, "internvl-finer", FINER)
    monkeypatch.setitem(tiny.VARIANTS, "one-kv-head-finer", FINER_CLIP)
    maker, variant, choices = FAMILIES[request.param]
    folder, bundle = compiled(maker, variant, **choices)
    return folder, Bundle.open(bundle), choices


def flops_of(found: Work) -> float:
    return sum(found.flops.values())


def test_six_families_count_as_torch_counts_and_as_their_configs_say(made: tuple[Path, Bundle, dict[str, Any]]) -> None:
    folder, bundle, choices = made
    reference, decoder, vision = Reference(str(folder), "eager", Geometry(**choices)), bundle.manifest.decoder, bundle.manifest.vision
    plan = bundle.manifest.plans["full"]
    rows, layers, across = TEXT_ROWS + vision.tokens, decoder.layers, decoder.heads * decoder.head_dim
    found = {phase: counted(bundle, "full", phase, text_rows=TEXT_ROWS, context=rows) for phase in ("vision", "prefill", "decode")}
    for phase, same in found.items():
        neutral = counted(bundle, "full", phase, text_rows=TEXT_ROWS, context=rows, dialect="neutral")
        assert flops_of(neutral) == flops_of(same), phase  # lowering changes how, not what
    # torch, whose eager attention computes what a causal mask hides, too
    pixels = next(t for t in bundle.manifest.graphs[plan.variants["neutral"]["vision"]].inputs if t.role == "pixels")
    with FlopCounterMode(display=False) as tower:
        reference.features(torch.zeros([1, *(int(n) for n in pixels.shape[1:])]))
    with FlopCounterMode(display=False) as text, torch.no_grad():
        reference.family.text_model(reference.model)(inputs_embeds=torch.zeros(1, rows, decoder.hidden), use_cache=False)
    hidden_pairs = rows * rows - rows * (rows + 1) // 2
    head = 2 * decoder.hidden * bundle.manifest.embeddings.shape[0]
    assert flops_of(found["prefill"]) == pytest.approx(text.get_total_flops() - 4 * across * layers * hidden_pairs + head, rel=0.01)
    assert flops_of(found["vision"]) == pytest.approx(tower.get_total_flops(), rel=0.01)
    # the config alone
    shape = Shape.of_config(json.loads((folder / "config.json").read_text()))
    for phase, counts in found.items():
        tokens = sum(tile.tokens for tile in vision.tiles) if phase == "vision" else vision.tokens  # separators are not seen by a tower
        said = work(shape, phase, prompt_tokens=rows, context=rows, visual_tokens=tokens, weights="fp32")
        assert flops_of(said) == pytest.approx(flops_of(counts), rel=0.02), phase
        cache = 2 * said.cache_read_bytes, 2 * said.cache_write_bytes  # an fp16 cache there
        assert (*cache, said.layers) == (counts.cache_read_bytes, counts.cache_write_bytes, counts.layers)
        weights = said.weight_bytes * (2 if phase == "vision" else 1)  # a tower is fp16 there
        # tables of rotary positions are no parameters, and a tiny tower is small beside them
        assert weights == pytest.approx(counts.weight_bytes, rel=0.03 if phase == "vision" else 0.02), phase


def test_a_cut_lessens_what_lies_behind_it(compiled: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    _, neutral = compiled(tiny, "gqa-tied")
    compress(neutral, tmp_path / "bundle", [Recipe.of(methods.make("fastv"), "4", "decoder:1")])
    bundle = Bundle.open(tmp_path / "bundle")
    name = next(plan for plan in bundle.manifest.plans if plan != "full")
    full, cut = (counted(bundle, plan, "prefill", text_rows=TEXT_ROWS) for plan in ("full", name))
    gone, layers = bundle.manifest.vision.tokens - 4, bundle.manifest.decoder.layers
    per_row = full.cache_write_bytes / (TEXT_ROWS + bundle.manifest.vision.tokens) / layers
    assert full.cache_write_bytes - cut.cache_write_bytes == gone * (layers - 1) * per_row
    assert flops_of(cut) < flops_of(full)
    assert flops_of(counted(bundle, name, "selector", text_rows=TEXT_ROWS)) > 0
    assert flops_of(counted(bundle, "full", "selector", text_rows=TEXT_ROWS)) == 0
    with pytest.raises(UnknownNameError, match="decode"):
        counted(bundle, name, "decoding", text_rows=TEXT_ROWS)
    parts = {plan: memory_of(bundle, plan, text_rows=TEXT_ROWS) for plan in ("full", name)}
    assert parts[name]["cache"] <= parts["full"]["cache"]


def test_a_bundle_on_a_cpu_is_told_its_memory_alone(compiled: Callable[..., tuple[Path, Path]]) -> None:
    _, bundle = compiled(tiny, "gqa-tied")
    asked = ["predict", str(bundle), "--device", "cpu-x86-8-cores", "--prompt-tokens", "60"]
    found = json.loads(CliRunner().invoke(main, [*asked, "--json"]).output)
    opened = Bundle.open(bundle)
    parts = memory_of(opened, "full", text_rows=60 - opened.manifest.vision.tokens)
    assert found["memory_parts"] == parts and found["memory_bytes"]["value"] == sum(parts.values())
    assert (found["verdict"], found["kind"], found["way_out"]) == ("fits", "predicted", "") and "prefill_ms" not in found
    said = CliRunner().invoke(main, asked).output
    assert "times are not: no CPU was measured" in said and "Fits: cpu-x86-8-cores has 32.00 GiB in all" in said
    few = CliRunner().invoke(main, [*asked[:-1], "5"])
    assert few.exit_code == 1 and "--prompt-tokens 5 must hold the picture's" in few.stderr


def test_what_does_not_fit_names_its_largest_part_and_a_way_out() -> None:
    board, gib = devices.load("jetson-orin-nano-8gb"), 2**30
    assert judge({"weights": 2 * gib, "cache": gib}, board).verdict == "fits"
    tight = judge({"weights": 4 * gib, "cache": 2 * gib}, board)
    assert (tight.verdict, tight.largest) == ("tight", "weights")
    most = judge({"weights": 4 * gib, "cache": 8 * gib}, board)
    assert most.verdict == "does not fit"
    assert "cache 8.00 of 12.00 GiB: a smaller --context" in most.way_out
