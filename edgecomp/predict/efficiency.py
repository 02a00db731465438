"""How much of a device's peaks a kernel path reaches: the form of a phase's time, and constants that were fitted to published measurements.

A phase takes the sum of its terms, each an ideal time (or a count of layers) times a constant: the reciprocal of an efficiency, or seconds.

    decode    bytes / bandwidth, layers, and for batches what the further sequences compute
    prefill   operations / peak, recurrent operations / fp16 peak by kind, weights / bandwidth, layers
    vision    operations / peak, layers

The log of a constant is a sum of effects that were fitted together, each leaning towards nothing: of the phase, of the precision that is
computed in, of the engine and weight format, of the device's family, of the device, and of that engine and format on that device. A path
that nobody measured has the sum without what is not known of it. `efficiencies.json` has the effects; `python -m benchmarks.predict --fit`
writes it. CPUs have a table of their own, from times of edgecomp under ONNX Runtime (`python -m benchmarks.cpu_times --fit`), of one machine; what
another one may be off beside is what GPUs are that were not measured.

Where there is a calibration of a device and engine (`edgecomp.predict.calibration`), it corrects the constants.
"""
from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecomp.devices import Device
from edgecomp.predict import calibration
from edgecomp.predict.work import FORMATS, Work
from edgecomp_runtime.errors import EdgecompError, UnknownNameError
from edgecomp_runtime.manifest import Manifest

TABLE = Path(__file__).parent / "efficiencies.json"
CPU_TABLE = Path(__file__).parent / "cpu_efficiencies.json"
TERMS = {"decode": ("bytes", "layers", "batch"), "prefill": ("compute", "delta", "mamba", "bytes", "layers"), "vision": ("compute", "layers")}
# edgecomp's own engines, which nobody has published measurements of, and whose constants stand in for theirs (its own name: nobody's)
KIN = {"TensorRT": "TensorRT Edge-LLM", "TensorRT for RTX": "TensorRT Edge-LLM", "onnxruntime": "onnxruntime"}
# what edgecomp's bundles for a CPU store whole numbers of so many bits in
BLOCKS = {"int8": "int8-block32", "int4": "int4-block32"}
# engines that add up fp16 products in fp16, as their measurements say
ACCUMULATE_IN_FP16 = {"TinyChat 1.x", "TinyChat 2.0", "MLC", "ExLlama v2"}
X86, ARM = "CPU, x86-64", "CPU, aarch64"
# precision: where else its products run on a device that lacks it
PLAIN = ("fp16", "fp16_acc16", "fp32")
INSTEAD = {"fp16_acc16": ("fp16", "fp32"), "fp4": ("fp8", *PLAIN), "fp8": PLAIN, "int8": PLAIN, "fp16": PLAIN[1:], "fp32": ()}


@dataclass(frozen=True)
class Constants:
    """Fitted constants of one path: by term, what they rest on, and half the width of the 90 % interval of log time.

    known: 'path' (this device, engine and format were measured), 'device' (it was with others), 'engine' (it was on other devices) or 'neither'.
    of: the same in words. rows: measurements of the path, or of the nearest thing to it. calibrated: on what, where they were; then values are
    corrected and `spread` is of that.
    """
    known: str
    of: str
    values: dict[str, float]
    rows: int
    spread: float
    calibrated: str | None = None


def peak(device: Device, precision: str) -> float:
    """Operations a second of that precision, or of what takes its place where the device has none. Raises EdgecompError without any."""
    return named_peak(device, precision)[1]


def named_peak(device: Device, precision: str) -> tuple[str, float]:
    """The precision that a device computes one in, and its operations a second. Raises EdgecompError without any."""
    for name in (precision, *INSTEAD[precision]):
        value = getattr(device.peaks, f"{name}_tops" if name == "int8" else f"{name}_tflops")
        if value:
            return name, float(value) * 1e12
    raise EdgecompError(f"the profile of {device.id} has no peak for {precision}: add peaks.{precision}_tflops to it")


def precision_of(engine: str, precision: str) -> str:
    """What an engine computes a precision's products in: some add up fp16 products in fp16, at twice the rate on GeForce cards."""
    return "fp16_acc16" if precision == "fp16" and engine in ACCUMULATE_IN_FP16 else precision


def terms(work: Work, device: Device, phase: str, engine: str, batch: int = 1) -> dict[str, float]:
    """The ideal times in seconds, and the layers, of a phase on a device."""
    bandwidth = device.memory.bandwidth_gb_per_s * 1e9
    compute = sum(count / peak(device, precision_of(engine, precision)) for precision, count in work.flops.items() if ":" not in precision)
    if phase == "decode":
        moved = work.weight_bytes + work.cache_read_bytes + work.cache_write_bytes
        return {"bytes": moved / bandwidth, "layers": float(work.layers), "batch": compute * (1 - 1 / batch)}
    if phase == "vision":
        return {"compute": compute, "layers": float(work.layers)}
    recurrent = {kind: work.flops.get(f"fp16:{kind}", 0.0) / peak(device, "fp16") for kind in ("delta", "mamba")}
    return {"compute": compute, **recurrent, "bytes": work.weight_bytes / bandwidth, "layers": float(work.layers)}


def seconds(constants: dict[str, float], ideal: dict[str, float]) -> float:
    """The time of a phase."""
    return sum(constants[name] * value for name, value in ideal.items())


def family(device: Device) -> str:
    """Devices that lean on one another: one architecture, with memory of its own or shared with the CPU."""
    if device.gpu is None:
        assert device.cpu is not None, "a profile has one of them"
        return X86 if device.cpu.architecture in ("x86_64", "x86-64", "AMD64") else ARM
    return f"{device.gpu.architecture}, {'unified' if device.memory.unified else 'discrete'} memory"


def effects(device: Device, engine: str, weights: str) -> dict[str, str]:
    """The key of each effect that a path's constants have."""
    return {"phase": "all", "precision": precision_of(engine, FORMATS[counted_as(device, weights)].compute), "engine": f"{engine} | {weights}",
            "family": family(device), "device": device.id, "path": f"{engine} | {weights} | {device.id}"}


def known(found: Mapping[str, bool]) -> str:
    """How much of a path was measured, from which of its effects there are."""
    return "path" if found["path"] else "device" if found["device"] else "engine" if found["engine"] else "neither"


@functools.cache
def table() -> dict[str, Any]:
    """The fitted constants as they are stored."""
    data: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return data


@functools.cache
def cpu_table() -> dict[str, Any]:
    """The same of CPUs."""
    data: dict[str, Any] = json.loads(CPU_TABLE.read_text(encoding="utf-8"))
    return data


def engines() -> list[str]:
    """Engines whose measurements were fitted, and those that lean on them."""
    return sorted({*table()["engines"], *KIN})


def stored(engine: str, weights: str) -> str:
    """The format that an engine has for whole numbers of so many bits: llama.cpp's 'q4_0' for 'int4'. Itself, where none was measured, or
    where it was asked for by a name of its own."""
    have = table()["engines"].get(KIN.get(engine, engine), [])
    near = [name for name in have if int(FORMATS[name].bits) == int(FORMATS[weights].bits)]
    return near[0] if weights in ("int8", "int4") and weights not in have and near else weights


def counted_as(device: Device, weights: str) -> str:
    """The format whose bits and products a decoder's weights are counted by, where there is only a config."""
    return BLOCKS.get(weights, weights) if device.gpu is None else weights


def format_of(phase: str, engine: str, manifest: Manifest) -> str:
    """The format of what a phase of a bundle reads: a vision tower stays in the bundle's precision where the decoder's weights are quantized."""
    return stored(engine, manifest.precision if phase == "vision" else manifest.weights)


def constants(phase: str, device: Device, engine: str, weights: str, saved: calibration.Calibration | None = None) -> Constants:
    """The constants of a path, corrected by a calibration of the device where it is given one, see `calibrated`.

    Raises UnknownNameError for an engine that is not in the table, EdgecompError for an engine or format that was not measured on any CPU.
    """
    if engine not in engines():
        raise UnknownNameError("engine", engine, engines())
    found = _of_cpu(phase, device, engine, weights) if device.gpu is None else _of_gpu(phase, device, engine, weights)
    return found if saved is None else _corrected(found, phase, device, weights, saved)


def calibrated(device: Device, engine: str) -> calibration.Calibration | None:
    """The calibration that predictions for a device use. None of a power mode: what was measured does not say in which.

    Raises EdgecompError for one that cannot be read.
    """
    return None if device.mode else calibration.load(device.id, engine)


def _of_gpu(phase: str, device: Device, engine: str, weights: str) -> Constants:
    measured = KIN.get(engine, engine)
    values, found, keys = _summed(table(), phase, device, measured, weights)
    how = known({effect: effect in found for effect in keys})
    nearest = {"path": "path", "device": "device", "engine": "engine", "neither": "phase"}[how]
    words = {"path": f"{measured}, {weights}, on {device.id}", "device": f"pooled: {device.id} with other engines or formats",
             "engine": f"pooled: {measured}, {weights}, on other devices, and {keys['family']}",
             "neither": f"pooled: {keys['family']}"}[how]
    if measured != engine and how in ("path", "engine"):
        words = f"pooled: {words.removeprefix('pooled: ')}, in place of {engine}"
        how = "device" if how == "path" else "neither"  # another engine's measurements tell less
    return Constants(how, words, values, found[nearest]["rows"], float(table()["spread"][phase][how]))


def _of_cpu(phase: str, device: Device, engine: str, weights: str) -> Constants:
    """Of the one machine that was measured, and for another with the width that GPUs have whose engine is known but not they themselves, for
    another architecture with that of neither besides: errors that need not go together, so widths add as squares."""
    data = cpu_table()
    have = data["engines"].get(engine)
    if have is None:
        raise EdgecompError(f"{device.id} is a CPU, and {engine} was not measured on one, but {' and '.join(data['engines'])}: leave out --engine")
    if weights not in have:
        raise EdgecompError(f"{device.id} is a CPU, and {weights} under {engine} was not measured on one, but {' and '.join(have)}: choose of these")
    values, found, keys = _summed(data, phase, device, engine, weights)
    machine, own = data["machine"], float(data["spread"][phase])
    measured, others = f"{engine}, {weights}, on one x86-64 CPU ({machine['chip']}, {machine['cores']} cores)", table()["spread"][phase]
    rows = next(iter(found.values()))["rows"]
    if device.cpu is not None and all(getattr(device.cpu, name) == value for name, value in machine.items()):
        return Constants("path", measured, values, rows, own)
    if keys["family"] == X86:
        return Constants("engine", f"pooled: {measured}; this is another", values, rows, math.hypot(own, others["engine"]))
    return Constants("neither", f"pooled: {measured}; no Arm CPU was measured", values, rows, math.hypot(own, others["engine"], others["neither"]))


def _summed(data: Mapping[str, Any], phase: str, device: Device, engine: str,
            weights: str) -> tuple[dict[str, float], dict[str, Any], dict[str, str]]:
    """The constants of a path, its effects that a table has, and the keys of all."""
    entries, keys = data["effects"][phase], effects(device, engine, weights)
    found = {effect: entries[effect][key] for effect, key in keys.items() if key in entries[effect]}
    sums = [sum(values) for values in zip(*(entry["log"] for entry in found.values()), strict=True)]
    return dict(zip(TERMS[phase], map(math.exp, sums), strict=True)), found, keys


def _corrected(found: Constants, phase: str, device: Device, weights: str, saved: calibration.Calibration) -> Constants:
    """Constants times what a calibration's rows of the phase and format, as measured, are off from them."""
    rows = [row for row in saved.rows if row.phase == phase and row.format == weights]
    if not rows:
        return found
    off = [math.log(row.seconds / seconds(found.values, terms(row.work, device, phase, saved.engine))) for row in rows]
    path = float((cpu_table()["spread"] if device.gpu is None else {name: widths["path"] for name, widths in table()["spread"].items()})[phase])
    correction, spread = calibration.correction(off, [row.model for row in rows], found.spread, min(path, found.spread))
    of = f"calibrated on {saved.words(len(rows))}"
    return Constants("path", of, {name: value * math.exp(correction) for name, value in found.values.items()}, len(rows), spread, of)
