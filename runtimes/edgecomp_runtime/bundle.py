"""A compiled bundle on disk: a folder with `edgecomp.json`, graphs, weights, tokenizer. Opened only when it is whole.

Manifest, graphs and text files are hashed at every open; weight files, which can be gigabytes, once, and then trusted
while size, time and inode match a stamp in the user's cache. Nothing in a bundle is code, and no path may leave it.
"""
from __future__ import annotations

import hashlib
import json
import os
import stat
from contextlib import suppress
from pathlib import Path, PurePosixPath

import numpy as np

from edgecomp_runtime.errors import BundleError, UnknownNameError
from edgecomp_runtime.manifest import FileInfo, Manifest, PlanInfo

MANIFEST = "edgecomp.json"
HASH_ALWAYS_BELOW = 16 * 2**20  # bytes; a file this small is hashed in about ten milliseconds


def user_cache() -> Path:
    """The folder for what can be made again: EDGECOMP_CACHE, else the system's cache folder."""
    if given := os.environ.get("EDGECOMP_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgecomp"


class Bundle:
    """A bundle that was found whole. `open` is the way in.

    Attributes:
        path: the folder.
        manifest: what is in it (`edgecomp_runtime.manifest.Manifest`).
    """

    def __init__(self, path: Path, manifest: Manifest):
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify_hashes: bool = False) -> Bundle:
        """Opens and checks a bundle.

        Args:
            path: the bundle's folder.
            verify_hashes: hash the weight files again, even where they were seen unchanged before.

        Raises:
            BundleError: it is no bundle, of a newer schema, cut short, changed, or names a path outside itself.
        """
        root = Path(path)
        try:
            text = (root / MANIFEST).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{root} is not a bundle: {MANIFEST} cannot be read ({_reason(error)}); "
                              "make one with `edgecomp compile MODEL -o BUNDLE`") from None
        manifest = Manifest.from_json(text)
        bundle = cls(root, manifest)
        for name, expected in manifest.files.items():
            _check_file(bundle.file(name), name, expected, verify_hashes)
        named = {g for p in manifest.plans.values() for v in p.variants.values() for g in v.values()} | set(manifest.graphs)
        named |= {manifest.embeddings.file, manifest.text.tokenizer} | {f for f in [manifest.text.chat_template] if f}
        if unlisted := sorted(named - set(manifest.files)):
            raise BundleError(f"{root}: {unlisted[0]} is used but has no hash in {MANIFEST}: compile the bundle again")
        _check_sense(manifest)
        return bundle

    def file(self, name: str) -> Path:
        """The path of a file of the bundle. Raises BundleError where the name would leave the bundle."""
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or not name.isprintable() or not pure.parts:
            raise BundleError(f"the bundle names the file {name!r}, which is not inside it: do not use this bundle")
        path = self.path.joinpath(*pure.parts)
        try:
            inside = path.resolve().is_relative_to(self.path.resolve())
        except (OSError, RuntimeError):  # links in a circle, until Python 3.12 a RuntimeError
            inside = False
        if not inside:
            raise BundleError(f"{name!r} is a link that leaves the bundle: do not use this bundle")
        return path

    def read_text(self, name: str) -> str:
        """The text of a file of the bundle. Raises BundleError where it is not UTF-8."""
        try:
            return self.file(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise BundleError(f"{name} of the bundle is not UTF-8 text ({error.reason} at byte {error.start}): compile the bundle again") from None

    def plan(self, name: str | None = None) -> tuple[str, PlanInfo]:
        """The named plan, or the default one, with its name. Raises UnknownNameError."""
        name = self.manifest.default_plan if name is None else name
        if name not in self.manifest.plans:
            raise UnknownNameError("plan", name, self.manifest.plans)
        return name, self.manifest.plans[name]

    def embeddings(self) -> np.ndarray:
        """The token embeddings [vocabulary, hidden], memory-mapped: only the rows that are read take memory."""
        table = self.manifest.embeddings
        return np.memmap(self.file(table.file), dtype=table.dtype, mode="r", offset=table.offset, shape=table.shape)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _check_file(path: Path, name: str, expected: FileInfo, verify_hashes: bool) -> None:
    try:
        status = path.stat()
    except OSError as error:
        raise BundleError(f"{name} of the bundle cannot be read ({_reason(error)}): copy or compile the bundle again") from None
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{name} of the bundle is not a file: copy or compile the bundle again")
    if status.st_size != expected.bytes:
        raise BundleError(f"{name} has {status.st_size} bytes and should have {expected.bytes}: the bundle was cut short; "
                          "copy or compile it again")
    stamp = user_cache() / "stamps" / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
    facts = [expected.sha256, status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev]
    large = status.st_size >= HASH_ALWAYS_BELOW
    if large and not verify_hashes and _read_stamp(stamp) == facts:
        return
    try:
        found = sha256_of(path)
    except OSError as error:
        raise BundleError(f"{name} of the bundle cannot be read ({_reason(error)})") from None
    if found != expected.sha256:
        raise BundleError(f"{name} was changed after it was written (SHA-256 {found[:12]}…, expected {expected.sha256[:12]}…): "
                          "copy or compile the bundle again")
    if large:
        _write_stamp(stamp, facts)


def _check_sense(manifest: Manifest) -> None:
    """What the types cannot say. No compiler writes such a manifest; a reader should not stumble over it."""
    table, layers, vision = manifest.embeddings, manifest.decoder.layers, manifest.vision
    held = manifest.files[table.file].bytes - table.offset
    wrong = [
        ("no plan 'full'", "full" not in manifest.plans),
        (f"no plan {manifest.default_plan!r}, its default", manifest.default_plan not in manifest.plans),
        (f"embeddings of type {table.dtype!r}", table.dtype not in ("float32", "float16")),
        (f"embeddings {list(table.shape)} in the {held} bytes from {table.offset} of {table.file}",
         table.offset < 0 or min(table.shape) < 1 or table.shape[0] * table.shape[1] * (2 if table.dtype == "float16" else 4) > held),
        (f"{vision.tokens} visual tokens in a window of {manifest.decoder.context} rows", not 0 < vision.tokens < manifest.decoder.context),
        *((f"a tile of {tile.rows} x {tile.columns} tokens from {tile.start}, {tile.stride} apart, of {vision.tokens}",
           min(tile.rows, tile.columns, tile.stride) < 1 or tile.start < 0
           or tile.start + (tile.rows - 1) * tile.stride + tile.columns > vision.tokens) for tile in vision.tiles),
        (f"{vision.runs} runs of visual tokens for {len(vision.tiles)} tiles", vision.runs not in (1, len(vision.tiles)) or not vision.tiles),
        (f"{manifest.decoder.position_axes} axes of positions for {len(vision.tiles)} tiles",
         manifest.decoder.position_axes != 1 and (manifest.decoder.position_axes != 3 or len(vision.tiles) != 1)),
        *((f"plan {name!r} with {plan.visual_tokens} visual tokens of {vision.tokens}, {list(plan.tile_tokens[:9])} of the tiles",
           not 0 < sum(plan.tile_tokens) <= plan.visual_tokens <= vision.tokens or min(plan.tile_tokens) < 0)
          for name, plan in manifest.plans.items()),
        *((f"plan {name!r} with {len(plan.tile_tokens)} parts for {len(vision.tiles)} tiles", len(plan.tile_tokens) != len(vision.tiles))
          for name, plan in manifest.plans.items()),
        *((f"plan {name!r} with cache rows {list(plan.cache_rows[:9])}, for {layers} layers and a window of {manifest.decoder.context}",
           len(plan.cache_rows) != layers or not all(0 < rows <= manifest.decoder.context for rows in plan.cache_rows))
          for name, plan in manifest.plans.items()),
        *((f"plan {name!r} with a cut before layer {cut.layer} of {layers} to {list(cut.tile_tokens[:9])} of {plan.visual_tokens} visual tokens",
           not 0 <= cut.layer < layers or min(cut.tile_tokens, default=0) < 0 or not 0 < cut.tokens <= plan.visual_tokens
           or len(cut.tile_tokens) not in (1, len(vision.tiles)))
          for name, plan in manifest.plans.items() for cut in plan.cuts),
        *((f"plan {name!r} with the {dialect} graphs {', '.join(graphs) or 'none'}", not {"vision", "prefill", "decode"} <= set(graphs))
          for name, plan in manifest.plans.items() for dialect, graphs in plan.variants.items()),
        *((f"plan {name!r} with the graph {file}, which is not described", file not in manifest.graphs)
          for name, plan in manifest.plans.items() for graphs in plan.variants.values() for file in graphs.values()),
    ]
    if found := [text for text, is_wrong in wrong if is_wrong]:
        raise BundleError(f"{MANIFEST} makes no sense: it has {found[0]}; compile the bundle again")


def _read_stamp(stamp: Path) -> object:
    try:
        return json.loads(stamp.read_text())
    except (OSError, ValueError):
        return None


def _write_stamp(stamp: Path, facts: list[object]) -> None:
    with suppress(OSError):  # a device without a writable cache hashes at every open, and that is all it loses
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(json.dumps(facts))


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
