"""What is installed on this machine, and what that allows."""
from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

# ability: (packages, any one of which is enough: False means all, the extra that brings them)
ABILITIES = {
    "compress and lower graphs": (("onnx-ir", "onnxscript"), False, "export"),
    "export Hugging Face checkpoints": (("torch", "transformers", "onnx-ir", "onnxscript"), False, "export"),
    "run bundles on ONNX Runtime": (("onnxruntime", "onnxruntime-gpu"), True, "cpu"),
    "build engines with TensorRT for RTX": (("tensorrt-rtx", "onnx-ir"), False, "tensorrt-rtx"),
    "build engines with TensorRT": (("tensorrt", "onnx-ir"), False, "tensorrt"),
}


def examine() -> dict[str, Any]:
    """The machine, and for each ability its packages with versions (None: missing), whether it is there, and advice."""
    abilities = {}
    for name, (packages, any_one, extra) in ABILITIES.items():
        versions = {p: _version(p) for p in packages}
        ok = any(versions.values()) if any_one else all(versions.values())
        advice = "" if ok else f"pip install 'edgecomp[{extra}]'"
        if any_one and all(versions.values()):
            advice = "both are installed and overwrite each other's files: pip uninstall both, then install one of them"
        abilities[name] = {"ok": ok, "packages": {p: v for p, v in versions.items() if v or not any_one} or versions, "advice": advice}
    return {"machine": machine(), "abilities": abilities}


def machine() -> dict[str, Any]:
    """CPU, cores that this process may use, memory, system, Python."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"cpu": _cpu(), "cores": cores, "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": f"{platform.system()} {platform.machine()}", "python": platform.python_version()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))), platform.machine())
