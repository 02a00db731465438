"""Sessions on an NVIDIA GPU through onnxruntime's CUDA provider: the same answers as on the CPU, and nothing allocated a token.

    python benchmarks/cuda_provider.py BUNDLE...      (in fp16, or quantized from it; needs onnxruntime-gpu and cuda-python, and a GPU)

Plans that were lowered for TensorRT run here too, in ONNX's own operators: what their engines are fed and bound to, without TensorRT.
"""
from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch  # whose CUDA and cuDNN onnxruntime takes
from common import ROOT, markdown, write
from cuda.bindings import runtime as cudart

from edgecomp_runtime import Bundle, Session
from edgecomp_runtime.backends import backend
from edgecomp_runtime.backends.onnxruntime import OnnxRuntimeBackend

PICTURES = [ROOT / "examples" / "scenes" / "images" / f"scene-0{n}.jpg" for n in (3, 5)]
FIRST = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is written?"}]}]
TURNS = [*FIRST, {"role": "assistant", "content": [{"type": "text", "text": "HELLO"}]},
         {"role": "user", "content": [{"type": "text", "text": "and here"}, {"type": "image"}, {"type": "text", "text": "?"}]}]
ANSWER, REPEATS = list(range(20, 100, 10)), 3

HEAD = ["weights", "plan", "dialect", "logits differ at most", "same token", "vision ms", "prefill ms", "ms a token", "bytes taken"]
ABOUT = ("{}, the demonstration model in fp16; logits of 27 steps against onnxruntime's CPU provider on the same bundle, which rounds what enters "
         "int8 and int4 products to int8 where the GPU has fp16. TensorRT has no part in it.\n")


def logits(session: Session) -> np.ndarray:
    """Of a question, of a second one behind it about another picture, and of a new conversation."""
    calls: list[tuple[Any, list[Path]]] = [(FIRST, PICTURES[:1]), (TURNS, PICTURES), (FIRST, PICTURES[1:])]
    return np.concatenate([session.score(messages, pictures, ANSWER) for messages, pictures in calls]).astype(np.float32)


def timed(session: Session) -> Any:
    session.reset()
    generation = session.generate(FIRST, PICTURES[:1], max_new_tokens=100)
    generation.finish()
    return generation.statistics


def compared(bundle: Bundle) -> Iterator[list[object]]:
    """A row for each plan and dialect."""
    for plan, info in bundle.manifest.plans.items():
        expected = logits(Session(bundle, plan=plan, backend=OnnxRuntimeBackend(None)))
        for dialect in (dialect for dialect in info.variants if dialect != "neutral"):
            session = Session(bundle, plan=plan, backend=OnnxRuntimeBackend(None, dialect, "cuda"))
            found = logits(session)
            timed(session)
            free = [cudart.cudaMemGetInfo()[1]]
            runs = [timed(session) for _ in range(REPEATS)]
            free.append(cudart.cudaMemGetInfo()[1])
            times = (f"{median(getattr(r, name) for r in runs):.1f}" for name in ("vision_ms", "prefill_ms", "per_token_ms"))
            yield [bundle.manifest.weights, plan, dialect, f"{np.abs(found - expected).max():.3f} of {np.abs(expected).max():.1f}",
                   f"{np.mean(found.argmax(1) == expected.argmax(1)):.0%}", *times, free[0] - free[1]]


if __name__ == "__main__":
    backend("onnxruntime-cuda", None)  # says what is missing
    rows = []
    for path in sys.argv[1:]:
        for row in compared(Bundle.open(path)):
            rows.append(row)
            print(*row, flush=True)
    write("cuda_provider.md", "Sessions through onnxruntime's CUDA provider", "python benchmarks/cuda_provider.py BUNDLE...", ABOUT.format(
        torch.cuda.get_device_name()), markdown(HEAD, rows))
