"""Does a graph keep what its rule says? Every picture of the evaluation set, every selection method and budget.

    python benchmarks/selection.py

The graph also gives out the features and signals that its rule saw, and the order in which it chose. The numpy rule
is run on those very tensors in float64, step by step, given the graph's own choices so far. Where chosen and next are
nearer than 1e-5 relative, a rounding decides: such pictures are counted, and the steps compared all the same.
"""
from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from common import BUDGETS, METHODS, QUESTIONS, demo_bundle, markdown, write

from edgecomp import methods
from edgecomp.dialects.onnxruntime import lower
from edgecomp.evaluate import read_questions
from edgecomp.ir.graphs import load
from edgecomp.methods.base import Place, Selection
from edgecomp.methods.reference import follow, select
from edgecomp.passes.splice import at_projector
from edgecomp_runtime import Bundle, Session
from edgecomp_runtime import images as pictures

NEAR = 1e-5


def exposed(bundle: Bundle, step: Reduction) -> ort.InferenceSession:
    """The plan's vision graph with its rule's inputs and order of choice as further outputs."""
    model = load(bundle.file(bundle.manifest.plans["full"].variants["neutral"]["vision"]))
    at_projector(model, bundle.manifest.vision, step, expose=True)
    lower(model)
    path = bundle.path / "graphs" / "exposed.onnx"  # beside the weights that it refers to
    ir.save(model, path)
    try:
        return ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    finally:
        path.unlink()


if __name__ == "__main__":
    bundle = Bundle.open(demo_bundle())
    files = list(dict.fromkeys(q.image for q in read_questions(QUESTIONS)))
    rows: list[list[object]] = []
    notes: list[str] = []
    for name in METHODS:
        method = methods.make(name)
        if not isinstance(method, Selection):
            continue
        for keep in BUDGETS:
            place = Place(bundle.manifest.vision.grid, keep)
            graph, plain = exposed(bundle, method, place), Session(bundle, plan=f"{name}-{keep}")
            same = agreeing = steps = production = 0
            near: list[str] = []
            for file in files:
                pixels = pictures.preprocess(pictures.load(file), bundle.manifest.image)[None]
                out = dict(zip((o.name for o in graph.get_outputs()), graph.run(None, {"pixels": pixels})))
                signals = [out[s][0].astype(np.float64) for s in method.signals("projector")]
                features = out["features"][0].astype(np.float64)
                checks = follow(method.rule(place, features, *signals), out["order"][0])
                same += np.array_equal(np.sort(select(method.rule(place, features, *signals))), out["kept"][0])
                production += np.array_equal(plain.visual_tokens(file).kept, out["kept"][0])
                steps += len(checks)
                agreeing += sum(c.agrees for c in checks)
                if any(c.margin < NEAR for c in checks):
                    near.append(file.stem)
                if bad := [n for n, c in enumerate(checks) if not c.agrees and c.margin >= NEAR]:
                    raise SystemExit(f"{name} at {keep}, {file.name}: steps {bad} differ beyond rounding")
            rows.append([f"{name}-{keep}", f"{same} of {len(files)}", f"{agreeing} of {steps}", len(near), f"{production} of {len(files)}"])
            if near:
                notes.append(f"- {name}-{keep}, near ties: {', '.join(near)}")
            print(*rows[-1], flush=True)
    write("selection.md", "Kept tokens: graph against rule", "python benchmarks/selection.py",
          markdown(["plan", "pictures with equal sets", "steps that agree, given the graph's own past", f"pictures with a margin under {NEAR:.0e}",
                    "same set in the plan's own graph"], rows), *notes, "")
