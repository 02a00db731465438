"""What choosing costs: each method's own nodes against the prefill that it saves, on the CPU.

    python benchmarks/choosing.py          (about 10 minutes on 2 cores)

A decoder and a vision tower of SmolVLM-256M's size with random weights (30 layers of width 576; 12 layers of width 768, with a CLS token),
once behind LLaVA's one tile of 576 tokens, once behind LLaVA-NeXT's five (2,880, and 48 row newlines). A selector is all that a method adds:
the attention rows or keys that it reads, its rule, and the gathering of what it keeps. It is cut out of the spliced graph and run by
itself on random values, 20 times; the prefill saved is that of the full model less that of `random` at the same site and budget.
"""
from __future__ import annotations

import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from common import CHECKPOINT, QUESTIONS, WORK, markdown, write

from edgecomp import methods
from edgecomp.compile import compile_model
from edgecomp.compress import Recipe, planned
from edgecomp.dialects.onnxruntime import lower
from edgecomp.ir.graphs import load
from edgecomp.ir.rewrite import DOMAIN, marks, nodes
from edgecomp.methods.base import DOMAIN as FUNCTIONS
from edgecomp.passes.decoder import in_decoder
from edgecomp.passes.encoder import in_encoder, state_before
from edgecomp.passes.merge_layers import in_every_layer
from edgecomp.passes.splice import at_projector
from edgecomp_export.pieces import cut
from edgecomp_runtime import Bundle, Session

PICTURE, PROMPT = QUESTIONS.parent / "images" / "scene-03.jpg", "where is the star? what number is written?"
TIMES, TEXT = 20, 30
SIZES = {"llava": "64", "llava_next": "320"}


def checkpoint(kind: str) -> Path:
    """A random checkpoint of SmolVLM-256M's size."""
    out = WORK / f"selectors-{kind}"
    if not out.exists():
        import torch
        import transformers
        torch.manual_seed(0)
        text = transformers.LlamaConfig(
            vocab_size=49280, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
            max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        vision = transformers.CLIPVisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                                               image_size=336, patch_size=14)
        image = transformers.AutoConfig.from_pretrained(CHECKPOINT).image_token_id
        config = transformers.AutoConfig.for_model(kind, vision_config=vision, text_config=text, image_token_index=image, tie_word_embeddings=True)
        transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(out)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "processor_config.json"):
            shutil.copy(CHECKPOINT / name, out / name)
        if kind == "llava_next":
            (out / "processor_config.json").unlink()
            transformers.LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}).save_pretrained(out)
    return out


def bundle_of(kind: str) -> Path:
    out = WORK / f"selectors-{kind}-bundle"
    if not out.exists():
        keep = SIZES[kind]
        recipes = [Recipe.of(methods.make("random"), keep, site) for site in ("projector", "decoder:2")]
        compile_model(str(checkpoint(kind)), out, recipes, context=4096, image_size=None if kind == "llava" else (672, 672), say=print)
    return out


def prefill(bundle: Bundle, plan: str) -> float:
    """Milliseconds, median of five."""
    session, found = Session(bundle, plan=plan), []
    for _ in range(6):
        session.reset()
        generation = session.generate(PROMPT, [PICTURE], max_new_tokens=1)
        generation.finish()
        found.append(generation.statistics.prefill_ms)
    return statistics.median(found[1:])


def selector(bundle: Bundle, recipe: Recipe) -> tuple[ir.Model, int]:
    """What the recipe's one step adds to its graph, lowered, and its nodes."""
    manifest = bundle.manifest
    step, = planned(recipe, manifest)[:1]
    files = manifest.plans["full"].variants["neutral"]
    model, began = load(bundle.file(files["prefill" if step.in_decoder else "vision"])), list[ir.Value]()
    if step.in_decoder:
        in_decoder(model, manifest.decoder, step.layer, step.step)
        join = next(nodes(model, "Cut", DOMAIN))
        wanted = [v for v in join.inputs[1:1 + len(join.outputs)] if v is not None]
    elif step.kind == "encoder" and step.stage.method.every_layer:
        in_every_layer(model, manifest.vision, step.stage.method, step.layer, step.step.keep)
        wanted = [v for node in model.graph if node.domain == FUNCTIONS for v in node.outputs if v.uses()]
    else:
        if step.kind == "encoder":
            began.append(state_before(model, step.layer))
            in_encoder(model, manifest.vision, step.layer, step.step)
        else:
            at_projector(model, manifest.vision, step.step)
        outputs = {v.name: v for v in model.graph.outputs}
        calls = [v for node in model.graph if node.domain == FUNCTIONS for v in node.outputs if v.uses()]
        wanted = calls if step.kind == "encoder" else [outputs["visual_tokens"], outputs["kept"]]
    stops = began + [node.outputs[0] for signal in ("hidden", "visual_tokens") for node in marks(model, signal).values()]
    for node in nodes(model, "Attention", DOMAIN):
        stops += [v for v in (*node.inputs[:2], *node.outputs) if v is not None]
    if step.kind == "encoder" and step.stage.method.every_layer:
        stops += [v for node in model.graph if node.domain == FUNCTIONS for v in node.inputs[:2] if v is not None]
    stops = [v for v in dict.fromkeys(stops) if v not in wanted]
    piece = cut(model, wanted, [f"out{n}" for n in range(len(wanted))], {value: f"in{n}" for n, value in enumerate(stops)})
    lower(piece)
    return piece, sum(1 for node in ir.traversal.RecursiveGraphIterator(piece.graph) if node.op_type != "Constant")


def timed(bundle: Bundle, piece: ir.Model) -> float:
    """Milliseconds, median of TIMES runs on random values."""
    path = bundle.path / "graphs" / "selector.onnx"
    ir.save(piece, path)
    tokens, rng = bundle.manifest.vision.tokens, np.random.default_rng(0)
    try:
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    finally:
        path.unlink()
    tiles = len(bundle.manifest.vision.tiles)
    feeds: dict[str, Any] = {}
    for value in session.get_inputs():
        sizes = {"images": 1, "batch": 1, "rows": TEXT + tokens}
        kept = int(SIZES["llava" if tiles == 1 else "llava_next"])
        shape = [d if isinstance(d, int) else sizes.get(d, TEXT + kept if d.startswith("rows") else TEXT - 2 if d.startswith("text") else tiles)
                 for d in value.shape]
        name = value.name.partition(".")[0]
        if name == "visual_rows":
            feeds[value.name] = np.arange(2, 2 + tokens)[None]
        elif name == "row_map":
            feeds[value.name] = np.concatenate([[0, 1], TEXT + tokens + np.arange(kept), np.arange(2 + tokens, TEXT + tokens)])
        elif name == "text_rows":
            feeds[value.name] = np.arange(2 + tokens, TEXT + tokens)
        elif name == "positions":
            feeds[value.name] = np.arange(TEXT + tokens)[None]
        elif value.type == "tensor(int64)":
            feeds[value.name] = np.zeros(shape, np.int64)
        else:
            feeds[value.name] = rng.normal(0, 1, shape).astype(np.float32)
    took = []
    for _ in range(TIMES + 3):
        at = time.perf_counter()
        session.run(None, feeds)
        took.append((time.perf_counter() - at) * 1e3)
    return statistics.median(took[3:])


if __name__ == "__main__":
    rows: list[list[object]] = []
    for kind, keep in SIZES.items():
        bundle = Bundle.open(bundle_of(kind))
        tokens = bundle.manifest.vision.tokens
        full = prefill(bundle, "full")
        saved = {site: full - prefill(bundle, plan) for site, plan in (("projector", f"random-{keep}"), ("decoder", f"random-{keep}-decoder2"))}
        print(kind, tokens, full, saved, flush=True)
        for name in sys.argv[1:] or methods.METHODS:
            method = methods.make(name)
            for site in method.taxonomy.sites:
                at = {"decoder": "decoder:2", "encoder": "encoder:3"}.get(site, site) if name not in ("visionzip", "tome") else ""
                if site != "projector" and name in ("visionzip", "tome") and site != next(iter(method.taxonomy.sites)):
                    continue
                recipe = Recipe.of(method, keep, "projector" if site == "projector" else at)
                try:
                    piece, count = selector(bundle, recipe)
                except Exception as error:
                    print(kind, name, site, str(error)[:120], flush=True)
                    continue
                took = timed(bundle, piece)
                less = saved["decoder" if site == "decoder" else "projector"]
                rows.append([tokens, keep, name, site, count, f"{took:.2f}", f"{less:.0f}", f"{100 * took / less:.1f} %"])
                print(*rows[-1], flush=True)
    write("choosing.md", "What choosing costs", "python benchmarks/choosing.py",
          markdown(["visual tokens", "kept", "method", "site", "nodes", "selector ms", "prefill saved ms", "part"], rows))
