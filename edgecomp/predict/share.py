"""What an engine takes beside a model's own parts: libraries, workspaces, memory taken ahead, as published peaks left it.

`efficiencies.json` has the shares; `benchmarks/memory_share.py` makes them. The peaks are few, so that a share is a median with the ends of what
was seen, by engine and, for boards whose CPU shares the memory, by their size; an engine without peaks of its own has that of all together.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgecomp.devices import Device
from edgecomp.predict import efficiency

SMALL_GIB = 16  # boards up to it were measured apart from larger ones


@dataclass(frozen=True)
class Share:
    """Bytes, the ends of their interval, and what they rest on."""
    value: float
    low: float
    high: float
    of: str


def share_of(device: Device, engine: str, again: float = 0.0) -> Share:
    """The share of an engine on a GPU. again: bytes that it may hold twice, at most: models of experts took up to that of their weights."""
    stored: dict[str, Any] = efficiency.table()["memory"]
    measured = efficiency.KIN.get(engine, engine)
    found = stored["shares"].get(f"{measured} | {kind(device)}")
    if found is None:
        every = stored["pooled"]
        return Share(every["value"], every["low"], every["high"] + again,
                     f"weights, cache and activations counted; no peak of {engine} on {WORDS[kind(device)]} is published, the rest as "
                     f"{every['rows']} peaks of {every['of']} left it")
    of = f"weights, cache and activations counted; the rest as {found['rows']} peaks of {measured} on {WORDS[kind(device)]} left it"
    if measured != engine:  # another engine's peaks tell less: the least may be nothing
        return Share(found["value"], 0.0, found["high"] + again, f"{of}, in place of {engine}")
    return Share(found["value"], found["low"], found["high"] + again, of)


def kind(device: Device) -> str:
    """Devices whose peaks are alike: 'small' and 'large' boards, 'card'."""
    return "card" if not device.memory.unified else "small" if device.memory.total_gib <= SMALL_GIB else "large"


WORDS = {"small": f"boards with up to {SMALL_GIB} GiB", "large": f"boards with more than {SMALL_GIB} GiB", "card": "cards"}
