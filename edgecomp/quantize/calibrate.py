"""The vision tower run on pictures of the user's, for the ranges of what enters its products.

Each plan's own graph is run, cut as it is: tokens that it drops inside the tower reach no later product, and do not count there.
"""
from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgecomp.dialects.onnxruntime import lower
from edgecomp.ir.graphs import load
from edgecomp.ir.rewrite import constant, dims
from edgecomp.quantize.activations import MOST, entering
from edgecomp.quantize.subset import Calibration, cover
from edgecomp_runtime import images
from edgecomp_runtime.bundle import Bundle, sha256_of
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import CalibratedInfo, ImageInfo

FACTORS = 0.97 ** np.arange(80)  # of the largest number: ranges that are tried, down to an eleventh of it
Ranges = dict[str, float]  # by the name of a value in a graph


def calibrated(bundle: Bundle, calibration: Calibration, say: Callable[[str], None],
               names: Collection[str] | None = None) -> tuple[dict[str, Ranges], CalibratedInfo]:
    """The ranges of what enters products with the named weights, or with all, in every plan's vision graph, by its neutral file, and what they were
    measured on.

    Raises:
        InputError, UnknownNameError: see `Calibration.candidates`; a file is no picture, or damaged.
        EdgecompError: the tower gives infinite numbers on a picture.
    """
    pictures, info = calibration.candidates(), bundle.manifest.image
    files = dict.fromkeys(plan.variants["neutral"]["vision"] for plan in bundle.manifest.plans.values())
    if calibration.choice == "cover":
        say(f"running the vision tower on {len(pictures)} pictures, to choose {calibration.images}")
        pictures = [pictures[n] for n in cover(largest(bundle.file(next(iter(files))), pictures, info, names), calibration.images)]
    found = {}
    for file in files:
        say(f"measuring what enters the products of {file} on {len(pictures)} pictures")
        found[file] = {name: best_range(counts) for name, counts in sizes(bundle.file(file), pictures, info, names).items()}
    hashes = tuple(sha256_of(picture) for picture in pictures)
    return found, CalibratedInfo("int8", calibration.choice, calibration.seed, hashes)


def largest(graph: Path, pictures: Iterable[Path], info: ImageInfo, names: Collection[str] | None = None) -> dict[str, NDArray[np.float32]]:
    """Of every value that enters products the largest absolute number of each channel, over a picture's rows: [pictures, channels] by name."""
    rows = [*_run(graph, pictures, info, names, _largest)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def sizes(graph: Path, pictures: Iterable[Path], info: ImageInfo, names: Collection[str] | None = None) -> dict[str, NDArray[np.int64]]:
    """Of every value that enters products how many numbers there are of each size on all pictures, by name; see `histogram`."""
    counts: dict[str, NDArray[np.int64]] = {}
    for values in _run(graph, pictures, info, names, _whole):
        for name, value in values.items():
            counts[name] = counts.get(name, 0) + histogram(value)
    return counts


def histogram(values: NDArray[Any]) -> NDArray[np.int64]:
    """How many numbers there are of each size: counted by the first 15 bits of their absolute value in fp32, which leaves sizes 0.8 % apart."""
    bits = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint32)
    return np.bincount((bits >> np.uint32(16)) & np.uint32(0x7FFF), minlength=2**15)


def size(places: NDArray[np.int64]) -> NDArray[np.float64]:
    """The middle of what `histogram` counts at each place."""
    found: NDArray[np.float64] = ((places.astype(np.uint32) << np.uint32(16)) + np.uint32(2**15)).view(np.float32).astype(np.float64)
    return found


def best_range(counts: NDArray[np.int64]) -> float:
    """The largest number to be kept, of numbers counted by `histogram`: with it as 127, the sum of squared errors is least.

    What lies beyond is cut off. Within, a number that is more than half a step away from zero is off by a twelfth of a step squared on average,
    and a smaller one becomes zero. (Against the largest number, and against percentiles, on the demonstration model:
    `benchmarks/results/calibration.md`.)
    """
    seen = np.flatnonzero(counts)
    values = size(seen)
    tops = values[-1] * FACTORS[:, None]
    steps = tops / MOST
    errors = np.where(values > tops, (values - tops) ** 2, np.where(values < steps / 2, values**2, steps**2 / 12))  # [tops, values]
    return float(tops[(errors @ counts[seen]).argmin(), 0])


def _run(graph: Path, pictures: Iterable[Path], info: ImageInfo, names: Collection[str] | None,
         watch: Callable[[ir.Model, ir.Value], ir.Value]) -> Iterator[dict[str, NDArray[Any]]]:
    """What `watch` makes of every value that enters products with the named weights of a neutral vision graph, by its name, for each picture."""
    model = load(graph)
    dtype, watched = model.graph.inputs[0].dtype, list[str]()
    assert dtype is not None
    for value in entering(model, names):
        result = watch(model, value)
        result.name, result.type = f"watched.{len(watched)}", value.type
        model.graph.outputs.append(result)
        watched.append(value.name or "")
    lower(model)
    session = session_of(model, graph.parent)
    for picture in pictures:
        pixels = images.preprocess(images.load(picture), info, dtype.numpy().name)[None]
        found = dict(zip(watched, session.run([f"watched.{n}" for n in range(len(watched))], {"pixels": pixels})))
        for name, value in found.items():
            if not np.isfinite(value).all():
                raise EdgecompError(f"{name} of {graph.name} is infinite or no number on {picture}: leave the picture out, or compile in fp32")
        yield found


def session_of(model: ir.Model, folder: Path) -> Any:
    """onnxruntime's session of a lowered graph that is no file; its weights' file is in the folder."""
    import onnxruntime as ort
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def _whole(model: ir.Model, value: ir.Value) -> ir.Value:
    """The value itself."""
    model.graph.append(node := ir.node("Identity", [value]))
    node.outputs[0].shape = value.shape
    return node.outputs[0]


def _largest(model: ir.Model, value: ir.Value) -> ir.Value:
    """The largest absolute number of each channel, the last axis."""
    rows = constant(model, f"rows_of_{len(dims(value))}", np.arange(len(dims(value)) - 1, dtype=np.int64))
    absolute = ir.node("Abs", [value])
    node = ir.node("ReduceMax", [absolute.outputs[0], rows], {"keepdims": 0})
    model.graph.extend([absolute, node])
    node.outputs[0].shape = ir.Shape(dims(value)[-1:])
    return node.outputs[0]
