"""`edgecomp inspect`: what is in a bundle."""
from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgecomp.commands.options import BUNDLE, JSON, columns, print_json

if TYPE_CHECKING:
    from edgecomp_runtime.manifest import Manifest


def _quantized(manifest: Manifest) -> str:
    """Which weights have how few bits, and what was calibrated, in words."""
    found = ""
    if manifest.quantized:
        by_bits = Counter(manifest.quantized.bits.values())
        found = f"; {' and '.join(f'{by_bits[bits]} in int{bits}' for bits in sorted(by_bits))}, in blocks of {manifest.quantized.block}"
    if tower := manifest.calibrated:
        found += f"; the vision graph's products in {tower.activations}, calibrated on {len(tower.images)} pictures"
    return found


@click.command("inspect")
@BUNDLE
@click.option("--verify-hashes", is_flag=True, help="Hash the weight files again, even where they were seen unchanged.")
@JSON
def command(bundle: Path, verify_hashes: bool, as_json: bool) -> None:
    """Show a bundle's source, plans, cache and files."""
    from edgecomp.footprint import cache_bytes, weight_bytes
    from edgecomp_runtime import Bundle
    opened = Bundle.open(bundle, verify_hashes=verify_hashes)
    manifest = opened.manifest
    if as_json:
        print_json(dataclasses.asdict(manifest))
        return
    vision, decoder = manifest.vision, manifest.decoder
    (high, wide), (down, across), image = manifest.image.size, manifest.image.tiles, manifest.image
    tiles = f"{down}x{across} tiles{' and an overview' if image.overview else ''} of " if image.count > 1 else ""
    click.echo(f"{bundle}: {manifest.source.model} ({manifest.source.family}), {manifest.precision}, made by {manifest.made_by}\n"
               f"vision   {vision.tokens} visual tokens a picture, {tiles}{high}x{wide} pixels; other shapes are {image.fit}; "
               f"{vision.layers} layers\n"
               f"decoder  {decoder.layers} layers, {decoder.heads} heads ({decoder.key_value_heads} of keys and values), width {decoder.hidden}, "
               f"window {decoder.context}\n"
               f"weights  {weight_bytes(manifest) / 2**20:.1f} MiB, shared by all plans{_quantized(manifest)}\n")
    rows: list[tuple[str, ...]] = [("plan", "visual tokens", "cache rows", "cache MiB", "position", "runs on")]
    for name, plan in manifest.plans.items():
        tokens = [plan.tokens_at(layer) for layer in range(decoder.layers)]
        by_layer = [">".join(map(str, dict.fromkeys(values))) for values in (tokens, plan.cache_rows)]  # fewer from each cut on
        rows.append((name + (" *" if name == manifest.default_plan else ""), *by_layer,
                     f"{cache_bytes(manifest, plan) / 2**20:.1f}", plan.position, ",".join(v for v in plan.variants if v != "neutral") or "-"))
    click.echo(columns(rows, right=lambda column: 0 < column < 4) + "\n\n* the default")
    if manifest.engines:
        every: list[tuple[str, ...]] = [("engine", "device", "built by", "for", "MiB")]
        every += [(engine.file, engine.device, f"{engine.backend} {engine.version}", engine.capability,
                   f"{manifest.files[engine.file].bytes / 2**20:.1f}") for engine in manifest.engines]
        click.echo("\n" + columns(every, right=lambda column: column == 4))
