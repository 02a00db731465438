"""The `edgecomp` command: a table of commands, each imported only when it is asked for."""
from __future__ import annotations

import errno
import importlib
import sys
from typing import NoReturn

import click

from edgecomp import __version__
from edgecomp_runtime.errors import EdgecompError, UnknownNameError

# name: (module, what it does), in the order in which people meet them
COMMANDS = {
    "compile": ("edgecomp.commands.compile", "Checkpoint to runnable bundle: export, compress and lower in one go."),
    "run": ("edgecomp.commands.run", "Ask a bundle about images; the answer streams."),
    "verify": ("edgecomp.commands.verify", "Compare a bundle with the Hugging Face model: greedy text and logits."),
    "eval": ("edgecomp.commands.eval", "Accuracy by task on a JSONL of questions, POPE, TextVQA, DocVQA or GQA."),
    "show": ("edgecomp.commands.show", "Draw what a plan keeps of a picture."),
    "profile": ("edgecomp.commands.profile", "Measure latency, memory and accuracy on this machine; write the report."),
    "sweep": ("edgecomp.commands.sweep", "Measure every combination of method, budget and site."),
    "build": ("edgecomp.commands.build", "TensorRT engines for a device."),
    "pack": ("edgecomp.commands.pack", "An archive that builds a bundle's engines on a Jetson."),
    "predict": ("edgecomp.commands.predict", "Latency and memory on a device, before anything is built."),
    "fit": ("edgecomp.commands.fit", "Budgets, methods and precisions that meet limits on a device."),
    "inspect": ("edgecomp.commands.inspect", "What is in a bundle: plans, graphs, sizes, cache."),
    "export": ("edgecomp.commands.export", "Checkpoint to neutral bundle, uncompressed."),
    "compress": ("edgecomp.commands.compress", "Add budgets to a bundle; weights are shared."),
    "quantize": ("edgecomp.commands.quantize", "A bundle's weights in int8 or int4."),
    "methods": ("edgecomp.commands.methods", "The compression methods and what each needs."),
    "devices": ("edgecomp.commands.devices", "The device profiles."),
    "doctor": ("edgecomp.commands.doctor", "What this machine can export, build and run, and what is missing."),
}
# package that is missing: the extra that brings it
EXTRAS = {"torch": "export", "transformers": "export", "onnx": "export", "onnx_ir": "export", "onnxscript": "export", "edgecomp_export": "export",
          "onnxruntime": "cpu"}


class LazyGroup(click.Group):
    """Commands from the table; `--help` shows it without importing one."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[name][0]).command
        return command

    def resolve_command(self, context: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(str(UnknownNameError("command", args[0], COMMANDS)), context)
        return super().resolve_command(context, args)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, context: click.Context) -> object:
        try:
            return super().invoke(context)
        except EdgecompError as error:
            fail(str(error))
        except ModuleNotFoundError as error:
            extra = EXTRAS.get((error.name or "").partition(".")[0])
            if extra is None:
                raise  # not something an extra brings: our own mistake, shown whole
            fail(f"`edgecomp {context.invoked_subcommand}` needs {error.name}, which is not installed: pip install 'edgecomp[{extra}]'")
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # whoever read our output has enough; click ends without a word
            fail(f"{error.filename or 'a file'} cannot be used: {error.strerror or error}")


def fail(message: str) -> NoReturn:
    """Prints one line and ends with exit code 1."""
    click.echo(f"edgecomp: {' '.join(message.splitlines())}", err=True)
    sys.exit(1)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "--version", message="edgecomp %(version)s")
def main() -> None:
    """Compiles multimodal LLMs for edge devices: of a picture's N visual tokens exactly K go on, inside the graph."""
