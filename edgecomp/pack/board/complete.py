"""Enters built engines into the manifest: `python3 builder/complete.py VERSION JOB ...`, from the archive's folder. build.sh runs it.

VERSION is TensorRT's as it is installed. Of each job jobs/JOB.done has the engine's SHA-256. Engines of jobs that are not named go out of
the manifest again.
"""
from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.manifest import EngineInfo, FileInfo, Manifest
from edgecomp_runtime.typed import build

BUNDLE, JOBS = Path("bundle"), Path("jobs")
MANIFEST = BUNDLE / "edgecomp.json"


def complete(version: str, done: list[str]) -> Manifest:
    """The manifest with the engines of these jobs. Raises EdgecompError where it is damaged, OSError where it cannot be written."""
    manifest = Manifest.from_json(MANIFEST.read_text(encoding="utf-8"))
    known: dict[str, Any] = json.loads((JOBS / "engines.json").read_text())
    packed: dict[str, EngineInfo] = {name: build(EngineInfo, {**info, "version": version}, f"engine {name}") for name, info in known.items()}
    ours = {info.file for info in packed.values()}
    files = {name: info for name, info in manifest.files.items() if name not in ours}
    files |= {packed[name].file: FileInfo((BUNDLE / packed[name].file).stat().st_size, _sha256(name)) for name in done}
    engines = (*(engine for engine in manifest.engines if engine.file not in ours), *(packed[name] for name in packed if name in done))
    return dataclasses.replace(manifest, files=files, engines=engines)


def write(manifest: Manifest) -> None:
    """Puts the manifest in place when it is whole and on the disk."""
    partial = MANIFEST.with_name(f".{MANIFEST.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(MANIFEST)
    finally:
        partial.unlink(missing_ok=True)


def ready(manifest: Manifest) -> list[str]:
    """The plans all of whose engines are there."""
    have = {engine.graph for engine in manifest.engines}
    return [name for name, plan in manifest.plans.items() if any(set(parts.values()) <= have for parts in plan.variants.values())]


def main() -> int:
    try:
        manifest = complete(sys.argv[1], sys.argv[2:])
        write(manifest)
    except EdgecompError as error:
        print(f"build.sh: {MANIFEST}: {error}; or unpack the archive again: what was built stays", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"build.sh: {error.filename or MANIFEST} cannot be used: {error.strerror}: make room, and run build.sh again", file=sys.stderr)
        return 1
    plans = ready(manifest)
    print(f"bundle/edgecomp.json lists {len(manifest.engines)} engines; plans that can run: {', '.join(plans) or 'none yet'}")
    return 0


def _sha256(name: str) -> str:
    return (JOBS / f"{name}.done").read_text().splitlines()[1].split()[0]


if __name__ == "__main__":
    sys.exit(main())
