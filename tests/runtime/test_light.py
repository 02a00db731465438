"""What a device does not need is not loaded there, and what is missing is named with the way to install it."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgecomp.cli import COMMANDS

HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript")

# a machine on which packages are not installed; importing one says what Python says there
WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
from edgecomp.cli import main
main(prog_name="edgecomp")
"""


def python(program: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program, *map(str, args)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


def loaded_after(program: str, *args: object) -> set[str]:
    """The packages and modules that a program has loaded in a new interpreter."""
    result = python(f"{program}\nimport sys, json; print(json.dumps(sorted(sys.modules)))", *args)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def heavy(modules: set[str]) -> set[str]:
    return {name for name in modules if name.partition(".")[0] in HEAVY}


def test_the_question_asked_below_can_be_answered_with_no() -> None:
    assert heavy(loaded_after("import onnx_ir")) >= {"onnx_ir"}


def test_importing_the_runtime_loads_nothing_but_it() -> None:
    modules = loaded_after("import edgecomp_runtime")
    assert not heavy(modules)
    assert not {"numpy", "PIL", "tokenizers", "jinja2", "onnxruntime", "edgecomp"} & modules


def test_running_a_bundle_loads_what_a_device_has(demo: Path, scenes: Path) -> None:
    modules = loaded_after("""
import sys
from edgecomp_runtime import Bundle, Session
session = Session(Bundle.open(sys.argv[1]), plan="dart-64")
assert session.generate("describe the image.", [sys.argv[2]], max_new_tokens=3).finish()
""", demo, scenes / "images" / "scene-03.jpg")
    assert not heavy(modules)
    assert {"numpy", "PIL", "tokenizers", "jinja2", "onnxruntime"} <= modules
    assert not any(name.partition(".")[0] in ("edgecomp", "edgecomp_export", "click") for name in modules)


def test_help_loads_no_command() -> None:
    modules = loaded_after("""
import sys
from edgecomp.cli import main
sys.argv = ["edgecomp", "--help"]
main(standalone_mode=False)
""")
    assert "edgecomp.cli" in modules and "numpy" not in modules and not heavy(modules)
    assert not [name for name in modules if name.startswith("edgecomp.commands")]


def test_help_is_quick() -> None:
    def seconds() -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "edgecomp", "--help"], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - began
    assert min(seconds() for _ in range(5)) < 0.3


@pytest.mark.parametrize("command", ["run", "eval", "inspect", "devices", "doctor"])
def test_a_device_needs_none_of_the_compilers_packages(command: str, demo: Path, scenes: Path) -> None:
    args = {"run": [demo, "--plan", "dart-64", "--image", scenes / "images" / "scene-03.jpg", "--prompt", "what number is written?"],
            "eval": [demo, "--plan", "dart-64", "--data", scenes / "questions.jsonl", "--limit", 1], "inspect": [demo]}.get(command, [])
    result = python(WITHOUT.format(missing=HEAVY), command, *args)
    assert result.returncode == 0, result.stderr
    telling = {"run": "74", "eval": "correct %", "inspect": "576 visual tokens", "devices": "rtx-4090", "doctor": "yes  run bundles"}
    assert telling[command] in result.stdout


@pytest.mark.parametrize(("command", "args"), [
    ("compile", ["MODEL", "-o", "OUT", "--method", "dart", "--keep", "64"]), ("compile", ["MODEL", "-o", "OUT"]), ("export", ["MODEL", "-o", "OUT"]),
    ("compress", ["BUNDLE", "-o", "OUT", "--method", "dart", "--keep", "9"]), ("verify", ["BUNDLE"]), ("profile", ["BUNDLE"]), ("methods", []),
])
def test_what_needs_them_says_what_to_install(command: str, args: list[str], demo: Path, checkpoint: Path, tmp_path: Path) -> None:
    places = {"MODEL": checkpoint, "BUNDLE": demo, "OUT": tmp_path / "out"}
    result = python(WITHOUT.format(missing=HEAVY), command, *(places.get(a, a) for a in args))
    assert result.returncode == 1 and result.stdout == ""
    line, = result.stderr.splitlines()
    start, _, rest = line.partition(" needs ")
    package, _, advice = rest.partition(", ")
    assert start == f"edgecomp: `edgecomp {command}`" and package.partition(".")[0] in HEAVY
    assert advice == "which is not installed: pip install 'edgecomp[export]'"
    assert list(tmp_path.iterdir()) == []


def test_the_help_of_every_command_needs_none_of_them() -> None:
    program = WITHOUT.replace('main(prog_name="edgecomp")', """
from edgecomp.cli import COMMANDS
for name in COMMANDS:
    try:
        main([name, "--help"], prog_name="edgecomp")
    except SystemExit as ended:
        assert ended.code == 0, name
""")
    result = python(program.format(missing=HEAVY))
    assert result.returncode == 0 and result.stderr == ""
    assert [line.split()[2] for line in result.stdout.splitlines() if line.startswith("Usage: ")] == list(COMMANDS)


def test_a_device_without_a_backend_is_told_so(demo: Path) -> None:
    result = python(WITHOUT.format(missing=("onnxruntime",)), "run", demo, "--prompt", "x")
    assert result.returncode == 1
    assert result.stderr == "edgecomp: `edgecomp run` needs onnxruntime, which is not installed: pip install 'edgecomp[cpu]'\n"


def test_a_module_that_no_extra_brings_is_our_own_mistake_and_shown_whole(demo: Path) -> None:
    result = python(WITHOUT.format(missing=("jinja2",)), "run", demo, "--prompt", "x")
    assert result.returncode == 1 and "Traceback" in result.stderr and "No module named 'jinja2'" in result.stderr
