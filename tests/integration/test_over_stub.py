"""What tests/gpu asks of a daemon and an engine on CUDA, over the stub of the driver: that those tests can run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvkernels.device.cuda import FOLDER
from kvkernels.device.emulated_kernels import COMPILE

ROOT = Path(__file__).parents[2]
FILES = ("test_attached.py", "test_hbm_tier.py", "test_swapping.py")
SOME = "held_is_stored or prefetch_into_it or goes_out_in_chunks"  # of each file one


def test_modes_the_tier_and_swaps_run_on_cuda_over_a_stub_of_the_driver(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not there")
    library, source = tmp_path / "libcuda.so.1", ROOT / "tests" / "stub" / "libcuda.cpp"
    subprocess.run(["g++", *COMPILE, f"-I{FOLDER}", "-DCUDA_12", "-o", library, source], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", "-k", SOME, *(f"tests/gpu/{name}" for name in FILES)], cwd=ROOT,
        check=False, capture_output=True, text=True, env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    assert "no GPU: " not in done.stdout
    assert done.stdout.count("\nPASSED ") == 4, done.stdout[-5000:]  # swaps in two ways
