"""Which weights get how many bits: one table, by where a weight stands. What it does not name stays as it is in the bundle.

Only weights of matrix products are looked at. Norms, biases and positions are read whole whatever their type, and of the embeddings,
a table beside the graphs, a few rows a step.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir

from edgecomp.ir.rewrite import dims, ends_as_result, inputs, made_by, nodes
from edgecomp_runtime.errors import EdgecompError, UnknownNameError

BLOCK = 32  # numbers that share a scale, if nobody says otherwise: SmolVLM-256M is 576 wide, which 128 does not divide
# --weights: bits of the decoder's layers, of its head, and of the vision graph, tower and projector; None stays
BITS: Mapping[str, Mapping[str, int | None]] = {
    "int8": {"layers": 8, "head": 8, "vision": None},
    "int4": {"layers": 4, "head": 8, "vision": None},  # the head's errors are the logits', and nothing behind it evens them out
}
ACTIVATIONS = {"vision": 8}  # --activations int8: products of whole numbers take both sides so, a weight with one scale a row
BLOCKS = (16, 32, 64, 128, 256)  # what onnxruntime has kernels for (MatMulNBits: a power of two, 16 at least)


@dataclass(frozen=True)
class Weight:
    """A weight of matrix products: its Hugging Face name, where it stands, its shape [out, in] and its value in the graph."""
    name: str
    place: str
    shape: tuple[int, int]
    value: ir.Value


def weights_of(model: ir.Model, part: str) -> list[Weight]:
    """The weights [out, in] of a neutral graph that stand in `x @ W^T`, each once. part: 'vision', 'prefill' or 'decode'."""
    found: dict[str, Weight] = {}
    for product in nodes(model, "MatMul"):
        transposed = made_by(product.inputs[1], "Transpose")
        value = inputs(transposed)[0] if transposed else None
        if value is None or not value.is_initializer() or len(dims(value)) != 2 or value.name is None:
            continue
        rows, columns = dims(value)
        assert isinstance(rows, int) and isinstance(columns, int)
        place = "vision" if part == "vision" else "head" if ends_as_result(product.outputs[0]) else "layers"
        found[value.name] = Weight(value.name, place, (rows, columns), value)
    return [*found.values()]


def check(precision: str, block: int) -> None:
    """Raises UnknownNameError for bits that are not in the table, EdgecompError for blocks that there are no kernels for."""
    if precision not in BITS:
        raise UnknownNameError("precision of weights", precision, BITS)
    if block not in BLOCKS:
        raise EdgecompError(f"blocks of {block} are none that there are kernels for: choose --block {', '.join(map(str, BLOCKS))}")


def chosen(weights: Sequence[Weight], precision: str | None, block: int, unquantized: Sequence[str], activations: bool = False) -> dict[str, int]:
    """Bits of each weight that is quantized, by name.

    Args:
        weights: of all the full model's graphs.
        precision: of the decoder's weights, 'int8' or 'int4'; None leaves them.
        block: numbers of a row that share a scale.
        unquantized: patterns of names that stay as they are, such as 'lm_head.*' or '*.layers.0.*'.
        activations: the vision graph's products are of whole numbers.

    Raises:
        UnknownNameError, EdgecompError: see `check`; a pattern that no weight has, patterns that leave none of the decoder's weights or of the vision
            graph's that were to be quantized, a weight whose rows the block does not divide.
    """
    if precision:
        check(precision, block)
    asked = {"--weights": BITS[precision] if precision else {}, "--activations": ACTIVATIONS if activations else {}}
    ruled = {weight.name: bits for weight in weights for table in asked.values() if (bits := table.get(weight.place)) is not None}
    for pattern in unquantized:
        if not any(fnmatchcase(name, pattern) for name in ruled):
            raise EdgecompError(f"--unquantized {pattern!r} is the name of none of the {len(ruled)} weights that {precision or 'int8'} is for, such "
                                f"as {', '.join([*ruled][:2])}")
    found = {name: bits for name, bits in ruled.items() if not any(fnmatchcase(name, pattern) for pattern in unquantized)}
    for option, table in asked.items():
        its = [weight.name for weight in weights if table.get(weight.place) is not None]
        if table and found.keys().isdisjoint(its):
            raise EdgecompError(f"--unquantized leaves none of the {len(its)} weights that {option} is for: leave out {option}, or one --unquantized")
    for weight in weights:
        if weight.name in found and weight.place != "vision" and weight.shape[1] % block:
            fitting = [size for size in BLOCKS if weight.shape[1] % size == 0]
            way = f"--block {' or '.join(map(str, fitting))}, or " if fitting else ""
            raise EdgecompError(f"{weight.name} is {weight.shape[1]} wide, which blocks of {block} do not divide: choose {way}"
                                f"--unquantized {weight.name!r}")
    return found
