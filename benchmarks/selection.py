"""Kept tokens: every selection graph against its numpy rule, fed the tensors that the graph saw, on real activations; and fp16 against fp32.

    python benchmarks/selection.py           (about 5 minutes on 2 cores)

Each choosing step of a graph is judged given the graph's own choices before it. A near tie is a step whose worst chosen and best left
score differ by less than 1e-5 of their size in float64: rounding decides there. The run ends where a step is not the rule's and its
choice is worse by more. fp16 runs the same pictures through the bundle
compiled in fp16; agreement is the share of tokens that both keep.
"""
from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from common import CHECKPOINT, QUESTIONS, ROOT, WORK, markdown, write

from edgecomp import methods
from edgecomp.budget import Reduction, Tokens, nearest
from edgecomp.compile import compile_model
from edgecomp.compress import Cut, Stage
from edgecomp.evaluate import read_questions
from edgecomp.methods.base import Place, Selection
from edgecomp.methods.reference import follow
from edgecomp_runtime import Bundle, Session, images
from edgecomp_runtime.generation import Statistics

sys.path.insert(0, str(ROOT / "tests"))
from exposed import Exposed, Seen  # what the tests look through

PARTS, NEAR, PICTURES = (75, 50, 33, 11, 5), 1e-5, 2
LAYERS = {"encoder": 5, "projector": 0, "decoder": 2}
QUESTION = "what number is written, and which shapes stand beside it?"


def bundle_of(precision: str) -> Bundle:
    out = WORK / f"neutral-{precision}"
    if not out.exists():
        compile_model(str(CHECKPOINT), out, [], precision=precision, say=print)
    return Bundle.open(out)


class Real:
    """A bundle with the pictures' pixels, and each picture's prompt as rows of the decoder."""

    def __init__(self, bundle: Bundle, folder: Path, files: list[Path]):
        folder.mkdir()
        self.bundle, self.exposed, self.session = bundle, Exposed(bundle, folder), Session(bundle, plan="full")
        self.type = next(t.dtype for t in bundle.manifest.graphs["graphs/vision.onnx"].inputs if t.role == "pixels")
        self.pixels = np.stack([images.preprocess(images.load(file), bundle.manifest.image) for file in files]).astype(self.type)
        self.prompts = []
        for file in files:
            ids, pixels = self.session._prepare(QUESTION, [file], False, 0)
            rows = self.session._rows(ids, pixels, Statistics())
            visual, count = np.flatnonzero(rows.runs), len(rows.sources)
            self.prompts.append((rows.feeds(0, count, 0, np.array([count - 1]), 0), visual[None], np.arange(visual[-1] + 1, count)))

    def see(self, cut: Cut) -> list[tuple[Seen, int]]:
        """What the step saw of each picture, as a result and the picture's number in it."""
        if not cut.in_decoder:
            seen = self.exposed.vision([cut], self.pixels)[0]
            return [(seen, n) for n in range(len(self.pixels))]
        found = []
        for feeds, visual, text in self.prompts:
            more = {"visual_rows": visual, "text_rows": text, "length": np.zeros(1, np.int64)}
            found.append((self.exposed.decoder([cut], {**feeds, **{f"{k}.{cut.layer}": v for k, v in more.items()}})[0], 0))
        return found


def judged(method: Selection, place: Place, seen: Seen, picture: int) -> tuple[int, int, int]:
    """Steps, steps that agree with the rule, near ties. Raises ValueError where a step differs beyond rounding."""
    assert seen.order is not None
    rule = method.rule(place, *(values[picture].astype(np.float64) for values in (seen.features, *seen.signals)))
    checks = follow(rule, seen.order[picture])
    if wrong := [(step, check.margin) for step, check in enumerate(checks) if not check.agrees and check.margin >= NEAR]:
        raise ValueError(f"{method.name} keeps {place.keep}: not the rule's, by step and margin: {wrong}")
    return len(checks), sum(c.agrees for c in checks), sum(c.margin < NEAR for c in checks)


if __name__ == "__main__":
    files = list(dict.fromkeys(q.image for q in read_questions(QUESTIONS)))[:PICTURES]
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        real, half = (Real(bundle_of(precision), Path(folder) / precision, files) for precision in ("fp32", "fp16"))
        tile, = real.bundle.manifest.vision.tiles
        for name in methods.METHODS:
            method = methods.make(name)
            for kind in method.taxonomy.sites if isinstance(method, Selection) else ():
                for part in PARTS:
                    keep = nearest(real.bundle.manifest, method, tile.tokens * part // 100)
                    step = Reduction.of(method, Tokens.of(real.bundle.manifest), keep, kind)
                    cut, place = Cut(Stage(method, str(keep)), kind, LAYERS[kind], step), Place((tile.rows, tile.columns), keep, kind)
                    both = list(zip(real.see(cut), half.see(cut)))
                    counts = [judged(method, place, *mine) for mine, _ in both]  # type: ignore[arg-type]
                    common = [len(np.intersect1d(a.order[n], b.order[m])) / keep for (a, n), (b, m) in both]  # type: ignore[index]
                    steps, agree, ties = (sum(column) for column in zip(*counts))
                    rows.append([name, kind, keep, f"{agree} of {steps}", ties, f"{100 * np.mean(common):.1f} %"])
                    print(*rows[-1], flush=True)
    write("selection.md", "Kept tokens: graph against rule", "python benchmarks/selection.py",
          markdown(["method", "site", "kept", "steps as the rule's", "near ties", "fp16 keeps the same"], rows))
