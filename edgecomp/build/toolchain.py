"""Which TensorRT builds for a device, and whether it can be had here."""
from __future__ import annotations

import importlib
import platform
from dataclasses import dataclass

from edgecomp.devices import RTX_CAPABILITIES, Device
from edgecomp.dialects.targets import TARGETS
from edgecomp_runtime.backends import BACKENDS, installed
from edgecomp_runtime.errors import EdgecompError, UnknownNameError

BUILDERS = ("tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class Toolchain:
    """What builds an engine: the backend that will run it, its Python package and version, and the compute capability it is for."""
    backend: str
    package: str
    version: str
    capability: str

    @property
    def dialect(self) -> str:
        """The row of the table of releases that this version is lowered for."""
        return dialect_of(self.backend, self.version)


def toolchain(device: Device, backend: str | None = None) -> Toolchain:
    """What builds for a device on this machine: TensorRT for RTX where it knows the GPU, else TensorRT for the GPU at hand.

    Raises:
        EdgecompError: no TensorRT here builds for that device; the message says what does.
    """
    known, capability = device.compute_capability in RTX_CAPABILITIES, device.compute_capability
    jetson = device.family == "Jetson"
    if not capability:
        raise EdgecompError(f"{device.id} has no NVIDIA GPU, so there are no engines for it: bundles run there as they are, on ONNX Runtime")
    if backend is not None and backend not in BUILDERS:
        raise UnknownNameError("backend", backend, BUILDERS)
    if jetson and platform.machine() != "aarch64":
        raise EdgecompError(f"engines for {device.id} are built on the board itself, by JetPack's TensorRT, and not on {platform.machine()}: "
                            f"`edgecomp pack BUNDLE --device {device.id} -o OUT.tar` makes an archive that does it there")
    chosen = backend or ("tensorrt-rtx" if known and not jetson else "tensorrt")
    if chosen == "tensorrt-rtx" and not known:
        raise EdgecompError(f"TensorRT for RTX builds for compute capability {', '.join(RTX_CAPABILITIES)}, and {device.id} has {capability}: "
                            "build with --backend tensorrt on the machine that has it")
    package = BACKENDS[chosen][1]
    if not installed(package):
        where = "on a machine with that GPU, " if chosen == "tensorrt" else ""
        raise EdgecompError(f"building for {device.id} needs {chosen}, which is not installed: {where}pip install 'edgecomp[{chosen}]'")
    if chosen == "tensorrt" and (here := at_hand()) != capability:
        found = f"whose compute capability is {here}" if here else "and there is none here"
        raise EdgecompError(f"TensorRT builds for the GPU at hand, {found}; {device.id} has compute capability {capability}: "
                            "build on a machine with that GPU")
    return Toolchain(chosen, package, str(importlib.import_module(package).__version__), capability)


def dialect_of(backend: str, version: str) -> str:
    """The newest release of the table that is not newer than a version, as '10.3.0.30'. Raises EdgecompError where there is none."""
    mine = {name: _numbers(name.removeprefix(f"{backend}-")) for name in TARGETS if name.removeprefix(f"{backend}-")[0].isdigit()}
    older = [name for name, numbers in mine.items() if numbers <= _numbers(version)]
    if not older:
        raise EdgecompError(f"{backend} {version} is older than {min(mine, key=lambda name: mine[name])}, the first that edgecomp writes graphs for")
    return max(older, key=lambda name: mine[name])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def at_hand() -> str:
    """Compute capability of the GPU here, '' where there is none."""
    try:
        from edgecomp_runtime.backends.cuda import capability
        return capability()
    except (ImportError, EdgecompError):
        return ""
