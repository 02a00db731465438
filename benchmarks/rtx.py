"""Does TensorRT for RTX build every method's graph? Real engines of the demonstration model's graphs, built here; none is run.

Needs the package tensorrt-rtx (`pip install tensorrt-rtx`), no GPU. Each plan's vision graph, prefill of up to 620 unpruned rows and decode.
"""
from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import onnx_ir as ir
from common import CHECKPOINT, markdown, write

from edgecomp import methods
from edgecomp.compile import compile_model
from edgecomp.compress import Recipe, Stage
from edgecomp.dialects.targets import TARGETS, refused
from edgecomp.dialects.tensorrt import lower
from edgecomp.ir.graphs import load
from edgecomp_runtime import Bundle
from edgecomp_runtime.cuts import TEXT_ROWS
from edgecomp_runtime.manifest import PlanInfo

KEEP, ROWS, CAPABILITY, TARGET = 64, 620, "SM89", TARGETS["tensorrt-rtx-1.7"]


def recipes() -> list[Recipe]:
    """Every method at each kind of site that it suits, a plan of two steps, and windows."""
    found = []
    for name in methods.METHODS:
        method = methods.make(name)
        for kind in method.taxonomy.sites:
            site = {"encoder": "encoder:4", "decoder": "decoder:2"}.get(kind, kind)
            found.append(Recipe.of(method, str(KEEP), "encoder:8" if name == "visionzip" else site))
    found.append(Recipe.of(methods.make("fastv"), str(KEEP), windows=(4, 4)))
    found.append(Recipe((Stage(methods.make("pool"), "144"), Stage(methods.make("fastv"), str(KEEP)))))
    return found


def shapes(model: ir.Model, plan: PlanInfo) -> dict[str, list[tuple[int, ...]]]:
    """Least, usual and largest shape of each input that has several, for one picture in a prompt of ROWS unpruned rows."""
    gone = {"": 576 - plan.visual_tokens} | {f".{cut.layer}": 576 - cut.tokens for cut in plan.cuts}
    sizes = {"images": (1, 1, 1), "logit_rows": (1, 1, 1), "text_rows": (TEXT_ROWS, TEXT_ROWS, ROWS - 576)}
    for suffix, fewer in gone.items():
        sizes |= {f"rows{suffix}": (1, ROWS - fewer, ROWS - fewer), f"bucket{suffix}": (1, ROWS - fewer, plan.cache_rows[int(suffix[1:] or 0)])}
    return {v.name or "": [tuple(d if isinstance(d, int) else sizes[str(d.value)][n] for d in v.shape) for n in range(3)]
            for v in model.graph.inputs if v.shape is not None and not v.shape.is_static()}


def build(model: ir.Model, path: Path, plan: PlanInfo) -> tuple[float, float] | str:
    """Seconds and MiB of the engine, or why there is none."""
    import tensorrt_rtx as trt
    ir.save(model, path)
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        return "; ".join(parser.get_error(i).desc()[:150] for i in range(parser.num_errors))
    config: Any = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, CAPABILITY), 0)
    profile = builder.create_optimization_profile()
    for name, three in shapes(model, plan).items():
        profile.set_shape(name, *three)
    if shapes(model, plan):
        config.add_optimization_profile(profile)
    began = time.perf_counter()
    engine = builder.build_serialized_network(network, config)
    return "the builder gave no engine" if engine is None else (time.perf_counter() - began, engine.nbytes / 2**20)


if __name__ == "__main__":
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        bundle_path = Path(folder) / "bundle"
        names = compile_model(str(CHECKPOINT), bundle_path, recipes(), say=lambda line: None)
        bundle = Bundle.open(bundle_path)
        for name in dict.fromkeys(["full", *names]):
            plan = bundle.manifest.plans[name]
            for part in ("vision", "prefill", "decode"):
                file = plan.variants["neutral"][part]
                if name != "full" and file == bundle.manifest.plans["full"].variants["neutral"][part]:
                    continue
                model = load(bundle.file(file))
                lower(model, part, TARGET, plan.cache_rows)
                bad = refused(model, TARGET)
                made = bad[0] if bad else build(model, bundle_path / "graphs" / "lowered.onnx", plan)
                said = (f"{made[0]:.1f}", f"{made[1]:.1f}") if isinstance(made, tuple) else (made, "")
                rows.append([name, part, sum(1 for _ in model.graph), *said])
                print(*rows[-1], flush=True)
    failed = [row for row in rows if not row[-1]]
    write("rtx.md", "TensorRT for RTX builds every method's graph", "python benchmarks/rtx.py",
          f"Engines for {CAPABILITY} of the demonstration model in fp32, lowered for {TARGET.name}, built without a GPU and not run: "
          f"{len(rows) - len(failed)} of {len(rows)}.\n",
          markdown(["plan", "graph", "nodes", "build s", "engine MiB"], rows))
