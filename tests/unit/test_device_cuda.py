"""Every line of cuda.py runs: over a stub of the driver, in processes of its own. What a GPU does is for tests/gpu."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvkernels.device.cuda import FOLDER
from kvkernels.device.emulated_kernels import COMPILE

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.parametrize(("version", "which"), [("CUDA_12", ""), ("CUDA_13", "there_and_back or every_engine")])
def test_the_suite_passes_over_a_stub_of_the_driver(tmp_path: Path, version: str, which: str) -> None:
    """What differs in CUDA 13 is the call for a batch of copies."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not there")
    library = tmp_path / "libcuda.so.1"
    source = ROOT / "tests" / "stub" / "libcuda.cpp"
    subprocess.run(["g++", *COMPILE, f"-I{FOLDER}", f"-D{version}", "-o", library, source], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", which, "tests/stub/suite.py"], cwd=ROOT, check=False,
        capture_output=True, text=True, env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout or "100%" in done.stdout
    assert "skipped" not in done.stdout
