"""A bundle written anew with quantized weights: in its neutral graphs, from which every backend's are lowered."""
from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from math import prod
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgecomp.ir.graphs import WeightFile, describe, in_order_of_use, load, read, save
from edgecomp.lowering import with_dialect
from edgecomp.quantize.activations import quantize_products
from edgecomp.quantize.blocks import quantized
from edgecomp.quantize.calibrate import Ranges, calibrated
from edgecomp.quantize.graph import add_numbers, read_dequantized
from edgecomp.quantize.rule import BLOCK, chosen, weights_of
from edgecomp.quantize.subset import Calibration
from edgecomp.writer import copy_files, writing
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import SCHEMA, GraphInfo, QuantizedInfo, TableInfo


def quantize(source: Path, out: Path, precision: str | None, *, block: int = BLOCK, unquantized: Sequence[str] = (),
             calibration: Calibration | None = None, say: Callable[[str], None] = lambda line: None) -> None:
    """Writes a bundle with the same plans, lowered for onnxruntime, and weights in blocks of whole numbers; see `rule` for which, `blocks` for how.

    In the neutral graphs a weight W [out, in] keeps its name and layout, and is read through DequantizeLinear (ONNX opset 21) with an fp16 scale
    for each `block` numbers of a row. Weights are read and written one at a time, what stays is copied, all of it once whatever the number of plans.
    Engines of the old weights are left out. With a calibration, the vision graphs' products are of whole numbers besides; see `activations`.

    Args:
        source: a bundle with neutral graphs in fp32 or fp16.
        out: where the new one goes; may be the same folder.
        precision: of the decoder's weights, 'int8' or 'int4'; None leaves them as they are.
        block: numbers of a row that share a scale.
        unquantized: patterns of Hugging Face names that stay as they are.
        calibration: the pictures to measure the vision graphs on; None leaves those as they are.
        say: is told what is being done.

    Raises:
        UnknownNameError, EdgecompError: see `rule.chosen` and `calibrate.calibrated`; the bundle is quantized already, or a weight is not finite.
    """
    bundle = Bundle.open(source)
    manifest = bundle.manifest
    if manifest.quantized is not None:
        raise EdgecompError(f"{source} has weights in {manifest.quantized.precision} already: quantize the bundle that it was made from")
    if manifest.calibrated is not None:
        raise EdgecompError(f"{source} has activations in {manifest.calibrated.activations} already: quantize the bundle that it was made from")
    full = manifest.plans["full"].variants["neutral"]
    weights = {weight.name: weight for part, file in full.items() for weight in weights_of(load(bundle.file(file)), part)}
    bits = chosen([*weights.values()], precision, block, unquantized, calibration is not None)
    in_rows = [name for name in bits if weights[name].place == "vision"]
    in_blocks = {name: size for name, size in bits.items() if name not in in_rows}
    by_bits = " and ".join(f"{count} weights in int{size}" for size, count in sorted(Counter(in_blocks.values()).items()))
    what = [f"{by_bits}, in blocks of {block}"] * bool(in_blocks) + [f"the {len(in_rows)} products of the vision graph in int8"] * bool(in_rows)
    say(f"quantizing {', and '.join(what)}; the other {len(weights) - len(bits)}, embeddings and norms stay in {manifest.precision}")
    plans = {name: dataclasses.replace(plan, variants={"neutral": plan.variants["neutral"]}) for name, plan in manifest.plans.items()}
    files = dict.fromkeys(file for plan in plans.values() for file in plan.variants["neutral"].values())
    with writing(out) as (partial, finish):
        ranges, pictures = calibrated(bundle, calibration, say, in_rows) if calibration else ({}, None)
        kept = {name: info for name, info in manifest.files.items() if name in (manifest.text.tokenizer, manifest.text.chat_template)}
        copy_files(bundle, partial, kept)
        (partial / "graphs").mkdir()
        file = WeightFile(partial / manifest.embeddings.file)
        moved = _Moved(file, in_blocks, block)
        graphs: dict[str, GraphInfo] = {}
        for name in files:
            model = load(bundle.file(name))
            moved.rewrite(model, in_rows, ranges.get(name))
            save(model, partial / name)
            graphs[name] = describe(model)
        offset = moved.table(bundle, manifest.embeddings)
        file.close()
        plans = with_dialect(plans, plans, "onnxruntime", graphs, partial, say)
        finish(dataclasses.replace(manifest, schema=SCHEMA, plans=plans, graphs=graphs, files=kept, engines=(),
                                   embeddings=dataclasses.replace(manifest.embeddings, offset=offset),
                                   quantized=QuantizedInfo(precision, block, in_blocks) if precision and in_blocks else None, calibrated=pictures))


class _Moved:
    """Graphs' weights in a new file: quantized where they are to be, else as they were. Each is read once."""

    def __init__(self, file: WeightFile, bits: Mapping[str, int], block: int):
        self._file, self._bits, self._block = file, bits, block
        self._quantized: dict[str, tuple[ir.ExternalTensor, ir.ExternalTensor]] = {}
        self._copied: dict[tuple[int | None, int], ir.ExternalTensor] = {}

    def rewrite(self, model: ir.Model, in_rows: Collection[str] = (), ranges: Ranges | None = None) -> None:
        """Puts a neutral graph's weights into the file, in place. With ranges, products with the weights named `in_rows` are of whole numbers."""
        for name, value in in_order_of_use(model):
            tensor = value.const_value
            if ranges and name in in_rows:
                continue
            if tensor is not None and name in self._bits:
                read_dequantized(model, value, *self._numbers(name, tensor), self._block)
            elif isinstance(tensor, ir.ExternalTensor):
                value.const_value = self._copy(name, tensor)
        if ranges:
            quantize_products(model, in_rows, ranges, self._numbers_in_rows)

    def table(self, bundle: Bundle, info: TableInfo) -> int:
        """Puts the embeddings into the file and returns where they begin."""
        path, dtype = bundle.file(info.file), np.dtype(info.dtype)
        whole = ir.ExternalTensor(path.name, info.offset, prod(info.shape) * dtype.itemsize, ir.DataType.from_numpy(dtype), name="embeddings",
                                  shape=ir.Shape(info.shape), base_dir=path.parent)
        return self._copy("embeddings", whole).offset or 0

    def _copy(self, name: str, tensor: ir.ExternalTensor) -> ir.ExternalTensor:
        key = tensor.offset, tensor.nbytes
        if key not in self._copied:
            self._copied[key] = self._file.add(name, read(tensor))
        here = self._copied[key]
        return ir.ExternalTensor(here.location, here.offset, here.length, here.dtype, name=name, shape=tensor.shape, base_dir=here.base_dir)

    def _numbers(self, name: str, tensor: ir.TensorProtocol) -> tuple[ir.ExternalTensor, ir.ExternalTensor]:
        if name not in self._quantized:
            bits = self._bits[name]
            numbers, scales = quantized(read(tensor), bits, self._block, name)
            self._quantized[name] = add_numbers(self._file, name, numbers, bits), self._file.add(f"{name}.scale", scales)
        return self._quantized[name]

    def _numbers_in_rows(self, name: str, tensor: ir.TensorProtocol) -> tuple[ir.ExternalTensor, ir.ExternalTensor]:
        """A weight's numbers [out, in], and their scales [out] in the weight's own type."""
        if name not in self._quantized:
            weight = read(tensor)
            numbers, scales = quantized(weight, 8, weight.shape[1], name)
            self._quantized[name] = self._file.add(name, numbers), self._file.add(f"{name}.scale", scales[:, 0].astype(weight.dtype))
        return self._quantized[name]
