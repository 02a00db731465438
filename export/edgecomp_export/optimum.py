"""The door from Hugging Face's optimum: our families in its registry, for whoever looks up exporters there."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from optimum.exporters.tasks import TasksManager

from edgecomp_export.export import export
from edgecomp_export.families import FAMILIES

BACKEND, TASK = "edgecomp", "image-text-to-text"


class EdgecompConfig:
    """What optimum's registry gives for one of our model types, as `TasksManager.get_exporter_config_constructor` makes it.

    Args:
        config: the model's config.
        task: 'image-text-to-text'.
    """

    def __init__(self, config: Any, task: str = TASK):
        self.config, self.task = config, task

    def export(self, model: str, out: Path, **options: Any) -> Path:
        """`edgecomp_export.export.export` of a checkpoint of this type: a neutral bundle."""
        return export(model, out, **options)


def register() -> None:
    """Puts every family into `TasksManager` under the backend 'edgecomp'; done when this module is imported."""
    add = TasksManager.create_register(BACKEND)
    for family in FAMILIES:
        add(family, TASK)(EdgecompConfig)


register()
