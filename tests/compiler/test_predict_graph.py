"""Work counted from graphs: a graph by hand, tiny bundles of six families against torch's own counter and against their configs; memory's laws."""
from __future__ import annotations

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
from edgecomp.footprint import cache_bytes
from edgecomp.ir.graphs import load
from edgecomp.ir.rewrite import dims
from edgecomp.predict import efficiency
from edgecomp.predict.bundles import of_bundle
from edgecomp.predict.fits import judge
from edgecomp.predict.graph import count, counted
from edgecomp.predict.liveness import planned_bytes
from edgecomp.predict.memory import memory_of
from edgecomp.predict.model import Shape
from edgecomp.predict.parts import on_a_cpu, parts_of
from edgecomp.predict.planner import Made, Step, most_bytes
from edgecomp.predict.predict import predict
from edgecomp.predict.request import Request
from edgecomp.predict.resolve import Run, resolved, run_of
from edgecomp.predict.work import Work, work
from edgecomp.quantize.apply import quantize
from edgecomp_export.families.base import Geometry
from edgecomp_export.reference import Reference
from edgecomp_runtime import Bundle
from edgecomp_runtime.errors import EdgecompError, UnknownNameError

sys.path.insert(0, str(Path(__file__).parents[1] / "export"))
import tiny
import tiny_anyres
import tiny_gemma
import tiny_qwen
import tiny_tiled

# family: the maker of a tiny checkpoint, its variant, and what is chosen of pictures
FAMILIES: dict[str, tuple[ModuleType, str, dict[str, Any]]] = {
    "llava": (tiny, "one-kv-head", {}),
    "qwen2_5_vl": (tiny_qwen, "qwen2.5-ragged", {"image_size": (112, 224)}),
    "qwen3_vl": (tiny_qwen, "qwen3-wide-heads", {"image_size": (64, 160)}),
    "smolvlm": (tiny_tiled, "smolvlm", vars(tiny_tiled.VARIANTS["smolvlm"].geometry)),
    "internvl": (tiny_tiled, "internvl-1x2", vars(tiny_tiled.VARIANTS["internvl-1x2"].geometry)),
    "llava_onevision": (tiny_anyres, "ov-mha", {"tiles": 0}),  # features of two layers of the tower
}
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


def test_a_buffer_that_is_taken_over_lives_on() -> None:
    """`a` is read no more when `wide` and `more` are there, but its buffer is kept for `again`: 10 + 100 + 50, not 150."""
    def step(name: str, kind: str, size: float, *reads: str, **how: Any) -> Step:
        return Step((Made(name, kind, size),), reads, **how)

    steps = [step("a", "x", 10, "in"), step("wide", "y", 100, "a"), step("more", "z", 50, "wide"), step("again", "x", 10, "more"),
             step("out", "x", 10, "again")]
    assert most_bytes(steps) == 160
    assert most_bytes(steps[:3]) == 110  # nothing reads `more` then
    assert most_bytes([*steps[:3], step("other", "w", 10, "more"), step("out", "w", 10, "other")]) == 150
    assert most_bytes([step("a", "x", 8, "in"), step("b", "x", 8, "a", over=("a",)), step("c", "x", 8, "b", view=True), step("d", "x", 8, "c")]) == 8
    assert most_bytes([step("a", "x", 8, "in"), step("b", "x", 8, "a", copied=5.0), step("c", "x", 8, "b")]) == 16 + 5


@pytest.fixture(params=FAMILIES)
def made(request: pytest.FixtureRequest, compiled: Callable[..., tuple[Path, Path]]) -> tuple[Path, Bundle, dict[str, Any]]:
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
        assert (said.cache_read_bytes, said.cache_write_bytes, said.layers) == (counts.cache_read_bytes, counts.cache_write_bytes, counts.layers)
        assert said.weight_bytes == pytest.approx(counts.weight_bytes, rel=0.02), phase


def test_six_families_take_the_memory_that_their_configs_say(made: tuple[Path, Bundle, dict[str, Any]]) -> None:
    """Weights, cache, tower and activations of a config against the lowered graphs': their constants, and their values by liveness."""
    folder, bundle, _ = made
    manifest, info = bundle.manifest, bundle.manifest.plans["full"]
    graphs = {part: load(bundle.file(info.variants["onnxruntime"][part])) for part in ("vision", "prefill")}
    held = {part: sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value is not None)
            for part, graph in graphs.items()}
    table, head = manifest.embeddings, next(v for v in graphs["prefill"].graph.initializers.values() if dims(v) == manifest.embeddings.shape)
    assert isinstance(head.const_value, ir.ExternalTensor)
    apart = 0 if head.const_value.offset == table.offset else head.const_value.nbytes  # a tied head is the table itself
    taken = {part: planned_bytes(resolved(graph, run_of(manifest, info, part, text_rows=TEXT_ROWS))) for part, graph in graphs.items()}
    counted_parts = {"weights": held["prefill"] + apart, "cache": cache_bytes(manifest, info), "vision tower": held["vision"],
                     "prefill activations": taken["prefill"], "vision activations": taken["vision"]}
    tokens = sum(tile.tokens for tile in manifest.vision.tiles)
    request = Request(TEXT_ROWS + manifest.vision.tokens, manifest.decoder.context, tokens)
    said = parts_of(Shape.of_config(json.loads((folder / "config.json").read_text())), request, "fp32", "onnxruntime")
    assert sum(said.values()) == pytest.approx(sum(counted_parts.values()), rel=0.02)
    for part, size in counted_parts.items():
        assert said[part] == pytest.approx(size, rel=0.05 if part.endswith("activations") else 0.02), part


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantized_weights_are_counted_as_they_are_stored(bits: str, compiled: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    """Numbers and scales of the neutral graph, of a bundle whose config says the same; the tower stays in the bundle's precision."""
    folder, source = compiled(tiny, "gqa-tied")
    quantize(source, tmp_path / "bundle", bits)
    bundle = Bundle.open(tmp_path / "bundle")
    neutral = load(bundle.file(bundle.manifest.plans["full"].variants["neutral"]["decode"]))
    stored = sum(value.const_value.nbytes for value in neutral.graph.initializers.values() if value.const_value is not None)
    vision, rows = bundle.manifest.vision.tokens, TEXT_ROWS + bundle.manifest.vision.tokens
    shape, weights = Shape.of_config(json.loads((folder / "config.json").read_text())), efficiency.counted_as(devices.load("cpu-x86-8-cores"), bits)
    said = work(shape, "decode", context=rows, visual_tokens=vision, weights=weights)
    for dialect in ("neutral", "onnxruntime"):
        found = counted(bundle, "full", "decode", text_rows=TEXT_ROWS, context=rows, dialect=dialect)
        assert found.weight_bytes == pytest.approx(stored, rel=0.02), dialect
    assert said.weight_bytes == pytest.approx(stored, rel=0.03)  # without norms, 2.2 % of so small a model
    assert (said.flops.keys(), said.cache_read_bytes) == (found.flops.keys(), found.cache_read_bytes)
    held = memory_of(bundle, "full", text_rows=TEXT_ROWS)["weights"]
    assert on_a_cpu(shape, Request(rows, rows, vision), weights)["weights"] == pytest.approx(held, rel=0.02)
    assert [efficiency.format_of(phase, "onnxruntime", bundle.manifest) for phase in ("vision", "decode")] == ["fp32", bits]


def test_windows_and_masks_are_resolved_to_their_sizes(compiled: Callable[..., tuple[Path, Path]]) -> None:
    """Qwen2.5-VL's attention in windows of several sizes, and Gemma 3's masks over a cache whose length the host gives."""
    for maker, variant, choices in ((tiny_qwen, "qwen2.5-ragged", {"image_size": (168, 252)}), (tiny_gemma, "gemma3", {})):
        bundle = Bundle.open(compiled(maker, variant, **choices)[1])
        parts = memory_of(bundle, "full", text_rows=TEXT_ROWS)
        assert all(size > 0 for size in parts.values()), variant
        for phase in ("prefill", "decode"):
            assert flops_of(counted(bundle, "full", phase, text_rows=TEXT_ROWS, context=60)) > 0


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


def test_a_bundle_on_a_cpu(compiled: Callable[..., tuple[Path, Path]]) -> None:
    _, bundle = compiled(tiny, "gqa-tied")
    asked = ["predict", str(bundle), "--device", "cpu-x86-8-cores", "--prompt-tokens", "60"]
    found = json.loads(CliRunner().invoke(main, [*asked, "--json"]).output)
    opened = Bundle.open(bundle)
    parts = memory_of(opened, "full", text_rows=60 - opened.manifest.vision.tokens)
    assert found["memory_parts"] == parts and found["memory_bytes"]["value"] == sum(parts.values())
    assert (found["engine"], found["weights"], found["verdict"], found["kind"], found["way_out"]) == ("onnxruntime", "fp32", "fits", "predicted", "")
    for name in ("vision_ms", "prefill_ms", "tpot_ms"):
        assert 0 < found[name]["low"] < found[name]["value"] < found[name]["high"]
    said = CliRunner().invoke(main, asked).output
    assert "Fits: cpu-x86-8-cores has 31.46 GiB beside its system" in said and "80 MiB (predicted; " in said
    few = CliRunner().invoke(main, [*asked[:-1], "5"])
    assert few.exit_code == 1 and "--prompt-tokens 5 must hold the picture's" in few.stderr


def test_a_bundle_and_its_config_take_the_same_on_a_gpu(compiled: Callable[..., tuple[Path, Path]]) -> None:
    folder, bundle = compiled(tiny, "gqa-tied", precision="fp16")
    opened, board = Bundle.open(bundle), devices.load("jetson-orin-nano-8gb")
    request = Request(60, opened.manifest.decoder.context, opened.manifest.vision.tokens)
    shape = Shape.of_config(json.loads((folder / "config.json").read_text()))
    alone, counts = predict(shape, board, request), of_bundle(opened, None, board, request)
    assert alone.engine == counts.engine == "TensorRT"
    for part in ("cache", "runtime", "vision activations"):
        assert alone.memory_parts[part] == pytest.approx(counts.memory_parts[part], rel=0.02), part
    assert alone.prefill_ms.value == pytest.approx(counts.prefill_ms.value, rel=0.02)
    assert alone.tpot_ms.value == pytest.approx(counts.tpot_ms.value, rel=0.02)


def test_what_does_not_fit_names_its_largest_part_and_a_way_out() -> None:
    board, gib = devices.load("jetson-orin-nano-8gb"), 2**30
    assert judge({"weights": 2 * gib, "cache": gib}, board).verdict == "fits"
    tight = judge({"weights": 4 * gib, "cache": 2 * gib}, board)
    assert (tight.verdict, tight.largest) == ("tight", "weights")
    assert tight.way_out == "weights 4.00 of 6.00 GiB; it fits where no desktop runs"
    most = judge({"weights": 4 * gib, "cache": 8 * gib}, board)
    assert most.verdict == "does not fit"
    assert most.way_out.startswith("5.10 GiB short, cache 8.00 of 12.00 GiB: a smaller --context")
    assert judge({"weights": 6 * gib, "cache": 5 * gib, "runtime": 5 * gib}, board).way_out.endswith("which alone is not enough")


@pytest.mark.parametrize(("low", "high", "verdict"), [(4, 5.1, "fits"), (4, 5.3, "tight"), (6.8, 9, "tight"), (7, 9, "does not fit")])
def test_a_verdict_looks_at_the_whole_interval(low: float, high: float, verdict: str) -> None:
    """Of 7.44 GiB an Orin Nano's system keeps 0.54, with a desktop 2.24 (its profile's notes)."""
    gib = 2**30
    found = judge({"weights": 4.5 * gib}, devices.load("jetson-orin-nano-8gb"), low * gib, high * gib)
    assert found.verdict == verdict
    assert (found.way_out == "") == (verdict == "fits")
