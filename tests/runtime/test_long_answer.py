"""Memory while an answer runs: the cache that it fills and no more, what was freed goes back, what is read lies in large pages."""
from __future__ import annotations

import dataclasses
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from edgecomp_runtime import Bundle, Session
from edgecomp_runtime.memory import settle

MIB = 2**20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_a_long_answer_takes_the_memory_of_its_rows(demo: Path) -> None:
    bundle = Bundle.open(demo)
    bundle.manifest = dataclasses.replace(bundle.manifest, text=dataclasses.replace(bundle.manifest.text, end_ids=()))  # so that it goes on
    session, held = Session(bundle, plan="full", threads=1), dict[int, int]()
    generation = session.generate("describe the image.", max_new_tokens=2000)
    for _ in generation:
        held.setdefault(len(generation.token_ids) // 100 * 100, resident())
    assert len(generation.token_ids) == 2000 and generation.statistics.stopped_by == "length"
    first, last = min(count for count in held if count >= 200), max(held)
    assert first <= 400 and last >= 1800
    decoder = bundle.manifest.decoder
    row = decoder.layers * 2 * decoder.key_value_heads * decoder.head_dim * 4
    assert held[last] - held[first] < (last - first) * row + 2 * MIB


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_what_was_freed_between_held_pieces_goes_back() -> None:
    """glibc keeps such memory for itself until it is asked. On a system whose C library cannot, nothing happens."""
    pieces = [np.ones(8000) for _ in range(2000)]  # of 62 KiB each, below what glibc maps by itself
    kept = pieces[::20]
    del pieces
    before = resident()
    settle()
    if "CS_GNU_LIBC_VERSION" in os.confstr_names:
        assert before - resident() > 60 * MIB
    assert all(piece[-1] == 1 for piece in kept)


def large_pages() -> int:
    found = next(line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("AnonHugePages:"))
    return int(found.split()[1]) * 1024


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists() or tuple(map(int, os.uname().release.split(".")[:2])) < (6, 1),
                    reason="needs Linux 6.1 and its large pages")
def test_filled_memory_is_put_into_large_pages_and_empty_memory_is_not() -> None:
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    filled, empty = mmap.mmap(-1, 64 * MIB, kind), mmap.mmap(-1, 64 * MIB, kind)
    content = np.random.default_rng(0).bytes(64 * MIB)
    filled[:] = content
    empty[::2 * MIB] = bytes([1]) * 32  # a page of each large one
    before, large = resident(), large_pages()
    settle()
    assert large_pages() - large >= 48 * MIB
    assert resident() - before < 16 * MIB
    assert filled[:] == content
