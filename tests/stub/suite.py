"""The device suite on cuda.py over the stub; run by tests/unit/test_device_cuda.py with the stub as libcuda.so.1."""

import ctypes
from collections.abc import Iterator

import pytest

from kvkernels.device.cuda import FOLDER, Cuda
from kvkernels.device.port import UnfitError
from tests.device_suite import DeviceSuite


class TestStub(DeviceSuite):
    """Kernels are the stub's, since CuPy cannot compile for it."""

    kind = "0"

    @pytest.fixture
    def device(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
        library = ctypes.CDLL("libcuda.so.1")

        def compile_(self: Cuda, name: str) -> int:
            if not any(f"void {name}(" in path.read_text() for path in FOLDER.glob("*.cu")):
                raise UnfitError(name)
            return ctypes.cast(getattr(library, f"shim_{name}"), ctypes.c_void_p).value or 0

        monkeypatch.setattr(Cuda, "_compile", compile_)
        made = Cuda()
        assert made.properties.name == "stub"
        yield made
        made.close()
