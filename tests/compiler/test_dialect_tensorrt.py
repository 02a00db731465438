"""Lowering for TensorRT changes no numbers, and leaves nothing that the release has not.

No TensorRT runs here: onnxruntime runs the lowered graphs, against the `onnxruntime` dialect of the same neutral graph, whose numbers are
compared with Hugging Face's elsewhere. What TensorRT for RTX takes is tried where it is installed: its builder needs no GPU.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edgecomp import methods
from edgecomp.budget import Reduction, Tokens
from edgecomp.dialects import onnxruntime as portable
from edgecomp.dialects.plain_operators import PLAIN, write_in_opset, write_plainly
from edgecomp.dialects.targets import TARGETS, Target, refused
from edgecomp.dialects.tensorrt import capacity, lower
from edgecomp.ir.graphs import load, save
from edgecomp.ir.rewrite import DOMAIN, KEYS_BIAS, constant
from edgecomp.passes.decoder import in_decoder
from edgecomp.passes.merge_layers import in_every_layer
from edgecomp.passes.tape import Tape, typed
from edgecomp_runtime import images
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.cuts import Cuts
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import DecoderInfo, TileInfo

FLOAT, HALF, INT64 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT64
CLOSE = {FLOAT: 2e-5, HALF: 5e-3}  # absolute and relative
HEADS, WIDTH, WORDS = 4, 16, 11  # of the hand-made decoders
NEW, OLD = TARGETS["tensorrt-rtx-1.7"], TARGETS["tensorrt-10.3"]  # with all that there is, and with none of it
LIKE = {"tensorrt-8.6": ["tensorrt-8.6"], "tensorrt-10.3": ["tensorrt-10.3", "tensorrt-10.13"],
        "tensorrt-rtx-1.7": ["tensorrt-10.16", "tensorrt-11.4", "tensorrt-rtx-1.7"]}  # releases whose graphs are the same, under the one that is run
EVERY = pytest.mark.parametrize("target", [TARGETS[name] for name in LIKE], ids=LIKE)
TILE = TileInfo(0, 4, 4, 4)


# graphs

@dataclass(frozen=True)
class Layer:
    """What differs between decoder layers."""
    window: int = 0
    softcap: float = 0.0
    bounded: bool = True


@dataclass(frozen=True)
class Tiny:
    """A decoder as the exporter writes them, with random weights."""
    layers: tuple[Layer, ...] = (Layer(),) * 3
    kv_heads: int = 2
    segments: bool = False
    axes: int = 1
    dtype: ir.DataType = FLOAT

    @property
    def info(self) -> DecoderInfo:
        return DecoderInfo(len(self.layers), HEADS, self.kv_heads, WIDTH, HEADS * WIDTH, 64, self.axes, 0, "images" if self.segments else "")

    def model(self) -> ir.Model:
        graph = ir.Graph([], [], nodes=[], opset_imports={"": 23, DOMAIN: 1, "edgecomp.methods": 1}, name="tiny")
        model = ir.Model(graph, ir_version=10)
        tape, random, hidden = Tape(model), np.random.default_rng(0), HEADS * WIDTH

        def add(op_type: str, *given: ir.Value, shape: Sequence[Any], dtype: ir.DataType = self.dtype, domain: str = "",
                **attributes: Any) -> ir.Value:
            value = tape.add_many(op_type, 1, *given, domain=domain, **attributes)[0]
            value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
            return value

        def weight(*shape: int, around: float = 0.0) -> ir.Value:
            array = random.normal(around, 0.1, shape).astype(self.dtype.numpy())
            return constant(model, f"weight{len(graph.initializers)}", array)

        def product(x: ir.Value, width: int) -> ir.Value:
            turned = add("Transpose", weight(width, int(x.shape[-1])), shape=[x.shape[-1], width], perm=[1, 0])  # type: ignore[index, call-overload]
            return add("MatMul", x, turned, shape=[*list(x.shape)[:-1], width])  # type: ignore[arg-type]

        def norm(x: ir.Value) -> ir.Value:
            return add("RMSNormalization", x, weight(int(x.shape[-1]), around=1.0), shape=x.shape, axis=-1, epsilon=1e-5)  # type: ignore[index]

        def heads(x: ir.Value, count: int) -> ir.Value:
            split = add("Reshape", product(x, count * WIDTH), tape.ints([0, 0, count, WIDTH]), shape=["batch", "rows", count, WIDTH])
            return add("Transpose", split, shape=["batch", count, "rows", WIDTH], perm=[0, 2, 1, 3])

        state = tape.input("embeddings", self.dtype, ["batch", "rows", hidden])
        positions = tape.input("positions", INT64, ["batch", "rows"] if self.axes == 1 else [self.axes, "batch", "rows"])
        length, logit_rows = tape.input("length", INT64, [1]), tape.input("logit_rows", INT64, ["logit_rows"])
        segments = [tape.input("segments", INT64, ["batch", "rows"])] if self.segments else []
        places = add("Cast", positions, shape=positions.shape, dtype=FLOAT, to=FLOAT)
        if self.axes > 1:
            each = tape.add("Cast", tape.ints(np.arange(1, self.axes + 1).reshape(-1, 1, 1)), to=FLOAT)
            places = add("ReduceSum", add("Mul", places, each, shape=places.shape, dtype=FLOAT), tape.ints([0]), shape=["batch", "rows"], dtype=FLOAT,
                         keepdims=0)
        speed = tape.add("Mul", tape.add("Cast", tape.ints(np.arange(1, WIDTH // 2 + 1)), to=FLOAT), tape.number(0.07))
        angles = add("Mul", add("Unsqueeze", places, tape.ints([-1]), shape=["batch", "rows", 1], dtype=FLOAT), speed,
                     shape=["batch", "rows", WIDTH // 2], dtype=FLOAT)
        tables = [add("Cast", tape.add(kind, angles), shape=["batch", "rows", WIDTH // 2], to=self.dtype) for kind in ("Cos", "Sin")]
        outputs = []
        for number, layer in enumerate(self.layers):
            state = add("Mark", state, shape=["batch", "rows", hidden], domain=DOMAIN, signal="hidden", layer=number)
            normed = norm(state)
            query, key, value = heads(normed, HEADS), heads(normed, self.kv_heads), heads(normed, self.kv_heads)
            query, key = (add("RotaryEmbedding", x, *tables, shape=x.shape) for x in (query, key))
            outputs += [typed(x, f"new_{kind}.{number}", self.dtype, ["batch", self.kv_heads, "rows", WIDTH])
                        for kind, x in (("key", key), ("value", value))]
            past = [tape.input(f"cache_{kind}.{number}", self.dtype, ["batch", self.kv_heads, f"capacity{number}", WIDTH])
                    for kind in ("key", "value")]
            seen = add("Attention", query, key, value, *past, length, *segments, shape=query.shape, domain=DOMAIN, causal=1, layer=number,
                       scale=WIDTH**-0.5 * 1.5, window=layer.window, softcap=layer.softcap, **({"bounded": int(layer.bounded)} if segments else {}))
            rows = add("Transpose", seen, shape=["batch", "rows", HEADS, WIDTH], perm=[0, 2, 1, 3])
            flat = add("Reshape", rows, tape.ints([0, 0, hidden]), shape=["batch", "rows", hidden])
            state = add("Add", state, product(flat, hidden), shape=state.shape)
            wide = product(norm(state), 2 * hidden)
            state = add("Add", state, product(add("Gelu", wide, shape=wide.shape, approximate="tanh"), hidden), shape=state.shape)
        last = add("Gather", norm(state), logit_rows, shape=["batch", "logit_rows", hidden], axis=1)
        graph.outputs.extend([typed(product(last, WORDS), "logits", self.dtype, ["batch", "logit_rows", WORDS]), *outputs])
        return model


def lowered(model: ir.Model, part: str, target: Target, rows: Sequence[int] = ()) -> ir.Model:
    """A lowered copy, in which no release of this kind finds anything to refuse."""
    found = []
    for name in LIKE[target.name]:
        made = model.clone()
        lower(made, part, TARGETS[name], rows)
        assert refused(made, TARGETS[name]) == []
        assert {node.domain for node in made.graph} == {""} and not made.functions
        assert made.graph.opset_imports == {"": TARGETS[name].opset}
        found.append(made)
    assert len({ir.to_proto(made).SerializeToString() for made in found}) == 1
    return found[0]


def session(model: ir.Model | Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3  # its TensorScatter warns of every copy
    if isinstance(model, ir.Model):
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto)
        return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


# running them as a runtime would

class Caches:
    """Buffers of a decoder's caches, full of noise: what lies behind `length` must not matter."""

    def __init__(self, ready: ort.InferenceSession, rows: Sequence[int]):
        noise = np.random.default_rng(1)
        self.buffers = {}
        for given in ready.get_inputs():
            if given.name.startswith("cache"):
                _, heads, count, width = given.shape
                count = count if isinstance(count, int) else capacity(rows[int(given.name.partition(".")[2])])
                dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[given.type]
                self.buffers[given.name] = noise.normal(0, 3, (1, heads, count, width)).astype(dtype)

    def run(self, ready: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One call: what goes in by name, less what the graph does not take; the caches are brought up to date."""
        given = {}
        for tensor in ready.get_inputs():
            value = self.buffers[tensor.name] if tensor.name in self.buffers else feeds[tensor.name]
            given[tensor.name] = value.astype(np.int32) if tensor.type == "tensor(int32)" else value
        found = dict(zip([o.name for o in ready.get_outputs()], ready.run(None, given)))
        for name in list(found):
            if name.startswith("cache"):
                self.buffers[name.replace("_out", "")] = found.pop(name)
            elif name.startswith("new_rows"):
                first, rows = int(name.partition(".")[2]), found.pop(name)
                at = int(feeds.get(f"length.{first}", feeds["length"])[0])
                for number, one in enumerate(rows):
                    layer, kind = first + number // 2, ("key", "value")[number % 2]
                    self.buffers[f"cache_{kind}.{layer}"][0, :, at:at + rows.shape[2]] = one
        return found


class Pair:
    """A lowered prefill and decode beside the graph that the `onnxruntime` dialect makes, fed the same."""

    def __init__(self, prefill: ort.InferenceSession, decode: ort.InferenceSession, oracle: ort.InferenceSession, rows: Sequence[int], close: float):
        self.parts, self.oracle, self.close = {"prefill": prefill, "decode": decode}, oracle, close
        self.mine, self.theirs = Caches(prefill, rows), Caches(oracle, rows)

    def step(self, part: str, feeds: dict[str, np.ndarray], new: dict[str, int], buckets: dict[str, int] | int) -> dict[str, np.ndarray]:
        """Runs both and compares results, and the rows of all caches that are in use then.

        Args:
            part: what runs.
            feeds: by input.
            new: new rows in the layers from each first one on: {"": 5, "2": 3}.
            buckets: rows to look at, likewise.
        """
        # a graph that always cuts is given, where there is no picture, one that no row_map speaks of
        empty = [name for name, value in feeds.items() if name.startswith("visual_rows") and not len(value)]
        unread = {name: np.zeros((1, *feeds[name].shape[1:]), np.int64) for name in empty}
        places = {f"places.{first}" if first else "places": np.arange(buckets if isinstance(buckets, int) else buckets[first]) for first in new}
        ends = {}
        for first, count in new.items():
            layer = f".{first}" if first else ""
            end = int(feeds[f"length{layer}"][0]) + count
            ends |= {f"last_row{layer}": np.array([end - 1]), f"total_rows{layer}": np.array(end), f"row_numbers{layer}": np.arange(count)[None]}
        found, expected = self.mine.run(self.parts[part], feeds | places | unread), self.theirs.run(self.oracle, feeds | ends)
        assert found["logits"].dtype == expected["logits"].dtype and np.ptp(expected["logits"]) > 0.5
        if unread:
            found = {"logits": found["logits"]}
        for name, value in found.items():
            close = self.close if name == "logits" else 0
            np.testing.assert_allclose(value, expected[name], atol=close, rtol=close, err_msg=name)
        for name, buffer in self.mine.buffers.items():
            layer = int(name.partition(".")[2])
            first = max((f for f in new if not f or int(f) <= layer), key=lambda f: int(f or -1))
            used = int(feeds[f"length.{first}" if first else "length"][0]) + new[first]
            np.testing.assert_allclose(buffer[:, :, :used], self.theirs.buffers[name][:, :, :used], atol=self.close, rtol=self.close, err_msg=name)
        return found


def pair(model: ir.Model, target: Target, rows: Sequence[int], oracle: ort.InferenceSession, dtype: ir.DataType = FLOAT) -> Pair:
    return Pair(session(lowered(model, "prefill", target, rows)), session(lowered(model, "decode", target, rows)), oracle, rows, CLOSE[dtype])


def oracle_of(model: ir.Model) -> ort.InferenceSession:
    made = model.clone()
    portable.lower(made)
    return ort.InferenceSession(ir.to_proto(made).SerializeToString(), providers=["CPUExecutionProvider"])


def feeds_of(tiny: Tiny, rows: int, length: int, segments: Sequence[int] = ()) -> dict[str, np.ndarray]:
    random = np.random.default_rng(length)
    where = np.sort(random.choice(3 * rows, (1, rows), replace=False), -1) + 2 * length
    found = {"embeddings": random.normal(0, 1, (1, rows, HEADS * WIDTH)).astype(tiny.dtype.numpy()), "length": np.array([length]),
             "positions": where, "logit_rows": np.unique([0, rows - 1])}
    return found | {"segments": np.array([segments or [0] * rows])} if tiny.segments else found


KINDS = {
    "plain": Tiny(),
    "one key for all heads": Tiny(kv_heads=1),
    "a key a head, fp16": Tiny(kv_heads=4, dtype=HALF),
    "windows and soft caps": Tiny((Layer(3), Layer(), Layer(0, 2.0), Layer(3, 1.5), Layer(1))),
    "windows and soft caps, fp16": Tiny((Layer(3), Layer(), Layer(0, 2.0), Layer(3, 1.5), Layer(1)), dtype=HALF),
    "segments": Tiny((Layer(), Layer(2), Layer(2, bounded=False), Layer(0, 2.0)), segments=True),
    "segments, fp16": Tiny((Layer(), Layer(2), Layer(2, bounded=False), Layer(3)), kv_heads=1, segments=True, dtype=HALF),
}


@pytest.fixture(scope="module")
def made() -> Callable[[Tiny | CutCase], tuple[ir.Model, ort.InferenceSession]]:
    """A hand-made decoder and its oracle, made once."""
    return functools.cache(lambda kind: (model := kind.model(), oracle_of(model)))


@EVERY
@pytest.mark.parametrize("kind", KINDS)
def test_prefill_behind_nothing_and_behind_rows_then_decode(made: Any, target: Target, kind: str) -> None:
    shape = KINDS[kind]
    model, oracle = made(shape)
    it = pair(model, target, [26, 30, 41, 24, 33][:len(shape.layers)], oracle, shape.dtype)
    it.step("prefill", feeds_of(shape, 7, 0, [0, 1, 1, 1, 0, 2, 2]), {"": 7}, 8)
    it.step("prefill", feeds_of(shape, 6, 7, [3, 3, 0, 4, 4, 4]), {"": 6}, 24)
    for length, bucket in ((13, 14), (14, 16), (15, 24), (16, 17)):
        it.step("decode", feeds_of(shape, 1, length, [length % 2]), {"": 1}, bucket)
    it.step("prefill", feeds_of(shape, 2, 17, [0, 0]), {"": 2}, 19)


def test_every_release_is_run_or_like_one_that_is() -> None:
    assert sorted(name for names in LIKE.values() for name in names) == sorted(TARGETS)


def test_every_size_is_a_number_but_rows_and_buckets() -> None:
    """Caches end on 8 rows; the graphs say so of inputs and outputs, with the roles of the manifest."""
    for target in (TARGETS[name] for name in LIKE):
        shape = Tiny(dtype=HALF)
        prefill, decode = (lowered(shape.model(), part, target, [20, 24, 1]) for part in ("prefill", "decode"))
        for model, symbols in ((prefill, {"rows", "bucket", "logit_rows"}), (decode, {"bucket"})):
            sizes = [d for v in (*model.graph.inputs, *model.graph.outputs) for d in v.shape or ()]
            assert {d.value for d in sizes if isinstance(d, ir.SymbolicDim)} == symbols
        for model in (prefill, decode):
            caches = {v.name: v.shape.numpy() for v in model.graph.inputs if v.name and v.shape and v.name.startswith("cache")}
            assert [caches[f"cache_key.{n}"] for n in range(3)] == [(1, 2, rows, WIDTH) for rows in (24, 24, 8)]
            results = {v.name: v for v in model.graph.outputs}
            assert list(results) == (["logits", *[f"cache_{kind}_out.{n}" for n in range(3) for kind in ("key", "value")]] if target.in_place
                                     else ["logits", "new_rows.0"])
            kinds = [node.op_type for node in model.graph]
            assert kinds.count("Attention") == 3 * target.attention and kinds.count("TensorScatter") == 6 * target.in_place
            assert kinds.count("LessOrEqual") <= 1, "layers that hide the same share a mask"
            assert kinds.count("RMSNormalization") == 7 * target.norms and kinds.count("RotaryEmbedding") == 6 * target.rotary


# cuts

@dataclass(frozen=True)
class CutCase:
    """Methods before layers of a decoder, for pictures of 16 tokens."""
    steps: tuple[tuple[str, int, int], ...]  # method, layer, keep
    compact: bool = False
    shape: Tiny = Tiny()

    def model(self) -> ir.Model:
        model, tokens = self.shape.model(), Tokens(16, (TILE,), 0)
        for name, layer, keep in self.steps:
            kind = "decoder" if layer else "projector"
            step = Reduction.of(methods.make(name), tokens, keep, kind)
            in_decoder(model, self.shape.info, layer, step, compact=self.compact)
            tokens = step.after()
        return model

    @property
    def cuts(self) -> Cuts:
        compact = "" if not self.compact else "host" if self.shape.axes == 1 else "graph"
        return Cuts(tuple(layer for _, layer, _ in self.steps), tuple((keep,) for *_, keep in self.steps), (16,), compact, 0)


CUTS = {
    "fastv": CutCase((("fastv", 1, 5),)),
    "dart and compact": CutCase((("dart", 2, 6),), compact=True),
    "pyramiddrop": CutCase((("pyramiddrop", 1, 9), ("pyramiddrop", 2, 3))),
    "sparsevlm, compact, fp16": CutCase((("sparsevlm", 1, 6),), True, Tiny(dtype=HALF)),
    "cdpruner at the entrance, then fastv": CutCase((("cdpruner", 0, 8), ("fastv", 2, 3))),
    "three axes, compact": CutCase((("stride", 1, 7), ("fastv", 2, 4)), True, Tiny(axes=3)),
    "segments, fp16": CutCase((("random", 1, 6),), False, Tiny((Layer(), Layer(3), Layer(2, bounded=False)), segments=True, dtype=HALF)),
    "pool": CutCase((("pool", 1, 4),)),
}


@EVERY
@pytest.mark.parametrize("case", CUTS)
def test_prefill_and_decode_of_a_cut_decoder_are_its_one_graph(made: Any, target: Target, case: str) -> None:
    """Two pictures, another picture behind them, a text alone, and decoded rows."""
    it, cuts = CUTS[case], CUTS[case].cuts
    model, oracle = made(it)
    rows = [97, *[90] * 4][:len(it.shape.layers)]
    both = pair(model, target, rows, oracle, it.shape.dtype)
    taken = {part: {tensor.name for tensor in ready.get_inputs()} for part, ready in both.parts.items()}
    assert not [name for name in taken["decode"] if name.startswith(("visual_rows", "row_map", "text_rows", "segments"))]
    length, pictures, moved, place = 0, 0, [0] * len(cuts.layers), 0
    for part, runs in (("prefill", [0, *[1] * 16, 0, *[1] * 16, 0, 0, 0]), ("prefill", [0, *[1] * 16, 0, 0]), ("prefill", [0] * 4), ("decode", [0]),
                       ("decode", [0])):
        feeds = feeds_of(it.shape, len(runs), length, [(n // 17 + 1) * run for n, run in enumerate(runs)])
        if it.shape.axes == 3:
            feeds["positions"], place = grid(runs, place)
        else:
            feeds["positions"] = np.arange(length, length + len(runs))[None]
        lengths = cuts.lengths(length, pictures)
        more, counts = cuts.feeds(np.array(runs), lengths, moved)
        feeds["logit_rows"] = np.unique([0, counts[-1] - 1])
        new = dict(zip(("", *map(str, cuts.layers)), counts))
        buckets = {first: (used + count + 7) // 8 * 8 for (first, count), used in zip(new.items(), (length, *lengths))}
        found = both.step(part, feeds | more, new, buckets)
        assert ("kept." in " ".join(found)) == (part == "prefill" and any(runs))
        if it.shape.axes == 3 and part == "prefill" and it.compact and any(runs):
            moved = [up + int(found[f"saved.{layer}"].sum()) for layer, up in zip(cuts.layers, moved)]
        length, pictures = length + len(runs), pictures + runs.count(1) // 16
    assert not it.compact or it.shape.axes == 1 or max(moved) > 0


def grid(runs: Sequence[int], place: int) -> tuple[np.ndarray, int]:
    """Positions [3, 1, rows] as M-RoPE has them for text and pictures of 4 by 4, and the next one."""
    found: list[tuple[int, int, int]] = []
    for n, run in enumerate(runs):
        inside = runs[:n + 1].count(1) - 1
        if run and inside % 16 == 0:
            found += [(place, place + row, place + column) for row, column in np.ndindex(4, 4)]
            place += 4
        elif not run:
            found.append((place,) * 3)
            place += 1
    return np.array(found).T[:, None], place


# the demonstration model

@pytest.fixture(scope="module")
def bundle(demo: Path) -> Bundle:
    return Bundle.open(demo)


@pytest.mark.parametrize(("name", "cut"), [("tensorrt-8.6", False), ("tensorrt-10.3", True), ("tensorrt-rtx-1.7", False), ("tensorrt-rtx-1.7", True)])
def test_the_demonstration_decoder(bundle: Bundle, name: str, cut: bool) -> None:
    target, info, manifest = TARGETS[name], bundle.manifest.decoder, bundle.manifest
    folder = bundle.file("graphs/decoder.onnx").parent

    model = load(bundle.file("graphs/decoder.onnx"))
    if cut:
        in_decoder(model, info, 2, Reduction.of(methods.make("fastv"), Tokens.of(manifest), 64, "decoder"))
    rows = [700] * 2 + [700 - (512 if cut else 0)] * (info.layers - 2)
    graphs = [lowered(model, part, target, rows) for part in ("prefill", "decode")]
    portable.lower(model)
    ready = []
    for graph in (*graphs, model):
        save(graph, folder / "test.onnx")
        ready.append(session(folder / "test.onnx"))
    both = Pair(*ready, rows, 1e-4)
    random, cuts = np.random.default_rng(0), Cuts((2,), ((64,),), (576,), "", 0)
    length, pictures, table = 0, 0, bundle.embeddings()
    prompt = [0, 0, 0, *[1] * 576, *[0] * 9] if cut else [0] * 30
    for part, runs in (("prefill", prompt), ("prefill", [0] * 5), ("decode", [0]), ("decode", [0])):
        feeds = {"embeddings": table[random.integers(4, 400, (1, len(runs)))].astype(np.float32), "length": np.array([length]),
                 "positions": np.arange(length, length + len(runs))[None]}
        lengths = cuts.lengths(length, pictures)
        more, counts = cuts.feeds(np.array(runs), lengths, [0])
        feeds["logit_rows"] = np.array([counts[cut] - 1])
        new = dict(zip(("", "2") if cut else ("",), counts))
        both.step(part, feeds | (more if cut else {}), new, {"": length + counts[0] + 3, "2": lengths[0] + counts[-1] + 20})
        length, pictures = length + len(runs), pictures + sum(runs) // 576


@pytest.mark.parametrize(("release", "merged"), [("tensorrt-8.6", True), ("tensorrt-10.3", False), ("tensorrt-rtx-1.7", False),
                                                 ("tensorrt-rtx-1.7", True)])
def test_the_demonstration_tower(bundle: Bundle, scenes: Path, tmp_path: Path, release: str, merged: bool) -> None:
    (tmp_path / "weights.bin").hardlink_to(bundle.file("graphs/weights.bin"))
    model = load(bundle.file("graphs/vision.onnx"))
    if merged:
        in_every_layer(model, bundle.manifest.vision, methods.make("tome"), 0, 64)
    mine = lowered(model, "vision", TARGETS[release])
    portable.lower(model)
    found = []
    for graph in (model, mine):
        save(graph, tmp_path / "vision.onnx")
        found.append(session(tmp_path / "vision.onnx"))
    assert found[1].get_inputs()[0].shape == [1, 3, 336, 336]
    pixels = images.preprocess(images.load(scenes / "images/scene-05.jpg"), bundle.manifest.image).reshape(1, 3, 336, 336)
    expected, results = (dict(zip([o.name for o in ready.get_outputs()], ready.run(None, {"pixels": pixels}))) for ready in found)
    assert list(results) == list(expected)
    for name, value in results.items():
        np.testing.assert_allclose(value, expected[name], atol=1e-4, rtol=0)


# encoders by hand

def encoder(dtype: ir.DataType, kv_heads: int = HEADS, *, biased: bool = False, window: int = 0) -> ir.Model:
    """One attention over 9 rows, as a vision graph."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 23, DOMAIN: 1}, name="encoder")
    tape = Tape(ir.Model(graph, ir_version=10))
    given = [tape.input(name, dtype, ["images", heads, 9, WIDTH]) for name, heads in (("query", HEADS), ("key", kv_heads), ("value", kv_heads))]
    bias = [None] * (KEYS_BIAS - 3) + [tape.input("bias", FLOAT, ["images", 9])] if biased else []
    out = tape.add_many("Attention", 1, *given, *bias, domain=DOMAIN, causal=0, layer=4, scale=0.4, window=window, softcap=0.0)[0]
    graph.outputs.append(typed(out, "y", dtype, given[0].shape))
    return tape.model


@EVERY
@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize(("kv_heads", "biased"), [(4, True), (4, False), (2, True), (1, False)])
def test_encoder_attention(target: Target, dtype: ir.DataType, kv_heads: int, biased: bool) -> None:
    ready, random = session(lowered(encoder(dtype, kv_heads, biased=biased), "vision", target)), np.random.default_rng(0)
    feeds = {given.name: random.normal(0, 1, given.shape).astype((FLOAT if given.name == "bias" else dtype).numpy()) for given in ready.get_inputs()}
    y, = ready.run(None, feeds)
    query, key, value = (feeds[name].astype(np.float64).repeat(HEADS // feeds[name].shape[1], 1) for name in ("query", "key", "value"))
    weights = np.exp(query @ key.transpose(0, 1, 3, 2) * 0.4 + (feeds["bias"][:, None, None] if biased else 0))
    np.testing.assert_allclose(y, weights / weights.sum(-1, keepdims=True) @ value, atol=1e-5 if dtype == FLOAT else 3e-3, rtol=0)


def test_an_encoder_with_a_window_is_refused() -> None:
    with pytest.raises(EdgecompError, match="encoder layer 4 has attention with a window of 3 rows"):
        lower(encoder(FLOAT, window=3), "vision", NEW)


# operators one by one, against onnxruntime's own

X = (2, 5, 24)
OPERATORS: dict[str, tuple[str, dict[str, Any], tuple[tuple[int, ...], ...]]] = {
    "RMSNormalization": ("RMSNormalization", {"axis": -1, "epsilon": 0.1}, (X, (24,))),
    "RMSNormalization over two axes": ("RMSNormalization", {"axis": 1}, (X, (5, 24))),
    "LayerNormalization": ("LayerNormalization", {"axis": -1, "epsilon": 0.1}, (X, (24,), (24,))),
    "LayerNormalization without a bias": ("LayerNormalization", {}, (X, (24,))),
    "RotaryEmbedding": ("RotaryEmbedding", {}, ((2, 3, 5, 8), (2, 5, 4), (2, 5, 4))),
    "RotaryEmbedding of neighbours": ("RotaryEmbedding", {"interleaved": 1}, ((2, 3, 5, 8), (2, 5, 4), (2, 5, 4))),
    "RotaryEmbedding of a part": ("RotaryEmbedding", {"rotary_embedding_dim": 4, "num_heads": 3}, ((2, 3, 5, 8), (2, 5, 2), (2, 5, 2))),
    "RotaryEmbedding of a part's neighbours": ("RotaryEmbedding", {"rotary_embedding_dim": 4, "interleaved": 1, "num_heads": 3},
                                               ((2, 3, 5, 8), (2, 5, 2), (2, 5, 2))),
    "RotaryEmbedding of flat heads": ("RotaryEmbedding", {"num_heads": 3}, (X, (2, 5, 4), (2, 5, 4))),
    "RotaryEmbedding of a part of flat heads": ("RotaryEmbedding", {"num_heads": 3, "rotary_embedding_dim": 6, "interleaved": 1},
                                                (X, (2, 5, 3), (2, 5, 3))),
    "Gelu": ("Gelu", {}, (X,)),
    "Gelu with tanh": ("Gelu", {"approximate": "tanh"}, (X,)),
    "Swish": ("Swish", {"alpha": 1.7}, (X,)),
    "CastLike": ("CastLike", {}, (X, X)),
}


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("case", OPERATORS)
def test_an_operator_in_plain_ones(case: str, dtype: ir.DataType) -> None:
    op_type, attributes, shapes = OPERATORS[case]
    random = np.random.default_rng(0)
    feeds = {f"x{n}": random.normal(0, 1.5, shape).astype(dtype.numpy()) for n, shape in enumerate(shapes)}
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="one")
    tape = Tape(ir.Model(graph, ir_version=10))
    given = [tape.input(name, dtype, value.shape) for name, value in feeds.items()]
    graph.outputs.append(typed(tape.add(op_type, *given, **attributes), "y", dtype, shapes[0]))
    expected, = session(tape.model).run(None, feeds)
    write_plainly(tape.model, ())
    write_in_opset(tape.model, 17)
    tape.model.graph.sort()
    assert op_type not in {node.op_type for node in graph}
    y, = session(tape.model).run(None, feeds)
    np.testing.assert_allclose(y, expected, atol=1e-6 if dtype == FLOAT else 4e-3, rtol=0)


def test_every_plain_form_is_tried() -> None:
    assert {op_type for op_type, *_ in OPERATORS.values()} == set(PLAIN)


# what is refused

def one_node(op_type: str, *given: tuple[ir.DataType, Sequence[int | str]] | np.ndarray, dtype: ir.DataType = FLOAT, outputs: int = 1,
             domain: str = "", **attributes: Any) -> ir.Model:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 17}, name="one")
    tape = Tape(ir.Model(graph, ir_version=10))
    values = [tape.ints(v) if isinstance(v, np.ndarray) else tape.input(f"x{n}", *v) for n, v in enumerate(given)]
    for number, out in enumerate(tape.add_many(op_type, outputs, *values, domain=domain, **attributes)):
        graph.outputs.append(typed(out, f"y{number}", dtype, [1]))
    return tape.model


ROWS = (FLOAT, (4, 5))
HALVES = (HALF, (1, 4, 5, 8))
REFUSED = {
    "NonZero: its shapes or its course depend on numbers": one_node("NonZero", ROWS),
    "Compress: not among the operators": one_node("Compress", ROWS, (ir.DataType.BOOL, (4,)), axis=0),
    "Unique: not among": one_node("Unique", ROWS),
    "SequenceAt: not among": one_node("SequenceAt", ROWS, np.array(0)),
    "ScatterND: with the reduction add": one_node("ScatterND", ROWS, np.array([[0]]), (FLOAT, (1, 5)), reduction="add"),
    "ScatterElements: with the reduction max": one_node("ScatterElements", ROWS, np.zeros((1, 5), np.int64), (FLOAT, (1, 5)), reduction="max"),
    "TopK: of 3841, more than 3840": one_node("TopK", (FLOAT, (1, 5000)), np.array([3841]), outputs=2),
    "TopK: of a number that is no constant": one_node("TopK", (FLOAT, (1, 5000)), (ir.DataType.INT32, (1,)), outputs=2),
    "GroupQueryAttention: of the domain com.microsoft": one_node("GroupQueryAttention", ROWS, domain="com.microsoft"),
}
REFUSED_BY_NEW = {
    "Attention: with the soft cap 2": one_node("Attention", HALVES, HALVES, HALVES, softcap=2.0),
    "Attention: in FLOAT, for which there is no kernel": one_node("Attention", *[(FLOAT, (1, 4, 5, 8))] * 3),
    "Attention: of heads 320 wide, for which there is no kernel": one_node("Attention", *[(HALF, (1, 4, 5, 320))] * 3),
    "Attention: with a cache or more than one result": one_node("Attention", *[HALVES] * 3, outputs=2),
    "Attention: of queries or keys": one_node("Attention", *[(HALF, (1, 5, 32))] * 3, q_num_heads=4, kv_num_heads=4),
    "TensorScatter: of a cache that is no": one_node("TensorScatter", (HALF, (1, 2, "capacity", 8)), (HALF, (1, 2, 3, 8)), np.array([0])),
    "TensorScatter: along another axis": one_node("TensorScatter", HALVES, HALVES, np.array([0]), axis=1),
}
REFUSED_BY_8_6 = {
    "x0: int64, which tensorrt-8.6 has not": one_node("Neg", (INT64, (4,)), dtype=INT64),
    "ReduceMax: of whole numbers": one_node("ReduceMax", (ir.DataType.INT32, (4,)), dtype=ir.DataType.INT32),
    "BFLOAT16: a type that tensorrt-8.6 has not": one_node("Neg", (ir.DataType.BFLOAT16, (4,)), dtype=ir.DataType.BFLOAT16),
    "Attention: not among the operators of tensorrt-8.6": one_node("Attention", *[HALVES] * 3),
    "opset 23: tensorrt-8.6 is written in 17": one_node("Neg", ROWS),
}
REFUSED_BY_8_6["opset 23: tensorrt-8.6 is written in 17"].graph.opset_imports[""] = 23


@pytest.mark.parametrize(("name", "reason"), [*((name, reason) for reason in REFUSED for name in TARGETS),
                                              *((NEW.name, reason) for reason in REFUSED_BY_NEW), *(("tensorrt-8.6", r) for r in REFUSED_BY_8_6)])
def test_what_a_target_cannot_take_is_refused_with_the_reason(name: str, reason: str) -> None:
    model = {**REFUSED, **REFUSED_BY_NEW, **REFUSED_BY_8_6}[reason]
    assert any(line.startswith(reason) for line in refused(model, TARGETS[name])), refused(model, TARGETS[name])


def test_targets_are_under_their_names_and_say_where_facts_come_from() -> None:
    assert [target.name for target in TARGETS.values()] == list(TARGETS)
    assert all(target.sources and any(source.startswith("https://") for source in target.sources) for target in TARGETS.values())
    assert [target.attention for target in TARGETS.values()] == [False, False, False, True, True, True]
    assert refused(one_node("TopK", (FLOAT, (1, 5000)), np.array([3840]), outputs=2), NEW) == []
    assert not replace(NEW, operators=NEW.operators - {"TensorScatter"}).in_place


# the builder itself

def test_tensorrt_for_rtx_builds_them() -> None:
    """Real engines for SM89, as far as a host without a GPU can make them."""
    trt = pytest.importorskip("tensorrt_rtx")
    cut = CutCase((("fastv", 1, 5),), True, Tiny((Layer(), Layer(3), Layer(0, 2.0)), segments=True, dtype=HALF)).model()
    sizes = {"rows": (1, 20, 40), "rows.1": (1, 9, 40), "bucket": (8, 40, 96), "bucket.1": (8, 40, 88), "logit_rows": (1, 1, 1), "images": (1, 1, 2)}
    for model in (*(lowered(cut, part, NEW, [96, 88, 88]) for part in ("prefill", "decode")), lowered(Tiny().model(), "prefill", NEW, [96] * 3),
                  *(lowered(encoder(dtype, biased=True), "vision", NEW) for dtype in (FLOAT, HALF))):
        log = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        assert parser.parse(ir.to_proto(model).SerializeToString()), [parser.get_error(n).desc() for n in range(parser.num_errors)]
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM89, 0)
        for value in model.graph.inputs:
            if value.shape is not None and not value.shape.is_static():
                profile.set_shape(value.name, *(tuple(d if isinstance(d, int) else sizes[str(d.value)][n] for d in value.shape) for n in range(3)))
        if any(value.shape is not None and not value.shape.is_static() for value in model.graph.inputs):
            config.add_optimization_profile(profile)
        assert builder.build_serialized_network(network, config) is not None
