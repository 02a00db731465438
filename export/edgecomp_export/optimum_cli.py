"""`optimum-cli export edgecomp`. The wheel ships this file as optimum/commands/register/register_edgecomp.py, where optimum-cli
looks for commands of other packages; it reads each at every start, so that nothing heavy is imported here."""
from __future__ import annotations

import argparse

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class EdgecompExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """The same as `edgecomp compile MODEL -o OUTPUT OPTIONS`."""

    COMMAND = CommandInfo("edgecomp", "Export a multimodal LLM to an edgecomp bundle, as `edgecomp compile` does.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("-m", "--model", required=True, help="A Hugging Face folder or hub name.")
        parser.add_argument("output", help="The bundle to write.")
        parser.add_argument("options", nargs=argparse.REMAINDER,
                            help="After the output: options of `edgecomp compile`, such as --method dart --keep 64.")

    def run(self) -> None:
        from edgecomp.cli import main
        main(["compile", self.args.model, "-o", self.args.output, *self.args.options])


REGISTER_COMMANDS = [(EdgecompExportCommand, ExportCommand)]
