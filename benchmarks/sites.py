"""Where a cut stands, and what it saves: vision, prefill, decode and the KV cache of one picture at 64 of 576 tokens, on the CPU.

    python benchmarks/sites.py              (about 5 minutes on 2 cores)

The demonstration model, and one of SmolVLM-256M's size with random weights (see choosing.py). Every plan is measured in a process of its
own, median of nine. The cache that is used is what the kernel says is resident of its buffers after one answer, in whole pages.
"""
from __future__ import annotations

import ctypes
import json
import mmap
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from choosing import PICTURE, checkpoint
from common import CHECKPOINT, WORK, markdown, write

from edgecomp import methods
from edgecomp.compile import compile_model
from edgecomp.compress import Recipe
from edgecomp.footprint import cache_bytes
from edgecomp_runtime import Bundle, Session

KEEP, REPEATS, TOKENS = "64", 9, 33
PROMPT = "describe the image. where is the star? what number is written? what color is the ring?"  # a long answer
PLANS = (("random", "projector"), ("fastv", "decoder:2"), ("random", "decoder:2"), ("pyramiddrop", ""), ("random", "encoder:4"), ("tome", ""))


def bundle_of(name: str, source: Path) -> Path:
    out = WORK / f"sites-{name}"
    if not out.exists():
        compile_model(str(source), out, [Recipe.of(methods.make(method), KEEP, site) for method, site in PLANS], say=print)
    return out


def resident(address: int, size: int) -> int:
    """Bytes of a stretch of memory that are in whole resident pages (mincore)."""
    first = address // mmap.PAGESIZE * mmap.PAGESIZE
    pages = -(-(address + size - first) // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    if ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(first), ctypes.c_size_t(pages * mmap.PAGESIZE), found):
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in found) * mmap.PAGESIZE


def run(bundle: str, plan: str) -> dict[str, Any]:
    session, runs = Session(Bundle.open(bundle), plan=plan), []
    for _ in range(REPEATS + 1):
        session.reset()
        generation = session.generate(PROMPT, [PICTURE], max_new_tokens=TOKENS)
        generation.finish()
        runs.append(generation.statistics)
    used = sum(resident(region.address, region.nbytes) for region in session._state.values())
    return {"used": used, **{key: statistics.median(getattr(run, key) for run in runs[1:]) for key in ("vision_ms", "prefill_ms", "per_token_ms")}}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(run(*sys.argv[2:])))
        sys.exit()
    parts = []
    for name, title, source in (("demo", "the demonstration model", CHECKPOINT), ("smol", "SmolVLM-256M's size", checkpoint("llava"))):
        bundle = Bundle.open(bundle_of(name, source))
        rows: list[list[object]] = []
        base: dict[str, Any] = {}
        for plan, info in bundle.manifest.plans.items():
            child = subprocess.run([sys.executable, __file__, "--child", str(bundle.path), plan], stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(child.stdout)
            base = base or found
            layers = [info.tokens_at(layer) for layer in range(bundle.manifest.decoder.layers)]
            rows.append([plan, layers[0], layers[-1], f"{sum(layers) / len(layers):.0f}", f"{found['vision_ms']:.1f}", f"{found['prefill_ms']:.1f}",
                         f"{base['prefill_ms'] / found['prefill_ms']:.2f}", f"{found['per_token_ms']:.2f}",
                         f"{cache_bytes(bundle.manifest, info) / 2**20:.1f}", f"{found['used'] / 2**20:.2f}"])
            print(*rows[-1], flush=True)
        parts += [f"## {title[0].upper()}{title[1:]}\n", markdown(
            ["plan", "enter", "after the cut", "mean over layers", "vision ms", "prefill ms", "times faster than full", "ms a token",
             "cache MiB (manifest)", "cache MiB in use (measured)"], rows)]
    write("sites.md", "Where a cut stands", "python benchmarks/sites.py", *parts)
