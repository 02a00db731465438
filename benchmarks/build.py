"""TensorRT engines: build seconds, peak memory and size of each. They are built for cards that are not here, and none is run.

    python benchmarks/build.py      (about 15 minutes on 2 cores, 24 GiB of disk)

The checkpoints are those of benchmarks/large.py: the configs of published models, random weights in bf16, the demonstration model's
tokenizer. The bundles are fp16, and stay in build/benchmarks.
"""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import large
from common import CHECKPOINT, WORK, markdown, write

from edgecomp import devices
from edgecomp.build.bundles import build_bundle
from edgecomp.build.toolchain import toolchain
from edgecomp_runtime import Bundle

QWEN2_TEXT = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
              "vocab_size": 151936, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
              "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
QWEN2_VISION = {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2,
                "temporal_patch_size": 2}


def demo() -> Path:
    """The demonstration model in fp16: whole, cut at the projector, and cut at the decoder's layer 2."""
    return compiled("demo-fp16", CHECKPOINT, "--method", "dart", "--method", "fastv", "--keep", "64")  # at projector and decoder:2


def smolvlm_256m() -> Path:
    """SmolVLM-256M's size: 30 layers of 576, a tower of 12 layers of 768, one tile of 512x512 that gives 64 visual tokens."""
    return compiled("smolvlm-256m-fp16", large.checkpoint("smolvlm-256m"), "--tiles", "1")


def qwen2_vl_2b() -> Path:
    """Qwen2-VL-2B's size: 28 layers of 1536, a tower of 32 layers of 1280, pictures of 448x448 that give 256 visual tokens."""
    large.MODELS["qwen2-vl-2b"] = large.Model("qwen2_vl", QWEN2_TEXT, QWEN2_VISION, "Qwen2VLImageProcessorPil", "fp16", [])
    return compiled("qwen2-vl-2b", large.checkpoint("qwen2-vl-2b"), "--image-size", "448x448")


BUNDLES = {"demo": demo, "smolvlm-256m": smolvlm_256m, "qwen2-vl-2b": qwen2_vl_2b}


def compiled(name: str, checkpoint: Path, *options: str) -> Path:
    """An fp16 bundle with a context of 2048, compiled if it is not there."""
    out = WORK / name
    if not (out / "edgecomp.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        edgecomp = str(Path(sys.executable).with_name("edgecomp"))
        subprocess.run([edgecomp, "compile", str(checkpoint), "-o", str(out), "--precision", "fp16", "--context", "2048", "--no-verify", *options],
                       check=True)
    return out


DEVICES = ("rtx-3060", "rtx-4090", "rtx-5090")


def build(bundle: Path, device: str) -> list[list[object]]:
    """A row an engine of a bundle's plans for a device, built in a linked copy of it."""
    wanted = devices.load(device)
    copy = WORK / "engines"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(bundle, copy, copy_function=os.link)
    try:
        built = build_bundle(copy, wanted, toolchain(wanted), list(Bundle.open(copy).manifest.plans), say=print)
    finally:
        shutil.rmtree(copy)
    rows = []
    for one in built:
        took = one.result
        rows.append([one.plan, one.part, device, f"{took.seconds:.0f}", *(f"{size / 2**20:.0f}" for size in (
            took.engine_bytes, took.peak_anonymous_bytes, took.peak_resident_bytes)), f"{took.peak_anonymous_bytes / took.engine_bytes:.2f}"])
        print(*rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    wanted = sys.argv[1:] or list(BUNDLES)
    head = ["plan", "engine", "for", "seconds", "MiB", "peak MiB, anonymous", "resident", "anonymous / engine"]
    parts = [f"\n{name}: {(BUNDLES[name].__doc__ or '').splitlines()[0]}\n\n" + markdown(
        head, [row for device in DEVICES for row in build(BUNDLES[name](), device)]) for name in wanted]
    write("build.md", "Engines of TensorRT for RTX, built without a GPU and not run", "python benchmarks/build.py", *parts)
