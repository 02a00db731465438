"""The published type stubs of TensorRT, for mypy, in build/stubs: `python tests/tensorrt_stubs.py`.

The package tensorrt-stubs asks for TensorRT itself, which is not wanted here, and makes a folder `tensorrt` that looks like it where it is
installed; so it goes to a folder of its own, without what it asks for. Five lines in it are no Python (a parameter named `in`, one
without a default behind others with): they are mended, for mypy stops at them.
"""
from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

STUBS = Path(__file__).parents[1] / "build" / "stubs"
PACKAGE = "tensorrt-stubs==10.13.0.35.1"
DONE = STUBS / "done"


def main() -> None:
    if DONE.exists() and DONE.read_text() == PACKAGE:
        return
    shutil.rmtree(STUBS, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(STUBS), PACKAGE],
                   check=True)
    path = STUBS / "tensorrt_bindings" / "tensorrt.pyi"
    text, parameters = re.subn(r"\bin: list\[", "inputs: list[", path.read_text())
    text, defaults = re.subn(r"(power: Weights = None, channel_axis: int)\)", r"\1 = ...)", text)
    if (parameters, defaults) != (4, 1):
        sys.exit(f"{PACKAGE} has changed: {parameters} parameters and {defaults} defaults to mend, not 4 and 1")
    path.write_text(text)
    DONE.write_text(PACKAGE)


if __name__ == "__main__":
    main()
