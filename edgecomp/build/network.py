"""From a lowered graph to an engine with TensorRT's own interface; the same code for TensorRT 8.6 to 11 and TensorRT for RTX.

`edgecomp.build.engine` imports one of the packages under the name `tensorrt` first. What only some versions have is asked for by name.

The peak of memory is that of the engine, which TensorRT holds whole in one piece, and of those weights that it joins for layers with one
input (gate with up, query with key and value). Weights of the graph itself are mapped from their file since TensorRT 10.13, and copied
by older parsers. The engine is written as it comes, so that Python never holds a second one; TensorRT 10.3 and older have no stream.
"""
from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO, cast

import tensorrt as trt

from edgecomp.build.order import Order, replacing
from edgecomp.build.phases import Phases, Tick
from edgecomp_runtime.errors import EdgecompError, UnknownNameError

MEMORY_SHORT = ("Could not find any implementation", "OutOfMemory", "out of memory", "bad_alloc")  # what TensorRT says for want of memory


class _Capable(Protocol):
    """What TensorRT for RTX's builder configuration has besides."""
    num_compute_capabilities: int

    def set_compute_capability(self, capability: object, index: int) -> bool: ...


class _Boundary(Protocol):
    """An attention's first or last layer, since 10.14."""
    attention: Any


@dataclass(frozen=True)
class Built:
    """What became of a order."""
    engine_bytes: int
    layers: int
    version: str
    notes: tuple[str, ...]


class Log(trt.ILogger):
    """TensorRT's log, in a file; errors are kept."""

    def __init__(self, file: TextIO):
        trt.ILogger.__init__(self)
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self._file = file

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        if int(severity) <= int(trt.ILogger.Severity.WARNING):
            (self.errors if int(severity) <= int(trt.ILogger.Severity.ERROR) else self.warnings).append(one_line(msg))
            self._file.write(f"{severity.name}: {msg}\n")

    def reason(self, most: int = 2) -> str:
        """The first errors, and what usually helps."""
        said = "; ".join(dict.fromkeys(self.errors[:most])) or "it gave no reason"
        short = any(sign in error for sign in MEMORY_SHORT for error in self.errors)
        return said + (" (memory may be short: end other programs, or give a smaller workspace)" if short else "")


def build(order: Order, tick: Tick, log_file: TextIO) -> Built:
    """Builds the engine of an order and puts it in its place.

    Raises:
        EdgecompError: the graph, the profile or the compute capability is refused, or TensorRT gives no engine.
        OSError: a file cannot be written.
    """
    log = Log(log_file)
    try:
        builder = trt.Builder(log)
    except (TypeError, RuntimeError):
        raise EdgecompError(f"{order.package} {trt.__version__} cannot start: {log.reason()}; it needs an NVIDIA GPU and its driver") from None
    config = builder.create_builder_config()
    _capability(config, order)
    tick("parsing", 0, 1)
    network = builder.create_network(_network_flags())
    parser = trt.OnnxParser(network, log)  # it stays to the end: the network's weights are its own
    if not parser.parse_from_file(order.graph):
        raise EdgecompError(f"{order.package} {trt.__version__} does not take {order.graph}: {_refusal(parser)}")
    tick("parsing", 1, 1)
    _types(network, config, order)
    config.add_optimization_profile(_profile(builder, network, order))
    if order.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, order.workspace_bytes)
    if order.optimization_level is not None:
        config.builder_optimization_level = order.optimization_level
    if hasattr(trt, "IProgressMonitor"):  # 8.6 has none
        config.progress_monitor = _monitor(Phases(tick))
    notes = use_timing_cache(config, order, log)
    layers = network.num_layers
    with replacing(Path(order.out)) as file:
        size = _write(builder, network, config, file, tick)
        if not size:
            raise EdgecompError(f"{order.package} {trt.__version__} gave no engine of {order.graph}: {log.reason()}"
                                + (f" (all of it is in {order.log})" if order.log else ""))
    keep_timing_cache(config, order)
    return Built(size, layers, trt.__version__, notes)


def use_timing_cache(config: trt.IBuilderConfig, order: Order, log: Log) -> tuple[str, ...]:
    """Gives the builder what was timed before. Returns what there is to say of it."""
    if order.timing_cache is None or order.package == "tensorrt_rtx":  # which times nothing; its timing cache does nothing since 1.2
        return ()
    path, before = Path(order.timing_cache), len(log.errors) + len(log.warnings)
    stored = path.read_bytes() if path.exists() else b""
    cache = config.create_timing_cache(stored)
    if config.set_timing_cache(cache, False) and len(log.errors) + len(log.warnings) == before:
        return ()
    config.set_timing_cache(config.create_timing_cache(b""), False)
    return (f"{path} is of another TensorRT, driver or GPU: it was ignored, and written anew",)


def keep_timing_cache(config: trt.IBuilderConfig, order: Order) -> None:
    """Writes what was timed. Raises OSError."""
    if order.timing_cache is None or order.package == "tensorrt_rtx":
        return
    with replacing(Path(order.timing_cache)) as file:
        file.write(memoryview(config.get_timing_cache().serialize()))


def one_line(text: str) -> str:
    return " ".join(text.split())


def _capability(config: trt.IBuilderConfig, order: Order) -> None:
    known: Any = getattr(trt, "ComputeCapability", None)
    if known is None:
        if order.capability is not None:
            raise EdgecompError(f"{order.package} builds for the GPU at hand alone, not for another's compute capability {order.capability}: "
                                "build on that device, or with tensorrt_rtx")
        return
    offered = {f"{name[2:-1]}.{name[-1]}": value for name, value in known.__members__.items() if name.startswith("SM")}
    if order.capability is not None and order.capability not in offered:
        raise EdgecompError(f"{order.package} {trt.__version__} does not build for compute capability {order.capability}, only for "
                            f"{', '.join(offered)}: other GPUs need tensorrt, on the device")
    capable = cast(_Capable, config)
    capable.num_compute_capabilities = 1
    capable.set_compute_capability(known.CURRENT if order.capability is None else offered[order.capability], 0)


def _network_flags() -> int:
    """Strongly typed: what the graph says in fp32 is computed in fp32. 8.6 has no such network, and wants to hear of the batch."""
    flags: Any = trt.NetworkDefinitionCreationFlag
    return 1 << int(flags.STRONGLY_TYPED if hasattr(flags, "STRONGLY_TYPED") else flags.EXPLICIT_BATCH)


def _types(network: trt.INetworkDefinition, config: trt.IBuilderConfig, order: Order) -> None:
    """Attention falls apart where there is no kernel for it (fp32 has none), fp32 is fp32, and 8.6 keeps to the graph's types as it can."""
    if order.precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)
    newer: Any = trt  # than the published stubs
    weak = not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") and order.precision == "fp16"
    if weak:
        config.set_flag(trt.BuilderFlag.FP16)
        config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        if layer.type.name in ("ATTENTION_INPUT", "ATTENTION_OUTPUT"):
            layer.__class__ = newer.IAttentionBoundaryLayer  # get_layer gives the base class
            cast(_Boundary, layer).attention.decomposable = True
        elif weak and layer.type.name in ("SOFTMAX", "ELEMENTWISE", "REDUCE", "UNARY") and layer.get_output(0).dtype == trt.DataType.FLOAT:
            layer.precision = trt.DataType.FLOAT


def _monitor(phases: Phases) -> trt.IProgressMonitor:
    class Monitor(trt.IProgressMonitor):
        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            phases.step(phase_name, step)
            return True

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)
    return Monitor()


def _profile(builder: trt.Builder, network: trt.INetworkDefinition, order: Order) -> trt.IOptimizationProfile:
    profile = builder.create_optimization_profile()
    inputs = {tensor.name: tensor for tensor in (network.get_input(index) for index in range(network.num_inputs))}
    if unknown := order.profile.keys() - inputs.keys():
        raise UnknownNameError("input", min(unknown), inputs)
    for name, tensor in inputs.items():
        stated = tuple(tensor.shape[axis] for axis in range(len(tensor.shape)))
        least, usual, most = (tuple(shape) for shape in order.profile.get(name, [stated] * 3))
        fits = len(stated) == len(least) == len(usual) == len(most)
        if not fits or any(not 0 <= a <= b <= c or d not in (-1, a) or (d == a and c != a) for a, b, c, d in zip(least, usual, most, stated)):
            raise EdgecompError(f"input {name} of {order.graph} has the shape {_shape(stated)}, which {_shape(least)} to {_shape(usual)} to "
                                f"{_shape(most)} does not fit")
        profile.set_shape(name, *(trt.Dims(list(shape)) for shape in (least, usual, most)))
    return profile


def _write(builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig, file: BinaryIO, tick: Tick) -> int:
    """Builds, and writes the engine. Returns its bytes, 0 if there is none. Raises OSError."""
    if not hasattr(trt, "IStreamWriter"):
        plan = builder.build_serialized_network(network, config)
        return 0 if plan is None else write_all(file, memoryview(plan))

    class Stream(trt.IStreamWriter):
        """Writes pieces of 64 MiB. TensorRT swallows what is raised here, and takes a build whose writing failed for a good one."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.size, self.error = 0, cast("OSError | None", None)

        def write(self, data: Any, size: int = 0) -> int:
            if self.error is not None:
                return 0
            try:
                written = write_all(file, memoryview(data))
            except OSError as error:
                self.error = error
                return 0
            self.size += written
            tick("writing", self.size >> 20, 0)
            return written

    stream = Stream()
    done = builder.build_serialized_network_to_stream(network, config, stream)
    if stream.error is not None:
        raise stream.error
    return stream.size if done else 0


def write_all(file: BinaryIO, data: memoryview) -> int:
    """Writes all of it, for one call to the system may write a part only."""
    rest = data
    while rest:
        rest = rest[file.write(rest):]
    return data.nbytes


def _refusal(parser: trt.OnnxParser) -> str:
    """The parser's first error, with the node that it is about."""
    if not parser.num_errors:
        return "it gave no reason"
    error: Any = parser.get_error(0)
    where = ""
    with suppress(AttributeError):  # 8.6 knows the node's number alone
        where = f"{error.node_operator()} node {error.node_name()!r}: "
    more = f" (and {parser.num_errors - 1} more)" if parser.num_errors > 1 else ""
    return (where or f"node {error.node()}: ") + one_line(error.desc()) + more


def _shape(dims: Iterable[int]) -> str:
    return "[" + ", ".join("?" if dim == -1 else str(dim) for dim in dims) + "]"
