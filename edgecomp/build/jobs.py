"""What has to be built for a plan: its graphs, and for each input the smallest, the usual and the largest shape. All follow from the manifest."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgecomp.build.toolchain import Toolchain
from edgecomp.devices import Device
from edgecomp.footprint import cache_bytes
from edgecomp.ir.graphs import load
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.cuts import TEXT_ROWS
from edgecomp_runtime.errors import EdgecompError
from edgecomp_runtime.limits import ENGINE_LOGIT_ROWS, ENGINE_PREFILL_ROWS, bucket, buckets, limits
from edgecomp_runtime.manifest import EngineInfo, GraphInfo, Manifest, PlanInfo

QUESTION_ROWS = 64  # of text beside a picture, in the prompt that an engine is made fast for

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # smallest, usual, largest
Sizes = Mapping[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Job:
    """One engine to build: of which graph, for which shapes, and what the manifest will say of it."""
    part: str
    info: EngineInfo


def sizes(manifest: Manifest, plan: PlanInfo) -> dict[str, tuple[int, int, int]]:
    """Smallest, usual and largest size of each symbol in the shapes of a plan's lowered decoder graphs. Usual is a picture and a question."""
    most = limits(manifest, plan, ENGINE_PREFILL_ROWS, ENGINE_LOGIT_ROWS)
    rows = min(plan.visual_tokens + QUESTION_ROWS, most["rows"])
    found = {"rows": (1, rows, most["rows"]), "images": (1, 1, most["images"]), "logit_rows": (1, 1, most["logit_rows"]),
             "text_rows": (TEXT_ROWS, min(QUESTION_ROWS, most["text_rows"]), most["text_rows"])}
    for cut in plan.cuts:
        here = f"rows.{cut.layer}"
        found[here] = (1, max(1, min(rows - (plan.visual_tokens - cut.tokens), most[here])), most[here])
    for name, capacity in [*most.items()]:
        if name.startswith("bucket"):
            usual = found.get(name.replace("bucket", "rows"), found["rows"])[1]
            found[name] = (buckets(capacity)[0], bucket(min(usual, capacity), capacity), capacity)
    return found


def profile(graph: GraphInfo, sizes: Sizes) -> dict[str, Shapes]:
    """The shapes of every input of a graph."""
    return {t.name: tuple(tuple(sizes[d][n] if isinstance(d, str) else d for d in t.shape) for n in range(3))  # type: ignore[misc]
            for t in graph.inputs}


def jobs(bundle: Bundle, plan: PlanInfo, device: Device, tools: Toolchain, flags: dict[str, int | float | str]) -> list[Job]:
    """The engines of a plan that was lowered for a toolchain, in the order vision, prefill, decode."""
    manifest, found = bundle.manifest, []
    every = {**sizes(manifest, plan), "batch": (1, 1, 1)}
    for part, file in plan.variants[tools.dialect].items():
        shapes = profile(manifest.graphs[file], every)
        engine = f"engines/{device.id}/{Path(file).stem}.engine"
        found.append(Job(part, EngineInfo(engine, file, device.id, tools.backend, tools.version, tools.capability, shapes, flags)))
    return found


def engine_weights(bundle: Bundle, plan: PlanInfo) -> int:
    """Bytes of the weights of a plan's engines. Each has its own, so that the decoder's are there twice: in prefill and in decode."""
    files = plan.variants["neutral"]
    held = {file: sum(value.const_value.nbytes for value in load(bundle.file(file)).graph.initializers.values() if value.const_value is not None)
            for file in set(files.values())}
    return sum(held[file] for file in files.values())


def check_fits(bundle: Bundle, name: str, device: Device) -> None:
    """Raises EdgecompError where the weights of a plan's engines and its cache alone are more than the device has."""
    plan = bundle.manifest.plans[name]
    weights, cache = engine_weights(bundle, plan), cache_bytes(bundle.manifest, plan)
    has = int((device.memory.usable_gib or device.memory.total_gib) * 2**30)
    if weights + cache > has:
        raise EdgecompError(f"plan {name!r} does not fit {device.id}: its engines' weights take {_gib(weights)} and its cache {_gib(cache)} of "
                            f"{_gib(has)} ({max(plan.cache_rows)} rows): " + ("compile with a smaller --context, or a smaller budget"
                                                                              if weights < has else "choose a smaller model, or --precision fp16"))


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
