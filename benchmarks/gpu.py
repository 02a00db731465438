"""edgecomp through ONNX Runtime's CUDA provider against Hugging Face transformers on torch, on one NVIDIA GPU, in one run.

    python benchmarks/gpu.py             (about 10 minutes on an H100 once the bundles are there; 32 GiB of disk, 40 of memory)

LLaVA-1.5-7B's and LLaVA-NeXT-7B's (Vicuna) shapes, random weights, fp16, batch 1; both sides have the same weights. Every contender is a
process of its own; the parent asks the driver for the GPU's free memory all the while. torch is timed on its forward calls alone,
with its pictures and token ids on the GPU and no host in between tokens; edgecomp through `Session.generate`, copies to the GPU and
sampling included. TensorRT has no part in it.
"""
from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import QUESTIONS, WORK, markdown, quantized_bundle, write

PICTURE = QUESTIONS.parent / "images" / "scene-03.jpg"
PROMPT = ("describe the image. where is the star? what number is written? what color is the ring? is there a circle left of the red square? "
          "how many shapes are blue? what is written in the image?")
CONTEXT, REPEATS, TOKENS, LONG, LONG_PLANS = 4096, 7, 65, 2000, ("cls", "fastv")
DEVICE = "cuda"
PHASES = ("vision_ms", "prefill_ms", "first_token_ms", "per_token_ms")
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """A model of benchmarks/large.py: the size of the pictures expected, the plans to compare, how many visual tokens they leave, and
    whether its weights are quantized, too."""
    title: str
    picture: tuple[int, int] | None
    plans: tuple[tuple[str, str, str], ...]  # method, site, tokens
    kept: int
    int4: bool = False


SHAPES = {
    "llava-1.5-7b": Shape("LLaVA-1.5-7B", None, (("cls", "projector", "64"), ("fastv", "decoder:2", "64")), 64, int4=True),
    "llava-next-7b": Shape("LLaVA-NeXT-7B", (672, 672), (("cls", "projector", "320"), ("dart", "projector", "320"), ("fastv", "decoder:2", "320"),
                                                         ("dart", "decoder:2", "320"), ("random", "decoder:2", "320")), 320),
}


def bundle_of(name: str) -> Path:
    """The model's bundle, made if it is not there."""
    from large import checkpoint

    from edgecomp import methods
    from edgecomp.compile import compile_model
    from edgecomp.compress import Recipe
    out, shape = WORK / name, SHAPES[name]
    if not out.exists():
        recipes = [Recipe.of(methods.make(method), keep, site) for method, site, keep in shape.plans]
        compile_model(str(checkpoint(name)), out, recipes, precision="fp16", context=CONTEXT, image_size=shape.picture, say=print)
    return out


# contenders

def run_edgecomp(name: str, plan: str, logits: str, most: str) -> dict[str, Any]:
    """Medians of a plan; the logits behind the prompt go into a file. Then one answer of `most` tokens, if any."""
    import torch  # noqa: F401  # whose CUDA and cuDNN onnxruntime takes

    from edgecomp_runtime import Bundle, Session
    session, runs = Session(Bundle.open(WORK / name), plan=plan, backend="onnxruntime-cuda"), []
    for _ in range(REPEATS + 1):
        session.reset()
        generation = session.generate(PROMPT, [PICTURE], max_new_tokens=TOKENS)
        generation.finish()
        runs.append(generation.statistics)
    session.reset()
    np.save(logits, session.score(PROMPT, [PICTURE], [])[0].astype(np.float32))
    found = {"rows": runs[0].prompt_rows, "new": runs[0].new_tokens, "graphs": captured(session),
             **{key: statistics.median(getattr(run, key) for run in runs[1:]) for key in ("preprocess_ms", *PHASES)}}
    return {**found, **(long_answer(session, int(most)) if int(most) else {})}


def long_answer(session: Any, most: int) -> dict[str, Any]:
    """What an answer of `most` tokens, or as many as the window holds, takes of the GPU's memory from its tenth token to its last hundred,
    in bytes, and a token's time."""
    from cuda.bindings import runtime as cudart
    session.reset()
    generation, embed, fed, free = session.generate(PROMPT, [PICTURE], max_new_tokens=most + 1), session._embed, 0, []

    def watched(ids: Any) -> Any:
        nonlocal fed
        fed += generation.statistics.prefill_ms > 0  # once a token from then on
        if fed == 10 or fed % 100 == 0:
            free.append(cudart.cudaMemGetInfo()[1])
        return embed(ids)

    session._embed = watched
    generation.finish()
    session._embed = embed
    return {"taken": free[0] - free[-1], "long_ms": generation.statistics.per_token_ms, "most": fed // 100 * 100}


def captured(session: Any) -> str:
    """How many CUDA graphs the session runs from, of how many kinds of work."""
    made = session._decoder._engine._graphs._graphs
    return f"{sum(graph is not None for graph in made.values())} of {len(made)}"


def hugging_face(name: str) -> Any:
    """The model with the bundle's weights, whose names are Hugging Face's, on the GPU; what the bundle has no use for is random."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from edgecomp.ir.graphs import load, read
    from edgecomp_runtime import Bundle
    bundle = Bundle.open(WORK / name)
    with torch.device(DEVICE):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(WORK / f"{name}-checkpoint"), dtype=torch.float16).eval()
    # between releases of transformers, a tower gained or lost a module around it
    wanted = {key.replace("vision_model.", ""): parameter for key, parameter in model.named_parameters()}
    filled = {"model.language_model.embed_tokens.weight"}
    with torch.no_grad():
        wanted["model.language_model.embed_tokens.weight"].copy_(torch.from_numpy(np.array(bundle.embeddings())))
        for graph in ("graphs/vision.onnx", "graphs/decoder.onnx"):
            for key, value in load(bundle.file(graph)).graph.initializers.items():
                found = wanted.get(key.replace("vision_model.", ""))
                if found is not None and value.const_value is not None:
                    found.copy_(torch.from_numpy(np.array(read(value.const_value))))
                    filled.add(key.replace("vision_model.", ""))
    lacking = [key for key in wanted if key not in filled and "language_model" in key]
    assert not lacking, f"the bundle has no {lacking[:3]}"
    return model


def run_torch(name: str, kept: str, logits: str, how: str) -> dict[str, Any]:
    """The same with transformers: vision, one forward over the prompt with `kept` visual tokens (0: all), then one a token, greedily.

    how: 'sdpa', or 'compiled' for decoding through torch.compile with CUDA graphs and a static cache, as `generate` compiles it.
    """
    import torch
    from transformers import StaticCache

    from edgecomp_runtime import Bundle, Session, images
    session = Session(Bundle.open(WORK / name), plan="full", backend="null")
    ids, pictures = session._prepare(PROMPT, [PICTURE], False, 1)
    at = ids.index(session._manifest.text.image_id)
    model = hugging_face(name)
    model.set_attn_implementation("sdpa")
    pixels = torch.from_numpy(pictures[0]).half().to(DEVICE)[None]
    size = {"image_sizes": torch.tensor([SHAPES[name].picture])} if SHAPES[name].picture else {}
    before, after = (torch.tensor(part, device=DEVICE) for part in (ids[:at], ids[at + 1:]))
    decode, static = model.forward, None
    if how == "compiled":
        decode = torch.compile(model.forward, mode="reduce-overhead")
        # made outside what is compiled, so that its addresses are known to stay
        static = StaticCache(config=model.config.get_text_config(), max_cache_len=len(ids) + session._manifest.vision.tokens + TOKENS)
    times: dict[str, list[float]] = {key: [] for key in PHASES}
    rows = 0

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    with torch.inference_mode():
        for _ in range(REPEATS + 1):
            began = clock()
            images.preprocess(images.load(PICTURE), session._manifest.image)  # as edgecomp does it, so that it makes no difference
            started = clock()
            out = model.get_image_features(pixel_values=pixels, **size)
            seen = clock()
            features = out.pooler_output if hasattr(out, "pooler_output") else out
            features = features[0].reshape(-1, features[0].shape[-1])
            table = model.get_input_embeddings()
            embeddings = torch.cat([table(before), features[:int(kept) or None], table(after)])[None]
            rows = embeddings.shape[1]
            if static is not None:
                static.reset()
            fed = clock()
            out = model(inputs_embeds=embeddings, past_key_values=static, use_cache=True, logits_to_keep=1,
                        cache_position=torch.arange(rows, device=DEVICE))
            token, cache = out.logits[:, -1:].argmax(-1).clone(), out.past_key_values
            np.save(logits, out.logits[0, -1].float().cpu().numpy())
            prefilled = clock()
            for step in range(TOKENS - 1):
                torch.compiler.cudagraph_mark_step_begin()  # what the last step gave is no longer needed
                out = decode(input_ids=token, past_key_values=cache, use_cache=True, cache_position=torch.tensor([rows + step], device=DEVICE))
                token = out.logits[:, -1:].argmax(-1).clone()
            done = clock()
            for key, seconds in zip(PHASES, (seen - started, prefilled - fed, prefilled - began, (done - prefilled) / (TOKENS - 1))):
                times[key].append(seconds * 1e3)
    return {"rows": rows, **{key: statistics.median(values[1:]) for key, values in times.items()}}


def contender(limit: float, *arguments: str) -> dict[str, Any]:
    """Runs one contender as a child; adds the GPU memory in GiB that it took at most, its CUDA context included."""
    import torch
    before = lowest = torch.cuda.mem_get_info()[0]
    began = time.monotonic()
    child = subprocess.Popen([sys.executable, "-W", "ignore", __file__, "--child", *arguments], stdout=subprocess.PIPE, text=True)
    while child.poll() is None:
        lowest = min(lowest, torch.cuda.mem_get_info()[0])
        time.sleep(0.002)
        if time.monotonic() - began > limit:
            child.kill()
    out = child.communicate()[0]
    found = json.loads(out.splitlines()[-1]) if child.returncode == 0 and out else {}
    found |= {"gib": (before - lowest) / GIB, "took": time.monotonic() - began, "exit": child.returncode}
    print(json.dumps({"contender": arguments, **found}), flush=True)
    return found


# what was found

def bandwidth() -> dict[str, float]:
    """Bytes a second that the GPU moves: copying 4 GiB (read and written), and reading it (a sum), each the best of ten."""
    import torch
    source, goal = torch.zeros(4 * GIB, dtype=torch.uint8, device=DEVICE), torch.empty(4 * GIB, dtype=torch.uint8, device=DEVICE)
    numbers = source.view(torch.float16)
    numbers.normal_()
    work = {"copied": (lambda: goal.copy_(source), 2), "read": (lambda: numbers.sum(dtype=torch.float32), 1)}
    found = {}
    for name, (run, passes) in work.items():
        best = 0.0
        for _ in range(11):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            best = max(best, passes * source.nbytes / start.elapsed_time(end) * 1e3)
        found[name] = best
    return found


def bytes_a_token(bundle: str, plan: str, rows: int) -> int:
    """That a decoded token reads at the least: the decoder's weights, and the keys and values of so many rows, as they entered it."""
    from edgecomp.footprint import cache_bytes
    from edgecomp.pack.orders import weights_of
    from edgecomp_runtime import Bundle
    opened = Bundle.open(WORK / bundle)
    return weights_of(opened, "graphs/decoder.onnx")[1] + cache_bytes(opened.manifest, opened.manifest.plans[plan], rows)


def compare(name: str, scratch: Path, moved: float, compiled_limit: float) -> list[str]:
    """The table of one model, and its ratios."""
    shape, found = SHAPES[name], {}
    bundle_of(name)
    plans = {("edgecomp", "0", ""): (name, "full"),
             **{("edgecomp", kept, f"{m} at {site}"): (name, plan_name(m, site, kept)) for m, site, kept in shape.plans}}
    if shape.int4:
        quantized_bundle(f"{name}-int4")
        plans |= {("edgecomp, int4", kept, label): (f"{name}-int4", plan) for (_, kept, label), (_, plan) in plans.items()}
    for kept in ("0", str(shape.kept)):
        found["transformers, sdpa", kept, ""] = contender(240, "torch", name, kept, str(scratch / f"hf-{kept}.npy"), "sdpa")
    for key, (bundle, plan) in plans.items():
        most = LONG if plan.startswith(LONG_PLANS) and bundle == name else 0
        found[key] = contender(240, "edgecomp", bundle, plan, str(scratch / f"{bundle}-{plan}.npy"), str(most))
    if compiled_limit:
        found["transformers, compiled", "0", ""] = contender(compiled_limit, "torch", name, "0", str(scratch / "compiled.npy"), "compiled")
    uncut, rows = found["transformers, sdpa", "0", ""], []
    for (who, kept, label), result in found.items():
        kept_here = kept if kept != "0" else "all"
        if "prefill_ms" not in result:
            rows.append([who, kept_here, label, "no result", *[""] * 9])
            continue
        same = found["transformers, sdpa", kept, ""]
        moving = bytes_a_token(*plans.get((who, kept, label), (name, "full")), result["rows"] + TOKENS // 2) / result["per_token_ms"] * 1e3
        rows.append([who, kept_here, label, result["rows"], f"{result['vision_ms']:.1f}", f"{result['prefill_ms']:.1f}",
                     over(uncut, result, "prefill_ms"), f"{result['first_token_ms']:.1f}", over(uncut, result, "first_token_ms"),
                     f"{result['per_token_ms']:.2f}", over(same, result, "per_token_ms"), f"{moving / moved:.0%}", f"{result['gib']:.2f}"])
    head = ["", "visual tokens kept", "where", "rows", "vision ms", "prefill ms", "uncut HF ÷", "TTFT ms", "uncut HF ÷", "ms a token",
            "HF at as many ÷", "of the bandwidth", "peak GiB"]
    return [f"## {shape.title}\n", markdown(head, rows), *agreement(scratch, name), *growth(found), ""]


def plan_name(method: str, site: str, kept: str) -> str:
    return f"{method}-{kept}" + (f"-{site.replace(':', '')}" if ":" in site else "")


def over(reference: dict[str, Any], result: dict[str, Any], key: str) -> str:
    return f"{reference[key] / result[key]:.2f}" if key in reference else "?"


def agreement(scratch: Path, name: str) -> list[str]:
    """How far the logits behind the uncut prompt are apart."""
    files = [scratch / "hf-0.npy", scratch / f"{name}-full.npy"]
    if not all(file.exists() for file in files):
        return []
    theirs, ours = map(np.load, files)
    return [f"- logits behind the uncut prompt differ by {np.abs(theirs - ours).max():.3f} at most, of {np.abs(theirs).max():.2f}; "
            f"the likeliest token is {'the same' if theirs.argmax() == ours.argmax() else 'another'}"]


def growth(found: dict[Any, dict[str, Any]]) -> list[str]:
    """What a long answer takes."""
    return [f"- {label}: from token 10 to token {result['most']}, cudaMemGetInfo's free memory changes by {result['taken']} bytes; "
            f"{result['long_ms']:.2f} ms a token; decoding runs from {result['graphs']} CUDA graphs"
            for (_, _, label), result in found.items() if "taken" in result]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", help=", ".join(SHAPES))
    parser.add_argument("--compiled", type=float, default=600, help="seconds that torch.compile may take for a model; 0 leaves it out")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        kind, *rest = chosen.child
        print(json.dumps({"edgecomp": run_edgecomp, "torch": run_torch}[kind](*rest)))
        return
    import torch
    parts, speed = [], bandwidth()
    torch.cuda.empty_cache()
    for name in chosen.models or SHAPES:
        scratch = WORK / f"{name}-logits"
        scratch.mkdir(parents=True, exist_ok=True)
        parts += compare(name, scratch, speed["copied"], chosen.compiled)
        write("gpu.md", "edgecomp on a GPU against transformers", f"python benchmarks/gpu.py {' '.join(chosen.models)}".strip(),
              f"{torch.cuda.get_device_name()}, torch {torch.__version__}, ONNX Runtime's CUDA provider; fp16, batch 1, random weights, medians of "
              f"{REPEATS} after one to warm up. The GPU copies {speed['copied'] / 1e12:.2f} TB/s (read and written) and reads "
              f"{speed['read'] / 1e12:.2f} TB/s, by torch; `of the bandwidth` is what a token reads of weights and cache, in its time, of the "
              "former. `÷` is transformers' time divided by the row's. TTFT is from the picture's file to the first token.\n", *parts)


if __name__ == "__main__":
    main()
