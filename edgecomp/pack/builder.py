"""The builder's own modules, for a board that has Python and TensorRT and nothing of ours: whatever build.sh's files import."""
from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import edgecomp
import edgecomp_runtime

BOARD = Path(__file__).parent / "board"
SCRIPTS = ("build_engine.py", "complete.py")  # that build.sh runs
ENGINE = "edgecomp.build.engine"  # that they start as a process
PACKAGES = {package.__name__: Path(str(package.__file__)).parent for package in (edgecomp, edgecomp_runtime)}


def modules() -> dict[str, Path]:
    """Files by their names below a folder that is on Python's path there: the scripts, and of our packages what they need."""
    found = {script: BOARD / script for script in SCRIPTS}
    new = [ENGINE, *(name for script in SCRIPTS for name in _imported(found[script]))]
    while new:
        path = _path(new.pop())
        if path is None:
            continue
        name = next(f"{package}/{path.relative_to(folder).as_posix()}" for package, folder in PACKAGES.items() if path.is_relative_to(folder))
        if name not in found:
            found[name] = path
            new += _imported(path)
    return found


def _imported(path: Path) -> Iterator[str]:
    """The modules of our packages that a file imports when it runs, with the packages that they are in; names in them, too."""
    for node in _running(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [str(node.module), *(f"{node.module}.{name}" for name in names)]
        for name in names:
            parts = name.split(".")
            if parts[0] in PACKAGES:
                yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _running(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports, without those that are for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from _running(child)


def _path(module: str) -> Path | None:
    """The file of one of our modules; None for a name in one."""
    package, *parts = module.split(".")
    base = PACKAGES[package].joinpath(*parts)
    return next((path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()), None)
