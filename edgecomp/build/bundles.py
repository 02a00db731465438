"""Building a bundle's engines for a device, one after another; each is in the bundle as soon as it is done, so that a later run goes on."""
from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgecomp.build.building import Result, build_engine
from edgecomp.build.jobs import Job, check_fits, jobs
from edgecomp.build.toolchain import Toolchain
from edgecomp.devices import Device
from edgecomp.lowering import with_dialect
from edgecomp.writer import UNWRITABLE, copy_files, writing
from edgecomp_runtime.bundle import Bundle, user_cache
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import SCHEMA

Tick = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Built:
    """An engine that was built: the plan and part that it is for, its file, and what building it took."""
    plan: str
    part: str
    file: str
    result: Result


def build_bundle(path: Path, device: Device, tools: Toolchain, plans: Sequence[str], *, flags: dict[str, int | float | str] | None = None,
                 say: Callable[[str], None] = lambda line: None, tick: Callable[[Job], Tick] = lambda job: lambda *done: None) -> list[Built]:
    """Lowers plans for a toolchain and builds what engines they lack. Engines that are there already, of the same graph, version, device,
    shapes and flags, are left as they are.

    Args:
        path: the bundle.
        device: to build for.
        tools: what builds for it.
        plans: by name.
        flags: 'optimization_level' and 'workspace_mib', where the builder's own defaults are not wanted.
        say: is told what is being done.
        tick: gives for an engine what is told of its progress.

    Raises:
        EdgecompError: a plan that does not fit the device, a graph that is refused, a full disk, a builder that fails; the bundle is whole
            then, and has what was built before.
    """
    bundle = Bundle.open(path)
    for name in plans:
        check_fits(bundle, bundle.plan(name)[0], device)
    with _alone(path) as folder:
        bundle = _lowered(bundle, plans, tools.dialect, say)
        built = []
        for name in plans:
            for job in jobs(bundle, bundle.manifest.plans[name], device, tools, flags or {}):
                if job.info in bundle.manifest.engines:
                    continue
                say(f"building {job.part} of {name} for {device.id}")
                result = _build(bundle, job, tools, folder, tick(job))
                built.append(Built(name, job.part, job.info.file, result))
                bundle = _added(bundle, job, folder)
    return built


def _lowered(bundle: Bundle, plans: Sequence[str], dialect: str, say: Callable[[str], None]) -> Bundle:
    missing = [name for name in plans if dialect not in bundle.manifest.plans[name].variants]
    if not missing:
        return bundle
    manifest = bundle.manifest
    graphs = dict(manifest.graphs)
    with writing(bundle.path) as (partial, finish):
        copy_files(bundle, partial)
        every = with_dialect(manifest.plans, missing, dialect, graphs, partial, say)
        finish(dataclasses.replace(manifest, schema=SCHEMA, plans=every, graphs=graphs))
    return Bundle.open(bundle.path)


def _build(bundle: Bundle, job: Job, tools: Toolchain, folder: Path, tick: Tick) -> Result:
    info, timing = job.info, user_cache() / "timing" / f"{tools.backend}-{tools.version}-{tools.capability}.cache"
    try:
        timing.parent.mkdir(parents=True, exist_ok=True)
    except OSError:  # a machine without a writable cache times every kernel anew, and that is all it loses
        timing = folder / "timing.cache"
    return build_engine({
        "graph": str(bundle.file(info.graph)), "out": str(folder / "engine"), "log": str(folder / "log"), "package": tools.package,
        "capability": tools.capability if tools.backend == "tensorrt-rtx" else None, "profile": info.profile, "precision": bundle.manifest.precision,
        "timing_cache": str(timing), "workspace_bytes": int(info.flags["workspace_mib"]) * 2**20 if "workspace_mib" in info.flags else None,
        "optimization_level": info.flags.get("optimization_level")}, tick)


def _added(bundle: Bundle, job: Job, folder: Path) -> Bundle:
    """The bundle with an engine and its log; another that had its place goes."""
    manifest, log = bundle.manifest, str(Path(job.info.file).with_suffix(".log"))
    engines = (*(engine for engine in manifest.engines if engine.file != job.info.file), job.info)
    files = {name: info for name, info in manifest.files.items() if name not in (job.info.file, log)}
    with writing(bundle.path) as (partial, finish):
        copy_files(Bundle(bundle.path, dataclasses.replace(manifest, files=files)), partial)
        (partial / job.info.file).parent.mkdir(parents=True, exist_ok=True)
        (folder / "engine").rename(partial / job.info.file)
        (folder / "log").rename(partial / log)
        finish(dataclasses.replace(manifest, schema=SCHEMA, engines=engines, files=files))
    return Bundle.open(bundle.path)


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """A folder beside the bundle to build in, that no other build of it uses. What a killed one left there goes first.

    Raises:
        EdgecompError: another build is under way, or the folder cannot be made.
    """
    folder = path.absolute().parent / f".{path.absolute().name}.build"
    try:
        folder.mkdir(exist_ok=True)
        lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise EdgecompError(f"{folder} cannot be made: {error.strerror}; engines are built beside the bundle") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise EdgecompError(f"another build of {path} is under way: wait for it, or end it") from None
    try:
        for left in folder.iterdir():
            if left.name != "lock":
                left.unlink()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
