"""Writing bundles: into a folder beside the goal, renamed when whole, so that a failure or Ctrl-C leaves no half bundle."""
from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgecomp_runtime.bundle import MANIFEST, Bundle, sha256_of
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import FileInfo, Manifest


@contextmanager
def writing(out: Path) -> Iterator[tuple[Path, Callable[[Manifest], None]]]:
    """Gives a folder to fill and a function that completes the manifest's file table and puts the bundle in place.

    Files that the manifest already lists with a hash keep it; every other file is hashed.

    Raises:
        EdgecompError: the goal exists and is no bundle, or the disk is full or not writable.
    """
    if out.exists() and not (out / MANIFEST).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise EdgecompError(f"{out} exists and is not a bundle: choose another name, or remove it first")
    partial: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        partial.chmod(0o755)  # mkdtemp makes private folders; a bundle is read by others too
        yield partial, lambda manifest: _finish(partial, out, manifest)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        free = shutil.disk_usage(out.parent).free / 2**20 if out.parent.exists() else 0
        raise EdgecompError(f"{out} cannot be written: {error.strerror} ({free:.0f} MiB free there); nothing was left behind") from None
    finally:
        if partial is not None and partial.exists():
            shutil.rmtree(partial)


def _finish(partial: Path, out: Path, manifest: Manifest) -> None:
    files = {}
    for path in sorted(p for p in partial.rglob("*") if p.is_file()):
        name = path.relative_to(partial).as_posix()
        files[name] = manifest.files.get(name) or FileInfo(path.stat().st_size, sha256_of(path))
    (partial / MANIFEST).write_text(dataclasses.replace(manifest, files=files).to_json(), encoding="utf-8")
    old = None
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
        out.rename(old / out.name)
    partial.rename(out)
    if old is not None:
        shutil.rmtree(old)


def copy_files(bundle: Bundle, partial: Path) -> None:
    """Puts every file of a bundle into the folder: hard links where the file system can, for weights are large."""
    for name in bundle.manifest.files:
        source, goal = bundle.file(name), partial / name
        goal.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, goal)
        except OSError:
            shutil.copyfile(source, goal)
