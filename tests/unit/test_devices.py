"""GPUs that a configuration names, and what is said of what cannot be had of them."""

import time

import pytest

from kvkernels.device.emulation import Emulation
from kvkernels.device.port import Direction, NoDeviceError
from kvstore.quotas import HBM_ARENA_BYTES
from kvstored import devices
from kvstored.device_names import DeviceName
from kvstored.device_work import HUNG_S, DeviceThreads
from kvstored.devices import make_devices


def nothing() -> None:
    """Nobody is woken."""


def test_a_tier_that_has_no_room_is_not_a_gpu_that_is_not_there() -> None:
    (made,), (said,) = make_devices("emulation", 1 << 50, nothing)
    assert made.hbm is None
    assert "gpu.hbm" in said
    assert "gpu.devices" not in said
    assert "without" in said


@pytest.mark.parametrize("hbm_bytes", [1, HBM_ARENA_BYTES - 1])
def test_a_tier_too_small_to_hold_anything_is_not_made_and_said(hbm_bytes: int) -> None:
    (made,), (said,) = make_devices("emulation", hbm_bytes, nothing)
    assert made.hbm is None
    assert "gpu.hbm" in said
    assert "16 MiB" in said


def test_a_tier_of_whole_arenas_is_made_and_nothing_is_said() -> None:
    (made,), said = make_devices("emulation", HBM_ARENA_BYTES, nothing)
    assert made.hbm is not None
    assert made.hbm.hbm_bytes == HBM_ARENA_BYTES
    assert not said
    made.copier.close()
    made.device.close()


def test_a_gpu_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_name: DeviceName) -> Emulation:
        raise NoDeviceError("no driver")

    monkeypatch.setattr(devices, "_device", absent)
    made, (said,) = make_devices("emulation", HBM_ARENA_BYTES, nothing)
    assert not made
    assert "no driver" in said
    assert "gpu.devices" in said


class Once:
    """A line of work whose piece ends between two looks at it."""

    def __init__(self, since_ns: int) -> None:
        self.looks = [since_ns, 0]

    @property
    def since_ns(self) -> int:
        return self.looks.pop(0) if self.looks else 0


def test_a_piece_that_ends_while_it_is_looked_at_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = DeviceThreads(Emulation(), nothing)
    now = time.monotonic_ns()
    monkeypatch.setattr(threads, "_lines", {Direction.TO_DEVICE: Once(now)})
    assert not threads.hangs()
    monkeypatch.setattr(threads, "_lines", {Direction.TO_DEVICE: Once(now - (HUNG_S + 1) * 10**9)})
    assert threads.hangs()
