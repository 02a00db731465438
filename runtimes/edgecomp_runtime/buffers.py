"""What graphs read and write, planned once: where every input and output lies, as large as it will ever be. One code for all backends."""
from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgecomp_runtime.manifest import GraphInfo, TensorInfo

ALIGNMENT = 256  # bytes: accelerators ask for it of every address
STORED = "new_rows"  # the role of rows that the host puts into the cache


@dataclass(frozen=True)
class Region:
    """Bytes that a graph reads or writes: where they begin, and what they hold."""
    address: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize


class Memory(Protocol):
    """Where a backend's graphs read and write. Everything happens in the order in which it is asked for."""

    def allocate(self, size: int, staged: bool) -> int:
        """The address of so many bytes, zeros, at a multiple of `ALIGNMENT`. They live as long as the memory.

        staged: the host reads and writes them.
        """

    def on_host(self, region: Region) -> int:
        """Where the host itself reads and writes what a region holds; of staged ones alone."""

    def send(self, region: Region) -> None:
        """Gives graphs what the host wrote."""

    def fetch(self, region: Region) -> None:
        """Gives the host what graphs wrote, once they have."""

    def store(self, rows: Region, cache: Region, at: int) -> None:
        """Copies new rows [n, heads, rows, width] into a cache [n, heads, capacity, width] from row `at` on."""


class HostMemory:
    """The machine's own. Pages are taken from the system when first written: an allocator would hand out again what others have filled."""

    def __init__(self) -> None:
        self._held: list[mmap.mmap] = []

    def allocate(self, size: int, staged: bool) -> int:
        pages = mmap.mmap(-1, max(size, 1))
        self._held.append(pages)
        return ctypes.addressof(ctypes.c_char.from_buffer(pages))

    def on_host(self, region: Region) -> int:
        return region.address

    def send(self, region: Region) -> None:
        pass  # they read the same bytes

    def fetch(self, region: Region) -> None:
        pass

    def store(self, rows: Region, cache: Region, at: int) -> None:
        view(cache)[:, :, at:at + rows.shape[2]] = view(rows)


def view(region: Region, address: int | None = None) -> NDArray[Any]:
    """A region's bytes as an array; or those at another address, in its shape and type."""
    there = memoryview((ctypes.c_char * region.nbytes).from_address(region.address if address is None else address))
    found: NDArray[Any] = np.frombuffer(there, region.dtype).reshape(region.shape)
    return found


def is_state(role: str) -> bool:
    """Whether a role names a cache buffer, which stays where it is from run to run."""
    return role.startswith("cache_")


def resolved(tensor: TensorInfo, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A tensor's shape with its symbols replaced."""
    return tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)


class Buffers:
    """A graph's inputs and outputs that are not state, one after another in one allocation.

    Args:
        graph: the manifest's entry.
        most: the largest size of every symbol in its shapes.
        memory: where.
    """

    def __init__(self, graph: GraphInfo, most: Mapping[str, int], memory: Memory):
        self._offsets: dict[str, tuple[int, int]] = {}
        size = 0
        for tensor in (*graph.inputs, *graph.outputs):
            if not is_state(tensor.role):
                largest = Region(0, resolved(tensor, most), tensor.dtype).nbytes
                self._offsets[tensor.name] = size, largest
                size = aligned(size + largest)
        self.nbytes = size
        self._address = memory.allocate(size, staged=True)

    def region(self, tensor: TensorInfo, sizes: Mapping[str, int]) -> Region:
        """Where a tensor lies, with the shape that it has this time."""
        offset, largest = self._offsets[tensor.name]
        found = Region(self._address + offset, resolved(tensor, sizes), tensor.dtype)
        assert found.nbytes <= largest, f"{tensor.name} is {found.shape}, more than was planned"
        return found


def aligned(size: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def cache_regions(tensors: Iterable[TensorInfo], starts: tuple[int, ...], cache_rows: tuple[int, ...], memory: Memory) -> dict[str, Region]:
    """Buffers for a decoder's cache inputs by name: keys and values of the layers between two cuts lie side by side, so that one copy
    puts new rows into all of them.

    Args:
        tensors: the inputs; a capacity that is no number is the plan's.
        starts: the first layer of each stretch between cuts.
        cache_rows: of each layer, by the plan.
        memory: where.
    """
    found: dict[str, Region] = {}
    ordered = sorted(tensors, key=lambda t: (t.layer or 0, t.role))  # key before value
    for first, end in zip(starts, (*starts[1:], len(cache_rows))):
        mine = [t for t in ordered if first <= (t.layer or 0) < end]
        shapes = [(1, *(cache_rows[t.layer or 0] if isinstance(s, str) else s for s in t.shape[1:])) for t in mine]
        sizes = [aligned(Region(0, shape, t.dtype).nbytes) for shape, t in zip(shapes, mine)]
        address = memory.allocate(sum(sizes), staged=False)
        for tensor, shape, size in zip(mine, shapes, sizes):
            found[tensor.name] = Region(address, shape, tensor.dtype)
            address += size
    return found


class Engine(Protocol):
    """A graph that a backend has loaded."""

    def bind(self, name: str, region: Region) -> None:
        """Says where an input or output lies from now on, and its shape. An input and an output of one name are both meant."""

    def execute(self) -> None:
        """Runs it on what is bound."""


class Bound:
    """A loaded graph with its buffers: arrays by role in, arrays by role out.

    Args:
        engine: the backend's.
        graph: the manifest's entry.
        most: the largest size of every symbol in its shapes.
        state: the cache's regions by input name.
        memory: where all of it lies.
    """

    def __init__(self, engine: Engine, graph: GraphInfo, most: Mapping[str, int], state: Mapping[str, Region], memory: Memory):
        self._engine, self._graph, self._memory = engine, graph, memory
        self._buffers = Buffers(graph, most, memory)
        self._fed = [t for t in graph.inputs if not is_state(t.role)]
        self._state, self._bound = state, dict[str, Region]()
        self._views: dict[str, NDArray[Any]] = {}  # of what is bound, for the host
        self._shapes: list[tuple[int, ...]] | None = None  # of what was fed last
        for tensor in (*graph.inputs, *graph.outputs):
            if is_state(tensor.role):
                engine.bind(tensor.name, state[tensor.name.replace("_out", "")])
        self._made = [t for t in graph.outputs if not is_state(t.role)]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs the graph on arrays by role and layer; more than it takes may be given. Returns what it makes; the cache is updated in place.

        What is returned is looked at where it lies, and stays so until the next run: copy what is to be kept.
        """
        given = [feeds[tensor.key] for tensor in self._fed]
        shapes = [array.shape for array in given]
        if shapes != self._shapes:
            self._place(shapes)
        for tensor, array in zip(self._fed, given):
            self._views[tensor.name][...] = array
            self._memory.send(self._bound[tensor.name])
        self._engine.execute()
        found = {}
        for tensor in self._made:
            if tensor.role == STORED:
                self._store(tensor, self._bound[tensor.name], int(feeds.get(f"length.{tensor.layer}", feeds["length"])[0]))
            elif tensor.role not in ("new_key", "new_value"):  # of neutral graphs, which have no cache of their own
                self._memory.fetch(self._bound[tensor.name])
                found[tensor.key] = self._views[tensor.name]
        return found

    def _place(self, shapes: list[tuple[int, ...]]) -> None:
        """Binds what lies elsewhere, or has another shape, than the last time."""
        sizes = {symbol: size for tensor, shape in zip(self._fed, shapes) for symbol, size in zip(tensor.shape, shape) if isinstance(symbol, str)}
        for tensor in (*self._fed, *self._made):
            region = self._buffers.region(tensor, sizes)
            if self._bound.get(tensor.name) != region:
                self._engine.bind(tensor.name, region)
                self._bound[tensor.name], self._views[tensor.name] = region, view(region, self._memory.on_host(region))
        self._shapes = shapes

    def _store(self, tensor: TensorInfo, rows: Region, at: int) -> None:
        first = self._state[f"cache_key.{tensor.layer}"]
        self._memory.store(rows, Region(first.address, (rows.shape[0], *first.shape[1:]), first.dtype), at)
