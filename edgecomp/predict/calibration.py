"""Calibrations: what `edgecomp profile --save` measured on a device, and how far predictions for it are corrected by that.

One JSON file a device and engine, beside the profiles that are the user's own. A row is one phase of one plan: what its graphs ask for, and
the seconds that it took.
"""
from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from edgecomp import __version__, devices
from edgecomp.predict.work import FORMATS, TIMED, Work
from edgecomp_runtime.errors import BundleError, EdgecompError
from edgecomp_runtime.typed import build

PRECISIONS = {format_.compute for format_ in FORMATS.values()}
PACKAGES = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu"), "TensorRT": ("tensorrt",), "TensorRT for RTX": ("tensorrt_rtx",)}
AGAIN = "measure again with `edgecomp profile --save`"
ENOUGH = 9  # rows: of fewer none is the 90 % quantile as conformal prediction counts it


@dataclass(frozen=True)
class Measured:
    """One phase of a bundle's plan: `seconds` is the median. model: the checkpoint that it was made from. format: of its weights."""
    phase: str
    format: str
    model: str
    plan: str
    prompt_rows: int
    work: Work
    seconds: float


@dataclass(frozen=True)
class Calibration:
    """What was measured on a device with one engine, by which versions, and when last."""
    device: str
    engine: str
    created: str
    edgecomp: str
    engine_version: str
    rows: tuple[Measured, ...]

    def words(self, rows: int) -> str:
        """Its name, date and so many rows; its versions where others are installed now."""
        now = version(self.engine)
        other = [f"edgecomp {self.edgecomp}"] * (self.edgecomp != __version__)
        other += [f"{self.engine} {self.engine_version}"] * (self.engine_version != now)
        return f"{self.device}, {self.created}, {rows} row{'s' * (rows != 1)}" + (f", with {' and '.join(other)}" if other else "")


def version(engine: str) -> str:
    """Of the package behind an engine; 'not installed' where there is none."""
    for package in PACKAGES.get(engine, ()):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def file(device: str, engine: str) -> Path:
    """Where a device's calibration of an engine is kept."""
    return devices.own_folder() / f"{device}.{re.sub(r'[^a-z0-9]+', '-', engine.lower())}.json"


def load(device: str, engine: str) -> Calibration | None:
    """The calibration of a device and engine; None where there is none. Raises EdgecompError where it cannot be read or makes no sense."""
    path = file(device, engine)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise EdgecompError(f"{path}: cannot be read ({error}): remove the file, or {AGAIN}") from None
    try:
        found: Calibration = build(Calibration, json.loads(text), str(path))
    except BundleError as error:
        raise EdgecompError(f"{error}: remove the file, or {AGAIN}") from None
    except (ValueError, RecursionError) as error:
        raise EdgecompError(f"{path}: no JSON ({error}): remove the file, or {AGAIN}") from None
    if problem := _problem(found, device, engine):
        raise EdgecompError(f"{path}: {problem}: remove the file, or {AGAIN}")
    return found


def _problem(found: Calibration, device: str, engine: str) -> str:
    """What the types cannot say; '' where nothing is wrong."""
    if (found.device, found.engine) != (device, engine):
        return f"it is of {found.device} and {found.engine}, but named as of {device} and {engine}"
    for at, row in enumerate(found.rows):
        work = row.work
        if row.phase not in TIMED or row.format not in FORMATS or not PRECISIONS.issuperset(name.partition(":")[0] for name in work.flops):
            return f"rows[{at}]: {row.phase!r} in {row.format!r} and {', '.join(work.flops)} is no phase, weight format and precision"
        numbers = (*work.flops.values(), work.weight_bytes, work.cache_read_bytes, work.cache_write_bytes, work.activation_bytes, float(work.layers))
        if not 0 < row.seconds < math.inf or not all(0 <= number < math.inf for number in numbers) or not sum(work.flops.values()) > 0:
            return f"rows[{at}]: {row.phase} took {row.seconds} s for {sum(work.flops.values()):g} operations, which cannot be"
    return "" if found.rows else "it has no rows"


def save(new: Calibration) -> Path:
    """Writes a calibration. Rows that are there already by the same versions stay, but for those of the same run; of others they go."""
    path, old = file(new.device, new.engine), load(new.device, new.engine)
    kept = old.rows if old and _versions(old) == _versions(new) else ()
    rows = {_run(row): row for row in (*kept, *new.rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.part")
    try:
        beside.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(new, rows=tuple(rows.values()))), indent=1) + "\n", encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def _versions(calibration: Calibration) -> tuple[str, str]:
    return calibration.edgecomp, calibration.engine_version


def _run(row: Measured) -> tuple[object, ...]:
    return row.phase, row.format, row.model, row.plan, row.prompt_rows


def correction(off: Sequence[float], models: Sequence[str], before: float, path: float) -> tuple[float, float]:
    """The log by which predictions of a phase are to be moved, and half the width of the 90 % interval of log time then.

    The median of what the rows are off, times n / (n + (path / before)^2): the mean of a normal distribution of the width of what is not known
    of the device, given n values with the width of what is not known of a model. n counts models, for rows of one model are off together.
    For the same reason the rows' own spread is the interval where they are of several models and enough; else it is no less than `path`.

    Args:
        off: log(measured / predicted) of each row.
        models: whose row it is.
        before: half the width of the interval without the calibration.
        path: the same on a device, with an engine and a format that were measured, with other models.
    """
    count = len(set(models))
    moved = median(off) * count / (count + (path / before) ** 2)
    rest = sorted(abs(each - moved) for each in off)
    own = rest[min(len(rest), math.ceil(0.9 * (len(rest) + 1))) - 1]
    return moved, own if count > 1 and len(rest) >= ENOUGH else max(own, path)
