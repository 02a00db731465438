"""A device in one of its power modes: what the mode lowers, and what follows from that."""
from __future__ import annotations

import dataclasses

from edgecomp.devices import Device, Peaks, PowerMode
from edgecomp_runtime.errors import EdgecompError, UnknownNameError


def not_published(mode: PowerMode) -> list[str]:
    """What a mode does not say, and the device's own number is an upper bound of."""
    return [field for field in ("sm_count", "clock_mhz", "bandwidth_gb_per_s") if getattr(mode, field) is None]


def in_mode(device: Device, name: str) -> Device:
    """The device in the power mode of that name: bandwidth, SMs and clock are the mode's, and peaks follow from SMs times clock.

    A number that the mode does not have stays; it is an upper bound then, and uncertain. The id stays, too: measurements are of the device.
    Raises UnknownNameError where there is no such mode, EdgecompError where the device has none.
    """
    if not device.power_modes:
        raise EdgecompError(f"{device.id} has no power modes in its profile: leave out '@{name}'")
    modes = {mode.name: mode for mode in device.power_modes}
    if name not in modes:
        raise UnknownNameError(f"power mode of {device.id}", name, modes)
    mode, gpu = modes[name], device.gpu
    lacking = not_published(mode)
    unsure = [f"{'memory' if field.startswith('bandwidth') else 'gpu'}.{field}" for field in lacking]
    peaks = {field: value for field, value in dataclasses.asdict(device.peaks).items() if value is not None}
    if gpu is not None:
        sms, clock = mode.sm_count or gpu.sm_count, mode.clock_mhz or gpu.clock_mhz
        share = sms * clock / (gpu.sm_count * gpu.clock_mhz)
        gpu = dataclasses.replace(gpu, sm_count=sms, cuda_cores=round(gpu.cuda_cores * sms / gpu.sm_count), clock_mhz=clock,
                                  tensor_clock_mhz=gpu.tensor_clock_mhz and gpu.tensor_clock_mhz * clock / gpu.clock_mhz)
        peaks = {field: value * share for field, value in peaks.items()}
        if set(lacking) & {"sm_count", "clock_mhz"}:
            unsure += [f"peaks.{field}" for field in peaks]
    memory = dataclasses.replace(device.memory, bandwidth_gb_per_s=mode.bandwidth_gb_per_s or device.memory.bandwidth_gb_per_s)
    sources = dataclasses.replace(device.sources, uncertain=(*dict.fromkeys((*device.sources.uncertain, *unsure)),),
                                  derived=(*dict.fromkeys((*device.sources.derived, *(f"peaks.{field}" for field in peaks))),))
    bound = f"Power mode {name}: {', '.join(lacking)} not published; the device's own stand in, an upper bound." if lacking else ""
    return dataclasses.replace(device, mode=mode, gpu=gpu, memory=memory, peaks=Peaks(**peaks), sources=sources,
                               power_watts=mode.watts or device.power_watts, notes=(*device.notes, *([bound] if bound else [])))
