"""Exporting, verifying and loading checkpoints of real size on a small host: time, peak memory and disk.

    python benchmarks/large.py smolvlm-256m qwen2.5-vl-3b      (about 15 minutes and 25 GiB of disk on 2 cores)

The checkpoints have the configs of the published models and random weights in bf16, as published ones are stored; the tokenizer is
the demonstration model's. Each step is a process of its own, whose peak resident size (mapped files included) the kernel gives.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import CHECKPOINT, QUESTIONS, WORK, markdown, write

GIB = 2**30
PICTURE = str(QUESTIONS.parent / "images" / "scene-03.jpg")
SHARD_BYTES = 2 * GIB

QWEN_TEXT = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
             "vocab_size": 151936, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
             "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
QWEN_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2,
               "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": 2048}
SMOL_TEXT = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49280, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
SMOL_VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 512, "patch_size": 16}

VICUNA_TEXT = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
               "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
               "eos_token_id": None}  # so that no answer ends early
CLIP_VISION = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
               "image_size": 336, "patch_size": 14, "projection_dim": 768}
CLIP_PICTURES = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
ANYRES = {"image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]}

TEMPLATE = "{% for m in messages %}{{ m.role }}:{% for c in m.content %}{{ '<image>\\n' if c.type == 'image' else c.text }}{% endfor %}\n{% endfor %}"


@dataclass(frozen=True)
class Model:
    """A published model's config, image processor and special tokens, and how it is compiled here."""
    model_type: str
    text: dict[str, Any]
    vision: dict[str, Any]
    processor: str
    precision: str
    options: list[str]
    other: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    tokens: list[str] = field(default_factory=list)


MODELS = {
    "smolvlm-256m": Model("smolvlm", SMOL_TEXT, SMOL_VISION, "SmolVLMImageProcessorPil", "fp32", ["--tiles", "4"], {"scale_factor": 4},
                          {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}, ["<fake_token_around_image>", "<global-img>"]),
    "qwen2.5-vl-3b": Model("qwen2_5_vl", QWEN_TEXT, QWEN_VISION, "Qwen2VLImageProcessorPil", "fp16", ["--image-size", "448x448"]),
    "llava-1.5-7b": Model("llava", VICUNA_TEXT, CLIP_VISION, "CLIPImageProcessorPil", "fp16", [], settings=CLIP_PICTURES),
    "llava-next-7b": Model("llava_next", VICUNA_TEXT, CLIP_VISION, "LlavaNextImageProcessorPil", "fp16", ["--image-size", "672x672"], ANYRES,
                           {**CLIP_PICTURES, **ANYRES}),
}


def checkpoint(name: str) -> Path:
    """Writes the checkpoint, shard by shard, if it is not there."""
    import torch
    import transformers
    from safetensors.torch import save_file
    out = WORK / f"{name}-checkpoint"
    if (out / "done").exists():
        return out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    made = MODELS[name]
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    tokenizer.add_tokens(made.tokens, special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(out)
    text = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **made.text}
    config = transformers.AutoConfig.for_model(made.model_type, text_config=text, vision_config=made.vision, dtype="bfloat16", **made.other,
                                               image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
                                               tie_word_embeddings=text["tie_word_embeddings"])
    config.save_pretrained(out)
    getattr(transformers, made.processor)(**made.settings).save_pretrained(out)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(out)
    generator, shard, size, number = torch.Generator().manual_seed(0), {}, 0, 0
    names = [n for n, _ in model.named_parameters()]  # a tied head comes once
    for parameter_name in names:
        meta = model.get_parameter(parameter_name)
        tensor = torch.empty(meta.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        shard[parameter_name] = tensor + 1 if meta.ndim == 1 and "bias" not in parameter_name else tensor
        size += tensor.nbytes
        if size > SHARD_BYTES or parameter_name == names[-1]:
            save_file(shard, out / f"model-{number:05}.safetensors", metadata={"format": "pt"})
            shard, size, number = {}, 0, number + 1
    files = {key: path.name for path in sorted(out.glob("*.safetensors")) for key in _keys(path)}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (out / "done").touch()
    return out


def _keys(path: Path) -> list[str]:
    with path.open("rb") as file:
        return [key for key in json.loads(file.read(int.from_bytes(file.read(8), "little"))) if key != "__metadata__"]


def timed(*command: str) -> tuple[float, float, str]:
    """Seconds, peak resident GiB and standard output of a command."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return time.perf_counter() - began, usage.ru_maxrss * 1024 / GIB, output


def answer(bundle: str) -> None:
    """Loads everything, answers once, and prints the proportional set size before and after, and the weights' bytes."""
    from edgecomp.footprint import weight_bytes
    from edgecomp_runtime import Bundle, Session
    session = Session(Bundle.open(bundle))
    loaded = pss()
    generation = session.generate("describe the image.", [PICTURE], max_new_tokens=8)
    generation.finish()
    statistics = generation.statistics
    print(json.dumps({"loaded": loaded, "used": pss(), "weights": weight_bytes(session.bundle.manifest), "rows": statistics.prompt_rows,
                      "vision_ms": statistics.vision_ms, "prefill_ms": statistics.prefill_ms, "per_token_ms": statistics.per_token_ms}))


def pss() -> int:
    """This process's proportional set size in bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=["smolvlm-256m"], help=", ".join(MODELS))
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        answer(options.answer)
        return
    rows = []
    for name in options.models:
        precision, choices = MODELS[name].precision, MODELS[name].options
        folder, bundle = checkpoint(name), WORK / name
        shutil.rmtree(bundle, ignore_errors=True)
        edgecomp = str(Path(sys.executable).with_name("edgecomp"))
        seconds, peak, _ = timed(edgecomp, "compile", str(folder), "-o", str(bundle), "--precision", precision, "--no-verify", *choices)
        stored = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / GIB
        disk = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()) / GIB
        checked, check_peak, said = timed(edgecomp, "verify", str(bundle))
        _, _, printed = timed(sys.executable, __file__, "--answer", str(bundle))
        loaded = json.loads(printed)
        weights = loaded["weights"] / GIB
        held = [f"{loaded[when] / GIB:.2f} ({loaded[when] / loaded['weights']:.2f})" for when in ("loaded", "used")]
        rows.append((name, precision, f"{stored:.2f}", f"{weights:.2f}", f"{disk:.2f}", f"{seconds:.0f}", f"{peak:.2f}", f"{peak / weights:.2f}",
                     f"{checked:.0f}", f"{check_peak:.2f}", *held))
        print(name, said, loaded, flush=True)
    head = ("model", "bundle", "checkpoint GiB", "weights GiB", "bundle GiB", "compile s", "its peak GiB", "/ weights", "verify s", "its peak GiB",
            "PSS loaded GiB (/ weights)", "PSS after an answer")
    write("large.md", "Large checkpoints on a small host", f"python benchmarks/large.py {' '.join(options.models)}", markdown(head, rows))


if __name__ == "__main__":
    main()
