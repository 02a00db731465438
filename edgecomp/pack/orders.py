"""What a board is told to build: a job file for each engine, trtexec's arguments for the same, and what building takes."""
from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath

import onnx_ir as ir

from edgecomp.build.jobs import jobs
from edgecomp.build.order import Order
from edgecomp.devices import Device
from edgecomp.dialects.targets import TARGETS
from edgecomp.ir.graphs import load
from edgecomp.pack.releases import Release, numbers, releases
from edgecomp.pack.trtexec import arguments
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.manifest import EngineInfo

BUNDLE, JOBS, LOGS, TIMING = "bundle", "jobs", "logs", "timing.cache"  # folders and files of the archive
# Memory of a build as a multiple of its engine. TensorRT holds the engine whole, and once more the weights that it joins or reorders; parsers
# before 10.13 copy the weights besides, where newer ones map their file.
TIMES_ENGINE = {(0, 0): 3.0, (10, 13): 2.2}
BASE_BYTES = 2**29  # what TensorRT and CUDA take whatever the graph


@dataclass(frozen=True)
class Packed:
    """One engine that the board will build.

    name: of its files. label: the part and the plans it is for. key: changes with everything that the engine is made of. weights: bytes
    of the graph's, which an engine is about as large as. memory: bytes that building is likely to take.
    """
    name: str
    label: str
    key: str
    order: Order
    info: EngineInfo
    weights: int
    memory: int
    trtexec: tuple[str, ...]


def orders(bundle: Bundle, plans: list[str], device: Device, release: Release, flags: dict[str, int | float | str]) -> list[Packed]:
    """The engines of plans that were lowered for a release; plans share some. Raises EdgecompError."""
    tools, labels, found = release.toolchain(device), dict[str, list[str]](), dict[str, tuple[str, EngineInfo]]()
    for plan in plans:
        for job in jobs(bundle, bundle.manifest.plans[plan], device, tools, flags):
            found.setdefault(job.info.file, (job.part, job.info))
            labels.setdefault(job.info.file, []).append(plan)
    return [_packed(bundle, info, f"{part} of {', '.join(labels[info.file])}", release) for part, info in found.values()]


def _packed(bundle: Bundle, info: EngineInfo, label: str, release: Release) -> Packed:
    name, manifest, flags = PurePosixPath(info.file).stem, bundle.manifest, info.flags
    level = flags.get("optimization_level")
    order = Order(graph=f"{BUNDLE}/{info.graph}", out=f"{BUNDLE}/{info.file}", package="tensorrt", capability=None, profile=info.profile,
                  precision=manifest.precision, timing_cache=TIMING, log=f"{LOGS}/{name}.log",
                  optimization_level=None if level is None else int(level),
                  workspace_bytes=int(flags["workspace_mib"]) << 20 if "workspace_mib" in flags else None)
    files, weights = weights_of(bundle, info.graph)
    sources = [(file, manifest.files[file].sha256) for file in (info.graph, *files)]
    key = hashlib.sha256(json.dumps([sources, dataclasses.asdict(order)]).encode()).hexdigest()[:16]
    told = arguments(order, manifest.graphs[info.graph], TARGETS[release.dialect], bundle.path / info.graph)
    return Packed(name, label, key, order, info, weights, BASE_BYTES + int(weights * _times(release)), tuple(told))


def weights_of(bundle: Bundle, graph: str) -> tuple[list[str], int]:
    """The weight files that a graph reads, and the bytes of its weights."""
    found, pieces, inside = set(), dict[tuple[str, int], int](), 0
    for value in load(bundle.path / graph).graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            file = str(PurePosixPath(graph).parent / tensor.location)
            found.add(file)
            pieces[file, tensor.offset or 0] = tensor.nbytes
        elif tensor is not None:
            inside += tensor.nbytes
    return sorted(found), inside + sum(pieces.values())


def files(packed: list[Packed], device: Device, release: Release, wheel: str) -> dict[str, bytes]:
    """The files of the archive's folder `jobs`, by name.

    list: a line for each engine, with tabs: name, key, engine, bytes of the engine and of the memory to build it, label.
    engines.json: what the manifest will say of each. settings.sh: what build.sh has to know of the board.
    """
    found = {}
    for job in packed:
        found[f"{job.name}.json"] = json.dumps(dataclasses.asdict(job.order), indent=1)
        found[f"{job.name}.trtexec"] = "".join(f"{argument}\n" for argument in job.trtexec)
    found["list"] = "".join("\t".join((j.name, j.key, j.order.out, str(j.weights), str(j.memory), j.label)) + "\n" for j in packed)
    found["engines.json"] = json.dumps({job.name: dataclasses.asdict(job.info) for job in packed}, indent=1)
    found["settings.sh"] = "".join(f"{name}={shlex.quote(value)}\n" for name, value in settings(device, release, wheel).items())
    return {name: text.encode() for name, text in found.items()}


def settings(device: Device, release: Release, wheel: str) -> dict[str, str]:
    """What build.sh has to know. RELEASES: for each range of TensorRT versions the newest JetPack of this board that has one of them."""
    ranges = {other.versions: other.jetpack for other in releases(device)}
    return {"DEVICE": device.id, "BOARD": board(device), "JETPACK": release.jetpack, "FROM": release.versions[0], "BEFORE": release.versions[1],
            "RELEASES": " ".join(f"{first}:{end}:{jetpack}" for (first, end), jetpack in ranges.items()), "WHEEL": wheel}


def board(device: Device) -> str:
    """What the board calls itself in /proc/device-tree/model, as far as it says: 'Orin Nano'. Memory and modes are not in it."""
    words = re.split(r"[(/]", device.name.replace("Jetson", ""))[0].split()
    return " ".join(word for word in words if not word[0].isdigit() and word not in ("Super", "Industrial"))


def _times(release: Release) -> float:
    return next(times for since, times in sorted(TIMES_ENGINE.items(), reverse=True) if numbers(release.software.tensorrt)[:2] >= since)
