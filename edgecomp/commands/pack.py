"""`edgecomp pack`: an archive that builds a bundle's engines on a Jetson."""
from __future__ import annotations

from pathlib import Path

import click

from edgecomp.commands.options import BUNDLE, columns, say


@click.command("pack")
@BUNDLE
@click.option("--device", required=True, help="The Jetson to pack for; see `edgecomp devices`.")
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="The archive to write, OUT.tar.")
@click.option("--jetpack", metavar="RELEASE", help="The board's JetPack, such as 6.2. [default: the newest that it has]")
@click.option("--plan", "plans", multiple=True, help="A budget of the bundle by name. May be repeated. [default: the bundle's default]")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="How long TensorRT looks for faster kernels. [default: TensorRT's]")
@click.option("--workspace", type=click.IntRange(min=1), metavar="MIB", help="What a kernel may work in at most. [default: TensorRT's]")
def command(bundle: Path, device: str, out: Path, jetpack: str | None, plans: tuple[str, ...], optimization_level: int | None,
            workspace: int | None) -> None:
    """Pack BUNDLE for a Jetson: graphs for its TensorRT, the runtime, and build.sh, which builds the engines there."""
    from edgecomp import devices
    from edgecomp.pack.archive import pack
    from edgecomp.pack.releases import choose, releases
    from edgecomp_runtime import Bundle
    board = devices.load(device)
    release = choose(board, jetpack)
    opened = Bundle.open(bundle)
    names = list(dict.fromkeys(opened.plan(plan)[0] for plan in plans or [None]))
    others = ", ".join(other.jetpack for other in releases(board) if other != release)
    say(f"for JetPack {release.jetpack}, TensorRT {release.software.tensorrt}, graphs as for {release.dialect}"
        + (f"; the board has also JetPack {others} (--jetpack)" if others else ""))
    given = {"optimization_level": optimization_level, "workspace_mib": workspace}
    packed = pack(opened, board, release, names, out, flags={name: value for name, value in given.items() if value is not None}, say=say)
    rows = [("to build on the board", "weights, MiB", "memory to build, about MiB")]
    rows += [(job.label, f"{job.weights / 2**20:.0f}", f"{job.memory / 2**20:.0f}") for job in packed]
    click.echo(columns(rows))
    say(f"{out} has {out.stat().st_size / 2**20:.0f} MiB. On the board: tar xf {out.name} && sh {out.stem}/build.sh")
