"""`edgecomp devices`: the known devices as a table, or everything about one."""
from __future__ import annotations

import dataclasses
import json

import click

from edgecomp import devices
from edgecomp.devices import Device

COLUMNS = ("device", "memory GiB", "GB/s", "fp16 TFLOPS", "int8 TOPS", "compute capability")
# table of a profile -> the sources that it rests on
SOURCES = {"gpu": ("spec",), "cpu": ("spec",), "memory": ("spec", "usable_memory"), "peaks": ("peaks",), "power": ("power",),
           "software": ("software",)}


@click.command("devices")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--detect", is_flag=True, help="Print a profile of this machine's CPU; takes seconds, for it measures.")
def command(name: str | None, as_json: bool, detect: bool) -> None:
    """List the known devices, or show all that is known about the device NAME and where it is from.

    A profile of your own is a TOML file: name it wherever a device is asked for, or put it into the folder EDGECOMP_PROFILES (by default
    ~/.local/share/edgecomp/profiles), where calibrations are, too.
    """
    if detect:
        if name:
            raise click.UsageError(f"--detect looks at this machine: leave out {name}")
        from edgecomp.detect import detect as look
        from edgecomp.detect import to_toml
        found = look()
        click.echo(_json(dataclasses.asdict(found)) if as_json else to_toml(found), nl=as_json)
    elif name:
        device = devices.load(name)
        click.echo(_json(dataclasses.asdict(device)) if as_json else _everything(device))
    else:
        known = [devices.load(each) for each in devices.names()]
        click.echo(_json([dataclasses.asdict(device) for device in known]) if as_json else _table(known))


def _json(data: object) -> str:
    return json.dumps(data, indent=1)


def _table(known: list[Device]) -> str:
    rows = [COLUMNS, *map(_row, known)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
             for row in rows]
    return "\n".join([*lines, "", "Peaks are dense, of the GPU alone. ?: uncertain. -: none, or not known. "
                                  "Sources: edgecomp devices NAME"])


def _row(device: Device) -> tuple[str, ...]:
    fp16 = "peaks.fp16_tflops" if device.peaks.fp16_tflops else "peaks.fp16_acc16_tflops"
    cells = [_cell(device, name) for name in ("memory.total_gib", "memory.bandwidth_gb_per_s", fp16, "peaks.int8_tops")]
    return (device.id, *cells, device.compute_capability or "- ")


def _cell(device: Device, name: str) -> str:
    value = device.numbers().get(name)
    return "- " if value is None else f"{value:.4g}{'?' if device.is_uncertain(name) else ' '}"


def _everything(device: Device) -> str:
    data = dataclasses.asdict(device)
    lines = [f"{device.name} ({device.label}, {device.family})"]
    for table in ("gpu" if device.gpu else "cpu", "memory", "peaks"):
        lines += ["", f"{table} (dense)" if table == "peaks" else table]
        lines += [f"  {field:20}{_value(device, f'{table}.{field}', value)}" for field, value in data[table].items()
                  if value is not None]
        lines += _sources(device, table)
    lines += ["", "power", f"  {'power_watts':20}{_value(device, 'power_watts', device.power_watts)}"] if device.power_watts else []
    for mode in device.power_modes:
        numbers = ", ".join(f"{field} {_value(device, f'power_modes.{mode.name}.{field}', getattr(mode, field))}"
                            for field in ("watts", "sm_count", "clock_mhz", "bandwidth_gb_per_s") if getattr(mode, field))
        lines.append(f"  {mode.name + (' (default)' if mode.default else ''):20}{numbers}".rstrip())
    lines += _sources(device, "power") if device.power_watts else []
    if device.software:
        lines += ["", "software"]
        lines += [f"  {each.release:20}CUDA {each.cuda}, TensorRT {each.tensorrt}{f', L4T {each.l4t}' if each.l4t else ''}"
                  f"{f', cuDNN {each.cudnn}' if each.cudnn else ''}" for each in device.software]
        lines += _sources(device, "software")
    if device.notes:
        lines += ["", "notes", *(f"  {note}" for note in device.notes)]
    return "\n".join([*lines, "", "?: uncertain. *: derived, not read from a source."])


def _value(device: Device, name: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text + ("?" if device.is_uncertain(name) else "") + ("*" if name in device.sources.derived else "")


def _sources(device: Device, table: str) -> list[str]:
    return [f"  source: {line}" for field in SOURCES[table] for line in getattr(device.sources, field)]
