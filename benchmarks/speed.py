"""edgecomp on ONNX Runtime against Hugging Face transformers on torch (sdpa and eager), on the CPU, in one run.

    python benchmarks/speed.py             (about 5 minutes on 2 cores)

Two models: the demonstration model, and one with the decoder of SmolVLM-256M (30 layers, width 576, 9 heads of which 3 for
keys and values, 135 M parameters) and random weights in bf16. Every contender is a process of its own that answers about one
picture; the parent samples its proportional set size every 10 ms. torch is timed on its forward calls alone, without the
overhead of `generate`; edgecomp through `Session.generate`, sampling included.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import CHECKPOINT, QUESTIONS, ROOT, WORK, demo_bundle, markdown, write

PICTURE = QUESTIONS.parent / "images" / "scene-03.jpg"
PROMPT = "describe the image. where is the star? what number is written? what color is the ring?"
PHASES = ("vision_ms", "prefill_ms", "per_token_ms")
REPEATS, TOKENS, TEXT_ROWS = 9, 33, 30


def big_checkpoint() -> Path:
    """The demonstration model's tower and tokenizer with a random decoder of SmolVLM-256M's size."""
    out = WORK / "smol-checkpoint"
    if not out.exists():
        import torch
        import transformers
        torch.manual_seed(0)
        config = transformers.AutoConfig.from_pretrained(CHECKPOINT)
        config.text_config = transformers.LlamaConfig(
            vocab_size=49280, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
            max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        # published weights are bf16 or fp16, SmolVLM's among them; both contenders make fp32 of them
        transformers.LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(out)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "processor_config.json"):
            shutil.copy(CHECKPOINT / name, out / name)
    return out


def big_bundle() -> Path:
    from edgecomp import methods
    from edgecomp.compile import compile_model
    from edgecomp.compress import Recipe
    out = WORK / "smol"
    if not out.exists():
        compile_model(str(big_checkpoint()), out, [Recipe.of(methods.make("cls"), "64")], say=print)
    return out


def run_edgecomp(bundle: str, plan: str) -> dict[str, Any]:
    """Prefill and decode of one plan, median over repeats."""
    from edgecomp_runtime import Bundle, Session
    session = Session(Bundle.open(bundle), plan=plan)
    runs = []
    for _ in range(REPEATS + 1):
        session.reset()
        generation = session.generate(PROMPT, [PICTURE], max_new_tokens=TOKENS)
        generation.finish()
        runs.append(generation.statistics)
    return {"rows": runs[0].prompt_rows, **{key: statistics.median(getattr(run, key) for run in runs[1:]) for key in PHASES}}


def run_torch(checkpoint: str, visual: str, attention: str) -> dict[str, Any]:
    """The same with transformers: vision, one forward over the prompt, then one a token, greedily."""
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageTextToText

    from edgecomp_runtime.images import load
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model.set_attn_implementation(attention)
    pixels = AutoImageProcessor.from_pretrained(checkpoint)(images=load(PICTURE), return_tensors="pt")["pixel_values"]
    rows = int(visual) + TEXT_ROWS
    times: dict[str, list[float]] = {key: [] for key in PHASES}
    with torch.inference_mode():
        for _ in range(REPEATS + 1):
            at = time.perf_counter()
            features = model.get_image_features(pixels, vision_feature_layer=-2, vision_feature_select_strategy="default").pooler_output[0]
            times["vision_ms"].append((time.perf_counter() - at) * 1e3)
            text = model.get_input_embeddings()(torch.arange(TEXT_ROWS) % 400)
            embeddings = torch.cat([text[:2], features[:int(visual)], text[2:]])[None]
            at = time.perf_counter()
            out = model(inputs_embeds=embeddings, attention_mask=torch.ones(1, rows, dtype=torch.long), use_cache=True, logits_to_keep=1)
            times["prefill_ms"].append((time.perf_counter() - at) * 1e3)
            at = time.perf_counter()
            for _ in range(TOKENS - 1):
                out = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
            times["per_token_ms"].append((time.perf_counter() - at) * 1e3 / (TOKENS - 1))
    return {"rows": rows, **{key: statistics.median(values[1:]) for key, values in times.items()}}


def contender(*arguments: str) -> dict[str, Any]:
    """Runs one contender as a child; adds its peak proportional set size in MiB."""
    from edgecomp_runtime.memory import proportional
    child = subprocess.Popen([sys.executable, "-W", "ignore", __file__, "--child", *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                             text=True)
    peak = 0
    while child.poll() is None:
        try:
            peak = max(peak, proportional(child.pid))
        except OSError:
            break  # it has just ended
        time.sleep(0.01)
    out = child.communicate()[0]
    if child.returncode:
        raise SystemExit(f"{arguments} failed")
    return {**json.loads(out), "pss": peak / 2**20}


def compare(name: str, bundle: Path, checkpoint: Path, small: str) -> list[str]:
    """Tables of one model: times with ratios, then memory."""
    found = {}
    for visual, plan in (("64", small), ("576", "full")):
        found["edgecomp", visual] = contender("edgecomp", str(bundle), plan)
        for attention in ("sdpa", "eager"):
            found[f"torch {attention}", visual] = contender("torch", str(checkpoint), visual, attention)
    rows = []
    for (who, visual), result in found.items():
        ours = found["edgecomp", visual]
        ratios = {key: f"{result[key] / ours[key]:.2f}" for key in ("prefill_ms", "per_token_ms", "pss")}
        rows.append([who, visual, result["rows"], f"{result['vision_ms']:.1f}", f"{result['prefill_ms']:.1f}", ratios["prefill_ms"],
                     f"{result['per_token_ms']:.2f}", ratios["per_token_ms"], f"{result['pss']:.0f}", ratios["pss"]])
    ours, full = found["edgecomp", "64"], found["edgecomp", "576"]
    weights = sum(f.stat().st_size for f in (bundle / "graphs").glob("*.bin")) / 2**20
    torch_full, torch_decode = (min(found[f"torch {a}", "576"][k] for a in ("sdpa", "eager")) for k in ("prefill_ms", "per_token_ms"))
    torch_pss = min(found[f"torch {a}", "576"]["pss"] for a in ("sdpa", "eager"))
    torch_short = min(found[f"torch {a}", "64"]["per_token_ms"] for a in ("sdpa", "eager"))
    lines = [f"- prefill at 64 visual tokens: {full['prefill_ms'] / ours['prefill_ms']:.1f} times faster than edgecomp's own at 576, and "
             f"{torch_full / ours['prefill_ms']:.1f} times faster than the faster torch at 576",
             f"- decode: {torch_short / ours['per_token_ms']:.1f} times faster than the faster torch at a context of about {ours['rows']}, "
             f"{torch_decode / full['per_token_ms']:.1f} times at about {full['rows']}",
             f"- peak memory at 576: {full['pss'] / torch_pss:.2f} of the smaller torch, "
             f"{full['pss'] / weights:.2f} times the weights ({weights:.0f} MiB)"]
    head = ["", "visual tokens", "rows", "vision ms", "prefill ms", "÷ edgecomp", "ms a token", "÷ edgecomp", "peak PSS MiB", "÷ edgecomp"]
    return [f"## {name}\n", markdown(head, rows), "\n".join(lines), ""]


def first_token(bundle: Path, plan: str, cache: Path) -> float:
    """Seconds from starting `edgecomp run` to the first byte of its answer."""
    began = time.perf_counter()
    command = ["run", str(bundle), "--plan", plan, "--image", str(PICTURE), "--prompt", PROMPT]
    child = subprocess.Popen([sys.executable, "-m", "edgecomp", *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                             env={**os.environ, "EDGECOMP_CACHE": str(cache)}, cwd=ROOT)
    assert child.stdout is not None
    child.stdout.read(1)
    took = time.perf_counter() - began
    child.communicate()
    return took


def cold_starts(bundle: Path) -> list[str]:
    rows = []
    for plan in ("cls-64", "full"):
        firsts = []
        for _ in range(5):
            with tempfile.TemporaryDirectory() as cache:
                firsts.append(first_token(bundle, plan, Path(cache)))
        with tempfile.TemporaryDirectory() as cache:
            later = [first_token(bundle, plan, Path(cache)) for _ in range(6)][1:]
        rows.append([plan, f"{statistics.median(firsts):.2f}", f"{statistics.median(later):.2f}"])
    head = ["plan", "first time (weights hashed) s", "later s"]
    return ["## A cold `edgecomp run`, from its start to its first token, demonstration model\n", markdown(head, rows)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", nargs="+")
    chosen = parser.parse_args()
    if chosen.child:
        kind, *rest = chosen.child
        print(json.dumps({"edgecomp": run_edgecomp, "torch": run_torch}[kind](*rest)))
        sys.exit()
    parts = compare("Demonstration model (16 M parameters)", demo_bundle(), CHECKPOINT, "cls-64")
    parts += compare("Decoder of SmolVLM-256M's size, random weights", big_bundle(), big_checkpoint(), "cls-64")
    write("speed.md", "Speed and memory against transformers on torch", "python benchmarks/speed.py",
          "fp32 everywhere, medians of 9 after one to warm up. `÷ edgecomp` is the row's figure divided by edgecomp's at the same visual tokens.\n",
          *parts, *cold_starts(demo_bundle()))
