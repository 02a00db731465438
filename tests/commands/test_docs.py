"""The documents do not drift: README's commands parse, its Python runs, its tree exists."""
from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from conftest import ROOT

from edgecomp.cli import main

README = (ROOT / "README.md").read_text()
COMMANDS = [line.partition("#")[0].strip() for line in README.splitlines() if re.match(r"    edgecomp [a-z]", line)]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_readme_parses(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    command = main.get_command(click.Context(main), name)
    assert command is not None
    command.make_context(name, arguments)  # raises where an option or argument is not known


def test_python_of_readme_runs(demo: Path, scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, = re.findall(r"```python\n(.*?)```", README, re.S)
    code = code.replace('"llava"', repr(str(demo))).replace('"street.jpg"', repr(str(scenes / "images/scene-03.jpg")))
    code = code.replace("What does the sign say?", "what word is written?")
    exec(compile(code, "README.md", "exec"), {})
    assert "Statistics(plan='cls-64'" in capsys.readouterr().out


def test_tree_of_readme_exists() -> None:
    tree = README.partition("## The tree")[2]
    found, above = 0, ROOT
    for line in tree.splitlines():
        if match := re.match(r"( +)([\w./, -]+?)(?:  +|$)", line):
            depth, names = len(match[1]), match[2].split(", ")
            for name in names:
                path = ROOT / name if depth == 4 else above / name
                assert path.exists(), f"README names {path.relative_to(ROOT)}"
                found += 1
            if depth == 4:
                above = ROOT / names[0]
    assert found > 15


def test_contributing_names_files_that_exist() -> None:
    for name in re.findall(r"`((?:edgecomp|export|runtimes|tests|benchmarks|profiles)/[\w/.]+)`", (ROOT / "CONTRIBUTING.md").read_text()):
        if not re.search(r"[A-Z]{2}", name):  # NAME and the like are for the reader to fill in
            assert (ROOT / name).exists(), name
