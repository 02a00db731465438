"""A cut inside the decoder: from one layer on, a prompt's pictures have fewer rows.

The neutral graph stays one graph for prefill and decode. Where a layer's hidden state begins, a node `edgecomp.Cut` takes the shortened
values and those as they were; it gives the former where the prompt has pictures (`visual_rows` is not empty), else the latter.
"""
from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgecomp.budget import Reduction
from edgecomp.ir.fork import Fork, downstream, rename_dimension
from edgecomp.ir.rewrite import DOMAIN, dims, marks, nodes
from edgecomp.passes.apply import Application, Applied
from edgecomp.passes.positions import Anew
from edgecomp.passes.signals import DECODER, TEXT, Prefill
from edgecomp.passes.splice import expose_rule
from edgecomp.passes.tape import Tape, typed
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import DecoderInfo

INT64 = ir.DataType.INT64
ROWS = ("embeddings", "positions", "segments")
PER_ROW = "edgecomp.per_row"  # what a value stands for behind a cut: an input of the graph, by name


def in_decoder(model: ir.Model, info: DecoderInfo, layer: int, step: Reduction, *, compact: bool = False, expose: bool = False) -> None:
    """Shortens a prompt's visual rows before a decoder layer, in place; see `TensorInfo` for the inputs that the graph gains.

    Deepstack features of later layers and segments follow the kept rows. Positions do, or are numbered anew (`compact`): by the host on one
    axis, where it is a matter of counting, in the graph on several.

    Args:
        model: the neutral decoder graph.
        info: the decoder's facts.
        layer: the first one with fewer rows.
        step: what to put in.
        compact: positions are numbered anew from here on.
        expose: add what the rule saw and did as outputs: features, each signal, and for one part the order of choice.

    Raises:
        EdgecompError: the decoder cannot be cut there, or the method's signals are not to be had there.
    """
    found = marks(model, "hidden")
    if layer not in found:
        raise EdgecompError(f"the decoder has layers 0 to {max(found)}; there is no cut before layer {layer}")
    hidden, names = found[layer].outputs[0], step.method.signals(step.parts[0].place.site)
    earlier = [v.name for v in model.graph.inputs if (v.name or "").startswith("visual_rows")]
    if earlier and {"visual_embeddings", "text_embeddings"} & set(names):
        raise EdgecompError(f"method {step.method.name!r} reads all embeddings, and an earlier cut inside the decoder has dropped some: put it first")
    behind = downstream([hidden])
    every = _per_row(model)
    reading = {v for node in behind for v in node.inputs}
    per_row = {name: value for name, value in every.items() if not name.startswith("deepstack") or value in reading}
    tape, (_, rows, width) = Tape(model), dims(hidden)
    visual = tape.input(f"visual_rows.{layer}", INT64, ["images", step.tokens.count])
    row_map = tape.input(f"row_map.{layer}", INT64, [f"rows.{layer}"])
    text = tape.input(f"text_rows.{layer}", INT64, ["text_rows"]) if set(TEXT) & set(names) else None
    at = Prefill(model, layer, hidden, visual, text, every, info.bidirectional != "prompt")
    signals = [DECODER[name](at) for name in names]
    work, keep = Application(model, step), step.keep
    features = at.visual(hidden)
    features.shape, features.type = ir.Shape([None, step.tokens.count, width]), hidden.type
    applied = work(features, signals)

    def rest(value: ir.Value, of_kept: ir.Value, axis: int) -> ir.Value:
        """A value's rows behind the cut: those that stay, and the kept ones, where they belong."""
        return tape.add("Gather", tape.add("Concat", value, of_kept, axis=axis), row_map, axis=axis)

    def in_rows(tokens_of_images: ir.Value) -> ir.Value:  # [B * I, K, D] -> [B, I * K, D]
        shape = tape.add("Concat", tape.add("Shape", hidden, start=0, end=1), tape.ints([-1, width]), axis=0)
        return tape.add("Reshape", tokens_of_images, shape)

    cut = {"hidden": (rest(hidden, in_rows(applied.tokens), 1), hidden)}
    by_host = compact and info.position_axes == 1
    for name, value in per_row.items():
        last = len(dims(value)) - 1
        if name == "positions" and compact and not by_host:
            value = tape.add("Sub", value, tape.input(f"moved.{layer}", INT64, [1]))
            anew = Anew.of(tape, value, *_picked(tape, value, visual, applied, keep), step.tokens.count)
            cut[name] = rest(anew.rows, _in_rows(tape, anew.kept), last), value
            cut["saved"] = anew.saved, tape.ints(np.zeros(0, np.int64))
        elif name == "segments" or (name == "positions" and not by_host):
            cut[name] = rest(value, _in_rows(tape, _picked(tape, value, visual, applied, keep)[1]), last), value
        elif name.startswith("deepstack"):
            cut[name] = rest(value, in_rows(work.follow(at.visual(value), applied)), 1), value
    cut["kept"] = applied.kept, tape.ints(np.zeros((0, keep), np.int64))
    join = tape.add_many("Cut", len(cut), visual, *(new for new, _ in cut.values()), *(old for _, old in cut.values()), domain=DOMAIN, layer=layer)
    stands = dict(zip(cut, join))
    model.graph.outputs.append(typed(stands.pop("kept"), f"kept.{layer}", INT64, ["images", keep]))
    if "saved" in stands:
        model.graph.outputs.append(typed(stands.pop("saved"), f"saved.{layer}", INT64, ["images"]))
    for name, value in stands.items():
        old = hidden if name == "hidden" else per_row[name]
        value.type, value.shape = old.type, ir.Shape([f"rows.{layer}" if d == rows else d for d in dims(old)])
    stands["embeddings"] = short = stands.pop("hidden")  # of which only the number of rows matters any more
    if "positions" not in stands:
        shape = [f"rows.{layer}" if d == rows else str(d) if isinstance(d, ir.SymbolicDim) else d for d in dims(per_row["positions"])]
        stands["positions"] = tape.input(f"positions.{layer}", INT64, shape)
    length = next(node.inputs[5] for node in behind if (node.domain, node.op_type) == (DOMAIN, "Attention"))
    assert length is not None
    replaced = {hidden: short, length: tape.input(f"length.{layer}", INT64, [1]),
                **{value: stands.get(name, short) for name, value in every.items()}}  # of features added before, only the number of rows is read
    fork = Fork(model, replaced, (str(rows), f"rows.{layer}"))
    for node in behind:
        for position, read in enumerate(node.inputs):
            if read is not None and read.producer() not in behind:
                node.replace_input_with(position, fork.of(read))
    for name, value in stands.items():
        value.metadata_props[PER_ROW] = name
    rename_dimension(behind, str(rows), f"rows.{layer}")
    _rename_capacity(behind, layer)
    if expose:
        expose_rule(model, applied, features, dict(zip(names, signals)), f".{layer}")
    model.graph.sort()


def _per_row(model: ir.Model) -> dict[str, ir.Value]:
    """The values with one entry a row that stand behind all cuts so far, by the name of the graph's input."""
    found = {v.name: v for v in model.graph.inputs if v.name and (v.name in ROWS or v.name.startswith("deepstack"))}
    cuts = sorted(nodes(model, "Cut", DOMAIN), key=lambda node: node.attributes["layer"].as_int())
    for value in [*(v for node in cuts for v in node.outputs), *model.graph.inputs]:
        if name := value.metadata_props.get(PER_ROW):
            found[name] = value
    return found


def _picked(tape: Tape, value: ir.Value, visual: ir.Value, applied: Applied, keep: int) -> tuple[ir.Value, ir.Value]:
    """What stands in the visual rows of positions [axes, B, S] or segments [B, S]: of all tokens [.., B, I, N] and of those kept [.., B, I, K]."""
    picked = tape.add("Gather", value, visual, axis=-1)
    lead = tape.add("Slice", tape.add("Shape", picked), tape.ints([0]), tape.ints([-1]))  # [.., B, I]
    here = tape.add("Concat", tape.add("Slice", lead, tape.ints([-2]), tape.ints([2**31 - 1])), tape.ints([keep]), axis=0)
    kept = tape.add("Expand", tape.add("Reshape", applied.kept, here), tape.add("Concat", lead, tape.ints([keep]), axis=0))
    return picked, tape.add("GatherElements", picked, kept, axis=-1)


def _in_rows(tape: Tape, of_images: ir.Value) -> ir.Value:
    """[.., B, I, K] -> [.., B, I * K]."""
    lead = tape.add("Slice", tape.add("Shape", of_images), tape.ints([0]), tape.ints([-2]))
    return tape.add("Reshape", of_images, tape.add("Concat", lead, tape.ints([-1]), axis=0))


def _rename_capacity(behind: set[ir.Node], layer: int) -> None:
    """Caches of layers behind a cut are shorter: their capacity has a name of its own."""
    for node in behind:
        if (node.domain, node.op_type) == (DOMAIN, "Attention"):
            for cache in node.inputs[3:5]:
                assert cache is not None
                cache.shape = ir.Shape([f"capacity.{layer}" if n == 2 else d for n, d in enumerate(dims(cache))])
