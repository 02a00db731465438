"""Packing a bundle for a board: lowers its plans for the board's TensorRT and writes one tar file, that is whole or not there."""
from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import string
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import edgecomp
from edgecomp.build.jobs import check_fits
from edgecomp.devices import Device
from edgecomp.lowering import with_dialect
from edgecomp.pack import orders, wheel
from edgecomp.pack.builder import BOARD, modules
from edgecomp.pack.orders import BUNDLE, JOBS, Packed
from edgecomp.pack.releases import Release
from edgecomp.writer import above
from edgecomp_runtime.bundle import MANIFEST, Bundle, sha256_of
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import SCHEMA, FileInfo

SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Entry:
    """A file of the archive: its content or where it is, and its hash where that is known."""
    content: bytes | Path
    sha256: str
    mode: int = 0o644

    @classmethod
    def of(cls, content: bytes, mode: int = 0o644) -> Entry:
        return cls(content, hashlib.sha256(content).hexdigest(), mode)


def pack(bundle: Bundle, device: Device, release: Release, plans: Sequence[str], out: Path, *, flags: dict[str, int | float | str] | None = None,
         say: Callable[[str], None] = lambda line: None) -> list[Packed]:
    """Writes an archive that builds a bundle's engines on a board.

    Args:
        bundle: an open one; it is not changed.
        device: a Jetson.
        release: its JetPack.
        plans: by name.
        out: the tar file; its name without .tar is the folder in it. One that is there is replaced when the new one is whole.
        flags: 'optimization_level' and 'workspace_mib', where the builder's own defaults are not wanted.
        say: is told what is being done.

    Returns:
        The engines that the board will build.

    Raises:
        EdgecompError: `out` is no name for a tar file, a plan does not fit the device or its TensorRT, or the disk is full or not writable.
    """
    if out.suffix != ".tar":
        raise EdgecompError(f"{out} has to end in .tar: the archive is not compressed, for weights do not shrink")
    for name in plans:
        check_fits(bundle, name, device)
    with _beside(out) as folder:
        mine = _lowered(bundle, plans, release.dialect, folder / BUNDLE, say)
        packed = orders.orders(mine, list(plans), device, release, flags or {})
        mine = _with_weights(mine)
        say(f"writing {out}")
        _write(folder / "archive", out.stem, _entries(mine, packed, device, release, out.stem))
        (folder / "archive").replace(out)
    return packed


def _lowered(bundle: Bundle, plans: Sequence[str], dialect: str, folder: Path, say: Callable[[str], None]) -> Bundle:
    """A bundle of those plans and the full one, which every bundle has, with no other dialect than this one; in a folder of links to its files."""
    manifest, graphs = bundle.manifest, dict(bundle.manifest.graphs)
    for file in manifest.files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).symlink_to(bundle.file(file).resolve())
    lowered = with_dialect(manifest.plans, plans, dialect, graphs, folder, say)
    every = {name: dataclasses.replace(lowered[name], variants={kind: graph for kind, graph in lowered[name].variants.items()
                                                                if kind == "neutral" or (kind == dialect and name in plans)})
             for name in dict.fromkeys(["full", *plans])}
    used = {file for plan in every.values() for parts in plan.variants.values() for file in parts.values()}
    files = {file: manifest.files.get(file) or FileInfo((folder / file).stat().st_size, sha256_of(folder / file)) for file in sorted(used)}
    default = manifest.default_plan if manifest.default_plan in plans else plans[0]
    return Bundle(folder, dataclasses.replace(manifest, schema=SCHEMA, default_plan=default, plans=every, graphs={f: graphs[f] for f in sorted(used)},
                                              files={**manifest.files, **files}, engines=()))


def _with_weights(bundle: Bundle) -> Bundle:
    """The bundle with the files alone that its graphs and the host read."""
    manifest = bundle.manifest
    used = {manifest.embeddings.file, manifest.text.tokenizer, *manifest.graphs, *filter(None, [manifest.text.chat_template])}
    for graph in manifest.graphs:
        used.update(orders.weights_of(bundle, graph)[0])
    return Bundle(bundle.path, dataclasses.replace(manifest, files={file: manifest.files[file] for file in sorted(used)}))


def _entries(bundle: Bundle, packed: list[Packed], device: Device, release: Release, name: str) -> dict[str, Entry]:
    """The archive's files by their names below its folder."""
    manifest, wheel_file = bundle.manifest, wheel.file_name()
    entries = {f"{BUNDLE}/{file}": Entry(bundle.path / file, info.sha256) for file, info in manifest.files.items()}
    entries |= {f"{JOBS}/{file}": Entry.of(content) for file, content in orders.files(packed, device, release, wheel_file).items()}
    entries |= {f"builder/{file}": Entry.of(path.read_bytes()) for file, path in modules().items()}
    entries |= {"build.sh": Entry.of((BOARD / "build.sh").read_bytes(), 0o755), "ask.py": Entry.of((BOARD / "ask.py").read_bytes()),
                wheel_file: Entry.of(wheel.wheel(release.software.cuda))}
    plans = ", ".join(plan for plan, info in manifest.plans.items() if release.dialect in info.variants)
    entries["README.txt"] = Entry.of(string.Template((BOARD / "README.txt").read_text()).substitute(
        name=name, device=device.name, jetpack=release.jetpack, tensorrt=release.software.tensorrt, plans=plans, wheel=wheel_file,
        version=edgecomp.__version__).encode())
    sums = "".join(f"{entry.sha256}  {file}\n" for file, entry in sorted(entries.items()))
    # the manifest has its own digest, and the engines are added to it
    return {**entries, SUMS: Entry.of(sums.encode()), f"{BUNDLE}/{MANIFEST}": Entry.of(manifest.to_json().encode())}


def _write(path: Path, name: str, entries: dict[str, Entry]) -> None:
    """Writes the tar file: the same entries make the same bytes."""
    folders = {parent.as_posix() for file in entries for parent in (Path(name) / file).parents} - {"."}
    with path.open("wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        for member in sorted([*folders, *(f"{name}/{entry}" for entry in entries)]):
            info = tarfile.TarInfo(member)
            if member in folders:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(info)
                continue
            entry = entries[member.removeprefix(f"{name}/")]
            info.mode = entry.mode
            with io.BytesIO(entry.content) if isinstance(entry.content, bytes) else entry.content.open("rb") as source:
                info.size = source.seek(0, os.SEEK_END)
                source.seek(0)
                tar.addfile(info, source)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A folder to work in beside a file that will be written; it goes in the end. Raises EdgecompError where the file cannot be written there."""
    with above(out):
        if out.is_dir():
            raise EdgecompError(f"{out} is a folder: choose another name, or remove it first")
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent, ignore_cleanup_errors=True) as folder:
            yield Path(folder)
