"""Loading, saving and describing graphs whose weights lie in a shared file beside them."""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from edgecomp.ir import int4
from edgecomp_runtime.manifest import GraphInfo, TensorInfo

ALIGNMENT = 4096  # a page, so that every tensor can be memory-mapped by itself
INLINE_BYTES = 1024  # smaller constants stay in the graph


class WeightFile:
    """A file of tensors, each content once, whatever number of graphs uses it. Open for writing until `close`."""

    def __init__(self, path: Path):
        self.path = path
        self._file: BinaryIO = path.open("wb")
        self._offsets: dict[str, int] = {}

    def add(self, name: str, array: np.ndarray[Any, Any]) -> ir.ExternalTensor:
        """Writes an array, unless its bytes are there already, and returns the reference to it."""
        data = np.ascontiguousarray(array)
        return self.add_bytes(name, data.reshape(-1).view(np.uint8), ir.DataType.from_numpy(data.dtype), data.shape)

    def add_bytes(self, name: str, flat: np.ndarray[Any, Any], dtype: ir.DataType, shape: Sequence[int]) -> ir.ExternalTensor:
        """`add` for a tensor whose bytes are given as they are stored: of several numbers a byte, of a type that numpy has not."""
        key = hashlib.sha256(flat.data).hexdigest()
        if key not in self._offsets:
            self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
            self._offsets[key] = self._file.tell()
            self._file.write(flat.data)
        return ir.ExternalTensor(self.path.name, self._offsets[key], flat.nbytes, dtype, name=name, shape=ir.Shape(shape),
                                 base_dir=self.path.parent)

    def move_weights(self, model: ir.Model, content: Callable[[str], np.ndarray[Any, Any] | None] = lambda name: None) -> None:
        """Moves a graph's weights into this file; constants under a kilobyte stay in the graph.

        They lie in the order in which the graph reads them, so that what is read together can be taken for one.

        Args:
            model: the graph.
            content: the content of a named weight, where the graph has only its shape; None where it has the content itself.
        """
        for name, value in in_order_of_use(model):
            tensor = value.const_value
            if tensor is None or isinstance(tensor, ir.ExternalTensor):  # is in the file, as whole numbers
                continue
            array = content(name)
            if tensor.nbytes >= INLINE_BYTES:
                value.const_value = self.add(name, tensor.numpy() if array is None else array)
            elif array is not None:
                value.const_value = ir.tensor(array.copy(), name=name)

    def close(self) -> None:
        self._file.close()


def in_order_of_use(model: ir.Model) -> list[tuple[str, ir.Value]]:
    """A graph's weights by name, first those that its nodes read, in their order."""
    read = {value.name or "": value for node in model.graph for value in node.inputs if value is not None and value.is_initializer()}
    return [*{**read, **model.graph.initializers}.items()]


def load(path: Path) -> ir.Model:
    """A graph; its weights stay on disk until somebody reads them."""
    return ir.load(path)


def save(model: ir.Model, path: Path) -> None:
    """Writes a graph; references to weight files stay references."""
    ir.save(model, path)


def read(tensor: ir.TensorProtocol) -> np.ndarray[Any, Any]:
    """A tensor's content; a weight's is mapped from its file. onnx_ir itself refuses files with hard links, by which bundles share weights."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    path, shape = Path(tensor.base_dir) / tensor.location, tuple(tensor.shape.numpy())
    if tensor.dtype == ir.DataType.INT4:
        *lead, last = shape
        return int4.unpacked(np.memmap(path, np.uint8, "r", tensor.offset or 0, (*lead, last // 2))).view(tensor.dtype.numpy())
    return np.memmap(path, dtype=tensor.dtype.numpy(), mode="r", offset=tensor.offset or 0, shape=shape)


def describe(model: ir.Model) -> GraphInfo:
    """The manifest's entry for a graph whose inputs and outputs are named `role` or `role.layer`."""
    return GraphInfo(tuple(_tensor(v) for v in model.graph.inputs), tuple(_tensor(v) for v in model.graph.outputs))


def _tensor(value: ir.Value) -> TensorInfo:
    assert value.name and value.shape is not None and value.dtype is not None
    role, _, layer = value.name.partition(".")
    shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
    return TensorInfo(value.name, role.removesuffix("_out"), value.dtype.numpy().name, shape, int(layer) if layer else None)
