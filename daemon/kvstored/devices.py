"""The GPUs that a configuration names, made at start: what is not there is said, and the daemon serves without it."""

import logging
from collections.abc import Callable
from typing import Final

from kvkernels.device.port import Device, DeviceError
from kvstore.quotas import HBM_ARENA_BYTES
from kvstored.device_names import DeviceName, devices_of
from kvstored.device_work import DeviceThreads

EMULATED_BYTES: Final = 64 << 30  # what memory of engines on an emulation may add up to; it is theirs, not ours
log = logging.getLogger(__name__)


def make_devices(
    text: str, hbm_bytes: int, wake: Callable[[], None]
) -> tuple[list[DeviceThreads], list[str]]:  # fmt: skip
    """Threads for each device, not started, and what to say of those that cannot be had. Makes contexts on GPUs.

    `hbm_bytes`: of each, for the tier there; where it has no room for that, it does without, and that is said.
    """
    made: list[DeviceThreads] = []
    without: list[str] = []
    for name in devices_of(text):
        try:
            made.append(DeviceThreads(_device(name), wake))
        except DeviceError as error:
            without.append(f"{name.kind}:{name.number} cannot be had: {error}; see gpu.devices")
            log.warning("%s", without[-1])
            continue
        log.info("device: %s", made[-1].name)
        if hbm_bytes and (why := _make_hbm(made[-1], hbm_bytes)):
            without.append(f"{name.kind}:{name.number} serves without a tier of its own: {why}; see gpu.hbm")
            log.warning("%s", without[-1])
    return made, without


def _make_hbm(threads: DeviceThreads, hbm_bytes: int) -> str:
    """Why there is no tier in its memory, if so."""
    if hbm_bytes < HBM_ARENA_BYTES:
        return f"{hbm_bytes} bytes hold nothing, {HBM_ARENA_BYTES >> 20} MiB are the least"
    try:
        threads.make_hbm(hbm_bytes)
    except DeviceError as error:
        return f"no room for {hbm_bytes >> 20} MiB: {error}"
    return ""


def _device(name: DeviceName) -> Device:
    """Loaded here, so that a daemon without a GPU loads nothing of it. Raises DeviceError."""
    if name.kind == "cuda":
        from kvkernels.device.cuda import Cuda  # noqa: PLC0415

        return Cuda(name.number)
    from kvkernels.device.emulation import Emulation  # noqa: PLC0415

    # By descriptors alone. A handle by IPC is a process and a number there, which could name anything that we may open.
    return Emulation(name.number, EMULATED_BYTES, opens_ipc=False)
