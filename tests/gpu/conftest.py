"""What needs a GPU is skipped by name where there is none: `pytest tests/gpu` on a machine that has one runs it."""

from collections.abc import Iterator

import pytest

from kvkernels.device.cuda import Cuda
from kvkernels.device.port import NoDeviceError
from tests.attached_kit import where


@pytest.fixture(scope="session")
def gpu() -> Cuda:
    """The first GPU."""
    try:
        return Cuda(0)
    except NoDeviceError as error:
        pytest.skip(f"no GPU: {error}")


@pytest.fixture(scope="module", autouse=True)
def on_the_gpu(gpu: Cuda) -> Iterator[None]:
    """Engines and daemons of tests that the emulation runs, too, are on it in this folder."""
    before, where.emulated = where.emulated, False
    yield
    where.emulated = before


@pytest.fixture
def device(gpu: Cuda) -> Iterator[Cuda]:
    """The same for a test; what it registered is let go of, since its memory goes too."""
    before = set(gpu._registrations.all())
    yield gpu
    for registration in set(gpu._registrations.all()) - before:
        gpu.unregister(registration)
