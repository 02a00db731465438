"""What `edgecomp sweep` measured, read back from FOLDER/sweep.json: accuracies, by method, site and budget."""
from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from edgecomp_runtime.errors import EdgecompError, InputError
from edgecomp_runtime.typed import build

PLAIN = ("fp32", "fp16")  # measured in one of them, accuracy is taken for both


@dataclass(frozen=True)
class Row:
    """A row of a sweep, as far as it is read of what `edgecomp.sweep.tables` writes: accuracy in percent, tokens of one picture."""
    method: str
    parameters: dict[str, int | float | str]
    sites: tuple[str, ...]
    position: str
    windows: str
    keep: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    metric: str
    questions: int
    pictures: int
    tokens_entering: int
    tokens_mean: float
    plans: tuple[str, ...]
    loses_to: tuple[str, ...]


@dataclass(frozen=True)
class About:
    """The bundle that was measured. weights: what its weights are stored in, where that is not `precision`."""
    name: str
    family: str
    precision: str
    tokens: int
    decoder_layers: int
    hidden: int
    weights: str | None = None


@dataclass(frozen=True)
class Machine:
    """What it was measured on."""
    cpu: str


@dataclass(frozen=True)
class File:
    """sweep.json, as far as it is read."""
    bundle: About
    machine: Machine
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Sweep:
    """One sweep. full: the row of the uncompressed model. machine: what it was measured on."""
    folder: Path
    about: About
    machine: str
    rows: tuple[Row, ...]
    full: Row

    @property
    def precision(self) -> str:
        """What it was measured in."""
        return self.about.weights or self.about.precision

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those whose accuracy it tells."""
        return PLAIN if self.precision in PLAIN else (self.precision,)


def read(folders: Sequence[Path]) -> list[Sweep]:
    """The sweeps of those folders. Raises InputError where one cannot be read, or they cannot be ranked together."""
    found = [_sweep(folder) for folder in folders]
    for other in found[1:]:
        asked, here = ((s.full.questions, s.full.pictures, s.full.metric, s.about.family, s.about.tokens) for s in (found[0], other))
        if asked != here:
            raise InputError(f"--sweep {found[0].folder} and {other.folder} cannot be ranked together, one has {_asked(found[0])}, the other "
                             f"{_asked(other)}: give one of them")
    return found


def check(sweep: Sweep, family: str, layers: int, hidden: int, tokens: int | None = None) -> None:
    """Raises InputError where a sweep is of another model, or of pictures with another number of tokens."""
    about = sweep.about
    if (about.family, about.decoder_layers, about.hidden, about.tokens) != (family, layers, hidden, tokens or about.tokens):
        there = f" and {about.tokens} tokens a picture" if tokens else ""
        here = f" and {tokens}" if tokens else ""
        raise InputError(f"--sweep {sweep.folder} is of {about.name} ({about.family}, {about.decoder_layers} layers of width {about.hidden}{there}), "
                         f"and the model is {family} with {layers} of width {hidden}{here}: give a sweep of this model")


def _asked(sweep: Sweep) -> str:
    return (f"{sweep.full.questions} questions ({sweep.full.metric}) about {sweep.full.pictures} pictures to {sweep.about.family} with "
            f"{sweep.about.tokens} tokens")


def _sweep(folder: Path) -> Sweep:
    file = folder / "sweep.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--sweep {folder}: {file} cannot be read ({error.strerror}): give the folder of a finished `edgecomp sweep`") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON ({error}): run the sweep's command again, which goes on from what was measured") from None
    if isinstance(data, dict):
        rows = data.get("rows")
        data = {"bundle": _only(About, data.get("bundle")), "machine": _only(Machine, data.get("machine")),
                "rows": [_only(Row, row) for row in rows] if isinstance(rows, list) else rows}
    try:
        found: File = build(File, data, "sweep.json")
    except EdgecompError as error:
        raise InputError(f"{file} was not written by this edgecomp ({error}): run the sweep's command again") from None
    for row in found.rows:
        if not row.plans:
            raise InputError(f"{file}: {row.method} with {row.keep} tokens has no plan: the file was changed; run the sweep's command again")
        if wrong := [site for site in row.sites if not re.fullmatch(r"projector|(encoder|decoder):[0-9]{1,4}", site)]:
            raise InputError(f"{file}: {row.method} stands at {wrong[0]!r}, which is no site: the file was changed; run the sweep's command again")
        if not 0 <= row.accuracy <= 100 or not 0 < row.keep <= found.bundle.tokens or not 0 < row.tokens_mean <= found.bundle.tokens:
            raise InputError(f"{file}: {row.method} with {row.keep} tokens has an accuracy of {row.accuracy} and {row.tokens_mean} tokens on the "
                             f"mean, of {found.bundle.tokens}: the file was changed; run the sweep's command again")
    full = next((row for row in found.rows if row.method == "none"), None)
    if full is None or full.accuracy <= 0:
        raise InputError(f"{file}: the full model was not measured, or answered nothing right: run the sweep's command again")
    return Sweep(folder, found.bundle, found.machine.cpu, found.rows, full)


def _only(kind: type, value: object) -> object:
    """Of a table the entries that a dataclass has fields for: a sweep's file tells more than is needed here."""
    names = {field.name for field in fields(kind)}
    return {key: part for key, part in value.items() if key in names} if isinstance(value, dict) else value
