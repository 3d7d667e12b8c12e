"""How the GPUs stand that the daemon copies for: what status warns of, and what metrics are made of. Owner thread."""

from collections.abc import Iterator, Sequence

from kvkernels.device.port import EMULATION
from kvstore.report import DeviceReport
from kvstore.tier.hbm import HbmTally
from kvstored.device_work import HUNG_S, DeviceThreads


def warnings(devices: Sequence[DeviceThreads]) -> Iterator[str]:
    """What is no GPU, what hangs, and what works no more."""
    for threads in devices:
        if threads.device.properties.emulated:
            yield f"{EMULATION}: gpu.devices names a GPU in host memory; it is none, and only for tests"
        if threads.lost:
            yield f"{threads.name} is lost: {threads.lost}; {_what_is_off(threads)} off for it until a restart"
        elif threads.hangs():
            why = "what it reads and writes stays in use meanwhile"
            yield f"{threads.name} has not ended a copy for {HUNG_S} s: {why}; restart kvstored if it stays so"


def _what_is_off(threads: DeviceThreads) -> str:
    return "mode daemon is" if threads.hbm is None else "mode daemon and the tier in its memory are"


def report(threads: DeviceThreads, attached_bytes: int) -> DeviceReport:
    """One of them."""
    tally, hbm = threads.tally, threads.hbm
    here = hbm if hbm and not threads.lost else None
    counted = hbm.tally if hbm else HbmTally()
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
        hbm_bytes=here.hbm_bytes if here else 0,
        hbm_used_bytes=here.used_bytes() if here else 0,
        hbm_hits=counted.hits,
        hbm_promoted=counted.promoted,
        hbm_evicted=counted.evicted,
        hbm_blocks=here.blocks if here else 0,
        hbm_hit_bytes=counted.hit_bytes,
        hbm_promoted_bytes=counted.promoted_bytes,
        hbm_unpinned=counted.unpinned,
        hbm_evicted_after_s=counted.evicted_after_ns / 1e9,
    )
