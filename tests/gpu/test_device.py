"""The device port on CUDA: the suite of tests/contract, and what only hardware has."""

import pytest

from kvkernels.device.cuda import Cuda
from kvkernels.device.engines import load_or_measure
from kvkernels.device.port import Direction, NoDeviceError
from kvkernels.device.tables import Tables
from tests.device_suite import DeviceSuite


class TestCuda(DeviceSuite):
    """Its fixture `device` is in conftest.py."""

    kind = "0"


def test_it_never_calls_itself_an_emulation(device: Cuda) -> None:
    properties = device.properties
    assert not properties.emulated
    assert properties.name
    assert "emul" not in properties.name.lower()
    assert len(properties.identity) == 32
    assert properties.memory_bytes > device.free_bytes() > 0


def test_another_gpu_than_there_is_is_told(device: Cuda) -> None:
    with pytest.raises(NoDeviceError):
        Cuda(4096)


def test_the_calibration_runs(device: Cuda) -> None:
    tables = Tables(device)
    found = load_or_measure(device, tables, None)
    assert found.gb_per_s[f"{Direction.TO_DEVICE.value}_4096_kib_dma"] > 1
    tables.close()
