"""How the GPUs stand that the daemon copies for: what status warns of, and what metrics are made of. Owner thread."""

from collections.abc import Iterator, Sequence

from kvkernels.device.port import EMULATION
from kvstore.report import DeviceReport
from kvstored.device_work import HUNG_S, DeviceThreads


def warnings(devices: Sequence[DeviceThreads]) -> Iterator[str]:
    """What is no GPU, what hangs, and what works no more."""
    for threads in devices:
        if threads.device.properties.emulated:
            yield f"{EMULATION}: gpu.devices names a GPU in host memory; it is none, and only for tests"
        if threads.lost:
            yield f"{threads.name} is lost: {threads.lost}; mode daemon is off for it until a restart"
        elif threads.hangs():
            why = "what it reads and writes stays in use meanwhile"
            yield f"{threads.name} has not ended a copy for {HUNG_S} s: {why}; restart kvstored if it stays so"


def report(threads: DeviceThreads, attached_bytes: int) -> DeviceReport:
    """One of them."""
    tally, hbm = threads.tally, threads.hbm
    return DeviceReport(
        name=threads.name,
        emulated=threads.device.properties.emulated,
        lost=bool(threads.lost),
        attached_bytes=attached_bytes,
        loads=tally.loads,
        saves=tally.saves,
        failed=tally.failed,
        loaded_bytes=tally.loaded_bytes,
        saved_bytes=tally.saved_bytes,
        hbm_bytes=hbm.hbm_bytes if hbm else 0,
        hbm_used_bytes=hbm.used_bytes() if hbm else 0,
        hbm_hits=hbm.tally.hits if hbm else 0,
        hbm_promoted=hbm.tally.promoted if hbm else 0,
        hbm_evicted=hbm.tally.evicted if hbm else 0,
    )
