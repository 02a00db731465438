"""Asks the packed model: `env/bin/python ask.py QUESTION [PICTURE ...]`. It needs the runtime's wheel, and engines that build.sh made."""
from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description="Asks the packed model about pictures.")
    parser.add_argument("question")
    parser.add_argument("pictures", nargs="*")
    parser.add_argument("--plan", help="a budget of the bundle, if not its default")
    given = parser.parse_args()
    try:
        from edgecomp_runtime import Bundle, EdgecompError, Session
    except ModuleNotFoundError as error:
        sys.exit(f"ask.py: {error.name} is not installed in this Python: install the wheel beside ask.py, and ask with the Python that has it")
    try:
        importlib.import_module("tensorrt")
    except ImportError as error:
        sys.exit(f"ask.py: this Python cannot import tensorrt ({error}): sudo apt install python3-libnvinfer, and ask with an env that was made by "
                 "python3 -m venv --system-site-packages env")
    try:
        session = Session(Bundle.open(Path(__file__).resolve().parent / "bundle"), plan=given.plan, backend="tensorrt")
        for piece in session.generate(given.question, given.pictures):
            print(piece, end="", flush=True)
    except EdgecompError as error:
        sys.exit(f"ask.py: {error}")
    print()


if __name__ == "__main__":
    main()
