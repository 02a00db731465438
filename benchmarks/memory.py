"""Memory under onnxruntime on the CPU: what is predicted from a bundle's graphs beside what is measured.

    python benchmarks/memory.py              (about 12 minutes on 2 cores)

Bundles of sites.py, choosing.py and large.py, two in fp16 (`edgecomp compile --precision fp16`), as far as they are there, four quantized from
these, and a model of a few hundred kilobytes, which shows what the process takes without a model. Every plan answers eight times in a process
of its own, whose peak resident memory the kernel gives (VmHWM).
"""
from __future__ import annotations

import platform

from choosing import PICTURE
from common import RESULTS, WORK, markdown, quantized_bundle, random_llava

from edgecomp.doctor import machine
from edgecomp.measure import Spec, measure
from edgecomp.predict.memory import memory_of
from edgecomp_runtime import Bundle

PROMPT = "describe the image. where is the star? what number is written? what color is the ring?"
ANSWERS, TOKENS, MIB = 8, 17, 2**20
# title: (folder, whether the constants and the form of edgecomp/predict/resident.py were chosen on it)
BUNDLES = {"tiny": ("memory-tiny", True), "demonstration model": ("sites-demo", True), "SmolVLM-256M's size": ("sites-smol", True),
           "demonstration model, fp16": ("demo-fp16", True), "SmolVLM-256M, fp16": ("smolvlm-256m-fp16", True),
           "SmolVLM-256M's size, int8": ("sites-smol-int8", True), "SmolVLM-256M's size, int4": ("sites-smol-int4", True),
           "demonstration model, int8": ("sites-demo-int8", False), "demonstration model, int4": ("sites-demo-int4", False),
           "SmolVLM-256M, 4 tiles and an overview": ("smolvlm-256m", False),
           "LLaVA-NeXT at SmolVLM-256M's size": ("selectors-llava_next-bundle", False)}


if __name__ == "__main__":
    random_llava("memory-tiny", {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
                 {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                  "vocab_size": 411}, 70, {})
    rows: list[list[object]] = []
    parts: list[list[object]] = []
    for title, (name, fitted) in BUNDLES.items():
        quantized_bundle(name)
        if not (WORK / name).exists():
            print(f"left out: {name} is not there")
            continue
        opened = Bundle.open(WORK / name)
        for plan in opened.manifest.plans:
            measured = measure(Spec(str(opened.path), plan, str(PICTURE), PROMPT, ANSWERS - 1, TOKENS))
            text_rows = measured["latency"]["prompt_rows"] - opened.manifest.plans[plan].visual_tokens
            predicted, peak = memory_of(opened, plan, text_rows=text_rows, new_tokens=TOKENS), measured["peak_bytes"]
            total = sum(predicted.values())
            rows.append([title, plan, f"{total / MIB:.0f}", f"{peak / MIB:.0f}", f"{100 * (total / peak - 1):+.1f} %", "yes" if fitted else "no"])
            parts.append([title, plan, *(f"{size / MIB:.1f}" for size in predicted.values())])
            print(*rows[-1], flush=True)
    text = "\n".join([
        "# Memory, predicted and measured\n",
        f"`python benchmarks/memory.py` on {machine()['cpu']}, Python {platform.python_version()}. Peak resident memory under onnxruntime on the "
        "CPU, one picture and a question. `predicted` is computed from a bundle's graphs and manifest and from the constants in "
        "`edgecomp/predict/resident.py`; `measured` is the kernel's peak. Constants and form were chosen on the rows that say so; the "
        "others are new to them.\n",
        markdown(["model", "plan", "predicted MiB", f"measured MiB ({measured['meter']})", "error", "chosen on it"], rows),
        "## The parts, MiB, all predicted\n", markdown(["model", "plan", *predicted], parts)])
    (RESULTS / "memory.md").write_text(text, encoding="utf-8")
    print(text)
