"""The device port, on the emulation. The same suite on a GPU: tests/gpu."""

from collections.abc import Iterator

import pytest

from kvkernels.device.emulation import Emulation
from tests.device_suite import DeviceSuite


class TestEmulation(DeviceSuite):
    """Refuses to register what is mapped for reading only, as today's GPUs do."""

    kind = "emulation"

    @pytest.fixture
    def device(self) -> Iterator[Emulation]:
        made = Emulation()
        yield made
        made.close()


class TestEmulationThatRegistersReadOnly:
    """As the GPUs do that have the attribute; the rest is the same."""

    @pytest.fixture
    def device(self) -> Iterator[Emulation]:
        made = Emulation(read_only_registration=True)
        yield made
        made.close()

    test_read_only = DeviceSuite.test_what_is_mapped_for_reading_only_is_registered_where_that_is_supported
