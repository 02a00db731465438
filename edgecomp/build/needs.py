"""What a device needs to have engines built for it and to run them, against what there is here."""
from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

from edgecomp.build.toolchain import at_hand, dialect_of, toolchain
from edgecomp.devices import Device
from edgecomp_runtime.errors import EdgecompError


@dataclass(frozen=True)
class Need:
    """One thing that is needed: whether it is there, and what there is, or what to do."""
    what: str
    ok: bool
    found: str


def needs(device: Device) -> list[Need]:
    """What it takes to build for a device and to run there, in the order in which a person would see to it."""
    found = [_builds(device), *_releases(device)]
    gpu, capability = at_hand(), device.compute_capability
    if not gpu:
        said = "no NVIDIA GPU with a driver and cuda-python here: engines can be built, where that says yes, and run on the device"
    elif gpu != capability:
        said = f"the GPU here has compute capability {gpu}, and {device.id} has {capability}: its engines do not run here"
    else:
        said = f"the GPU here has compute capability {gpu}, as {device.id} has"
    return [*found, Need("run its engines here", gpu == capability, said), _cuda(device)]


def _builds(device: Device) -> Need:
    what = "build its engines here"
    try:
        tools = toolchain(device)
    except EdgecompError as error:
        return Need(what, False, str(error))
    return Need(what, True, f"{tools.backend} {tools.version} for compute capability {tools.capability}, graphs as for {tools.dialect}")


def _releases(device: Device) -> list[Need]:
    """Of a board: what each JetPack brings, and whether graphs can be written for it."""
    found = []
    for software in device.software:
        what = f"pack for {software.release}"
        try:
            dialect = dialect_of("tensorrt", software.tensorrt)
            found.append(Need(what, True, f"TensorRT {software.tensorrt}, CUDA {software.cuda}: graphs as for {dialect}"))
        except EdgecompError as error:
            found.append(Need(what, False, str(error)))
    return found


def _cuda(device: Device) -> Need:
    """cuda-python, whose major version is CUDA's."""
    what = "call CUDA from Python"
    try:
        version = importlib.metadata.version("cuda-bindings")
    except importlib.metadata.PackageNotFoundError:
        majors = sorted({software.cuda.partition(".")[0] for software in device.software}) or ["12", "13"]
        return Need(what, False, f"cuda-python is not installed: pip install 'cuda-python=={majors[-1]}.*' (the major version is CUDA's, "
                                 f"{' or '.join(majors)} for {device.id})")
    return Need(what, True, f"cuda-bindings {version} on Python {platform.python_version()}")
