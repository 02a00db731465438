"""The door from Hugging Face's optimum: its command line and its registry of exporters."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from optimum.exporters.tasks import TasksManager
from transformers import AutoConfig

from edgecomp_export.families import FAMILIES
from edgecomp_export.optimum import EdgecompConfig
from edgecomp_runtime import Bundle


def optimum_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([Path(sys.executable).with_name("optimum-cli"), *arguments], capture_output=True, text=True, timeout=200)


def test_optimum_cli_compiles_a_bundle(tiny: Path, tmp_path: Path) -> None:
    done = optimum_cli("export", "edgecomp", "--model", str(tiny), str(tmp_path / "bundle"), "--method", "dart", "--keep", "9", "--no-verify")
    assert done.returncode == 0, done.stderr
    assert list(Bundle.open(tmp_path / "bundle").manifest.plans) == ["full", "dart-9"]


def test_bad_input_is_one_line_there_too(tmp_path: Path) -> None:
    done = optimum_cli("export", "edgecomp", "--model", str(tmp_path), str(tmp_path / "bundle"))
    assert done.returncode == 1
    assert done.stderr == f"edgecomp: {tmp_path} is not a Hugging Face checkpoint: it has no config.json\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_in_optimums_registry(family: str) -> None:
    constructor = TasksManager.get_exporter_config_constructor("edgecomp", model_type=family, task="image-text-to-text", library_name="transformers")
    made = constructor(AutoConfig.for_model(family))
    assert isinstance(made, EdgecompConfig) and made.task == "image-text-to-text" and made.config.model_type == family
