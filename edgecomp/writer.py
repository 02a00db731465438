"""Writing bundles: into a folder beside the goal, renamed when whole, so that a failure or Ctrl-C leaves no half bundle."""
from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgecomp_runtime.bundle import MANIFEST, Bundle, sha256_of
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import FileInfo, Manifest

# what an operating system answers where a bundle cannot be put
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST,
              errno.ENAMETOOLONG, errno.EBUSY, errno.EINVAL)


@contextmanager
def goal(out: Path) -> Iterator[None]:
    """Checks that a bundle may stand at `out` and makes the folders above it; see `above`.

    Raises:
        EdgecompError: the goal exists and is no bundle, or the disk is full or not writable.
    """
    with above(out):
        if out.exists() and not (out / MANIFEST).is_file() and not (out.is_dir() and not any(out.iterdir())):
            raise EdgecompError(f"{out} exists and is not a bundle: choose another name, or remove it first")
        yield


@contextmanager
def above(out: Path) -> Iterator[None]:
    """Makes the folders above a file or folder to be written. They go again where the writing fails.

    Raises:
        EdgecompError: the disk is full or not writable.
    """
    made: list[Path] = []
    try:
        made = [folder for folder in out.parents if not folder.exists()]
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        for folder in made:
            with suppress(OSError):  # never made, or no longer ours alone
                folder.rmdir()
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise EdgecompError(_unwritable(out, error)) from None
        raise


@contextmanager
def writing(out: Path) -> Iterator[tuple[Path, Callable[[Manifest], None]]]:
    """Gives a folder to fill and a function that completes the manifest's file table and puts the bundle in place.

    Files that the manifest already lists with a hash keep it; every other file is hashed. Raises what `goal` raises.
    """
    with goal(out):
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            partial.chmod(0o755)  # mkdtemp makes private folders; a bundle is read by others too
            yield partial, lambda manifest: _finish(partial, out, manifest)
        finally:
            if partial.exists():
                shutil.rmtree(partial)


def _unwritable(out: Path, error: OSError) -> str:
    free = next((shutil.disk_usage(folder).free for folder in out.absolute().parents if folder.is_dir()), 0)
    missing = f": {error.filename}" if error.errno == errno.ENOENT else ""
    return (f"{out} cannot be written: {error.strerror}{missing} ({free / 2**20:.0f} MiB free there); nothing was left behind: "
            "make room, or choose another place")


def _finish(partial: Path, out: Path, manifest: Manifest) -> None:
    files = {}
    for path in sorted(p for p in partial.rglob("*") if p.is_file()):
        name = path.relative_to(partial).as_posix()
        files[name] = manifest.files.get(name) or FileInfo(path.stat().st_size, sha256_of(path))
    (partial / MANIFEST).write_text(dataclasses.replace(manifest, files=files).to_json(), encoding="utf-8")
    with _interrupts_later():
        _put_in_place(partial, out)


def _put_in_place(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    try:
        out.rename(old / out.name)
        try:
            partial.rename(out)
        except OSError:
            (old / out.name).rename(out)
            raise
    finally:
        shutil.rmtree(old)


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Ctrl-C waits until the end. Only the main thread gets it, and only there can it be held up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting:
            signal.raise_signal(waiting[0])


def copy_files(bundle: Bundle, partial: Path, names: Iterable[str] | None = None) -> None:
    """Puts files of a bundle, all of them if none are named, into the folder: hard links where the file system can, for weights are large."""
    for name in bundle.manifest.files if names is None else names:
        source, goal = bundle.file(name), partial / name
        goal.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, goal)
        except OSError:
            shutil.copyfile(source, goal)
