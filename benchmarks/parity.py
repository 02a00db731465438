"""Does a bundle say what the Hugging Face model says? Every question of the evaluation set, every method and budget.

    python benchmarks/parity.py            (about 20 minutes on 2 cores; --scenes 8 for a taste)

Unpruned, and with each method keeping all 576: greedy text by HF's own processor and `generate`, and the logits of every
step (for the methods, their difference to the plan `full` is added to that of `full` itself). Compressed: the HF model in
torch with the graph's kept tokens and positions imposed on HF's own features.
"""
from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from common import BUDGETS, CHECKPOINT, METHODS, QUESTIONS, demo_bundle, markdown, write

from edgecomp.evaluate import MOST_TOKENS, Answer, accuracy, read_questions
from edgecomp_export.reference import Reference
from edgecomp_export.verify import Comparison, verify
from edgecomp_runtime import Bundle, Session


def as_unpruned(session: Session, full: Session, expected: list[Comparison], asked: list[tuple[Path, str]]) -> list[Comparison]:
    """A method that keeps all tokens against transformers' answers, and its logits against those of the plan 'full'."""
    found = []
    for (image, question), known in zip(asked, expected):
        generation = session.generate(question, [image], max_new_tokens=MOST_TOKENS)
        said = generation.finish().strip()
        difference = np.abs(session.score(question, [image], generation.token_ids) - full.score(question, [image], generation.token_ids)).max()
        found.append(Comparison(question, known.reference, said, known.logits + float(difference)))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--scenes", type=int, default=64)
    chosen = parser.parse_args()
    bundle = Bundle.open(demo_bundle())
    questions = read_questions(QUESTIONS)
    pictures = list(dict.fromkeys(q.image for q in questions))[:chosen.scenes]
    questions = [q for q in questions if q.image in pictures]
    reference = Reference(str(CHECKPOINT))
    asked = [(q.image, q.question) for q in questions]
    rows: list[list[object]] = []
    unpruned: list[Comparison] = []
    for plan in ["full", *(f"{m}-{k}" for m in METHODS for k in (576, *BUDGETS))]:
        began = time.time()
        if plan.endswith("-576"):  # what transformers said is known by then
            found = as_unpruned(Session(bundle, plan=plan), Session(bundle, plan="full"), unpruned, asked)
        else:
            found = verify(Session(bundle, plan=plan), reference, asked)
        unpruned = unpruned or found
        ours, theirs = (accuracy([Answer(q, getattr(c, side)) for q, c in zip(questions, found)]) for side in ("bundle", "reference"))
        rows.append([plan, len(found), sum(c.same for c in found), f"{max(c.logits for c in found):.1e}", f"{ours:.2f}", f"{theirs:.2f}"])
        print(*rows[-1], f"{time.time() - began:.0f} s", flush=True)
    write("parity.md", "Parity with Hugging Face", f"python benchmarks/parity.py --scenes {chosen.scenes}",
          markdown(["plan", "questions", "same greedy text", "largest logit difference", "accuracy, bundle %", "accuracy, HF in torch %"], rows))
