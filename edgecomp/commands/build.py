"""`edgecomp build`: engines for a device."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgecomp.commands.options import BUNDLE, columns, progress, say

if TYPE_CHECKING:
    from edgecomp.build.bundles import Tick
    from edgecomp.build.jobs import Job


@click.command("build")
@BUNDLE
@click.option("--device", required=True, help="The device to build for; see `edgecomp devices`.")
@click.option("--plan", "plans", multiple=True, help="A budget of the bundle by name. May be repeated. [default: the bundle's default]")
@click.option("--backend", type=click.Choice(["tensorrt", "tensorrt-rtx"]), help="What builds. [default: by the device]")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="How long TensorRT looks for faster kernels. [default: TensorRT's]")
@click.option("--workspace", type=click.IntRange(min=1), metavar="MIB", help="What a kernel may work in at most. [default: TensorRT's]")
def command(bundle: Path, device: str, plans: tuple[str, ...], backend: str | None, optimization_level: int | None, workspace: int | None) -> None:
    """Build TensorRT engines of BUNDLE for a device, into BUNDLE. What is built already is left as it is."""
    from edgecomp import devices
    from edgecomp.build.bundles import build_bundle
    from edgecomp.build.toolchain import toolchain
    from edgecomp_runtime import Bundle
    wanted = devices.load(device)
    tools = toolchain(wanted, backend)
    opened = Bundle.open(bundle)
    names = list(dict.fromkeys(opened.plan(plan)[0] for plan in plans or [None]))
    given = {"optimization_level": optimization_level, "workspace_mib": workspace}
    flags: dict[str, int | float | str] = {name: value for name, value in given.items() if value is not None}
    built = build_bundle(bundle, wanted, tools, names, flags=flags, say=say, tick=bar)
    if not built:
        say(f"{bundle} has its engines for {device} already ({tools.backend} {tools.version}): nothing was built")
        return
    rows: list[tuple[str, ...]] = [("plan", "engine", "seconds", "MiB", "peak MiB, anonymous", "resident")]
    rows += [(b.plan, b.part, f"{b.result.seconds:.1f}", *(f"{size / 2**20:.0f}" for size in (
        b.result.engine_bytes, b.result.peak_anonymous_bytes, b.result.peak_resident_bytes))) for b in built]
    click.echo(columns(rows, right=lambda column: column > 1))
    say(f"{bundle} has engines for {device}: {tools.backend} {tools.version}, compute capability {tools.capability}. They were built, not run")


def bar(job: Job) -> Tick:
    """A progress bar for one engine."""
    shown = progress(job.part, 100, eta=False)
    shown.render_progress()

    def tick(phase: str, step: int, steps: int) -> None:
        shown.label = f"{job.part}: {phase}"[:60]
        shown.update(100 * step // max(steps, 1) - shown.pos)
        if step >= steps:
            shown.render_finish()
    return tick
