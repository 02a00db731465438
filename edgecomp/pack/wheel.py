"""The runtime as a wheel: a zip file of pure Python that pip installs, made without any build tool.

Format: https://packaging.python.org/en/latest/specifications/binary-distribution-format/
"""
from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from pathlib import Path

import edgecomp
import edgecomp_runtime

NAME, MODULE = "edgecomp-runtime", "edgecomp_runtime"
# of pyproject.toml's dependencies those that the runtime imports
DEPENDENCIES = ("jinja2>=3.1.6", "numpy>=1.26", "pillow>=10.3", "tokenizers>=0.22")
LEAST_CUDA_PYTHON = (12, 6)  # the first with the modules cuda.bindings; for an older CUDA 12 it is good, too
EPOCH = (1980, 1, 1, 0, 0, 0)  # zip knows nothing older; the same files make the same wheel


def file_name() -> str:
    return f"{MODULE}-{edgecomp.__version__}-py3-none-any.whl"


def requirements(cuda: str) -> list[str]:
    """What the runtime needs on a board with that CUDA, as '12.6.68'. TensorRT itself comes with JetPack."""
    major = int(cuda.split(".")[0])
    least = ".".join(map(str, LEAST_CUDA_PYTHON)) if major <= LEAST_CUDA_PYTHON[0] else str(major)
    return [*DEPENDENCIES, f"cuda-python>={least},<{max(major, LEAST_CUDA_PYTHON[0]) + 1}"]


def wheel(cuda: str) -> bytes:
    """The wheel's bytes, for a board with that CUDA."""
    package = Path(edgecomp_runtime.__file__).parent
    files = {f"{MODULE}/{path.relative_to(package).as_posix()}": path.read_bytes() for path in sorted(package.rglob("*"))
             if path.is_file() and "__pycache__" not in path.parts}
    info = f"{MODULE}-{edgecomp.__version__}.dist-info"
    files[f"{info}/METADATA"] = _lines("Metadata-Version: 2.1", f"Name: {NAME}", f"Version: {edgecomp.__version__}",
                                       "Summary: Runs edgecomp's bundles on a device", "License: Apache-2.0", "Requires-Python: >=3.10",
                                       *(f"Requires-Dist: {requirement}" for requirement in requirements(cuda)))
    files[f"{info}/WHEEL"] = _lines("Wheel-Version: 1.0", "Generator: edgecomp", "Root-Is-Purelib: true", "Tag: py3-none-any")
    record = f"{info}/RECORD"
    files[record] = _lines(*(f"{name},sha256={_digest(content)},{len(content)}" for name, content in files.items()), f"{record},,")
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return out.getvalue()


def _lines(*lines: str) -> bytes:
    return ("\n".join(lines) + "\n").encode()


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
