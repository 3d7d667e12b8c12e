"""`--figures FILE`: see figures.py. Daemons are forked off a prepared process: see prepared.py."""

import ctypes
from pathlib import Path

import pytest

from bench.process import DaemonProcess
from tests.figures import Figures
from tests.prepared import Prepared
from tests.systemd import ServiceManager

M_MMAP_THRESHOLD = -3  # mallopt(3)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Called by pytest."""
    parser.addoption("--figures", type=Path, metavar="FILE", help="write what the long tests did there")
    parser.addoption("--execute", action="store_true", help="execute every daemon instead of forking a prepared one")


def pytest_configure(config: pytest.Config) -> None:
    """Called by pytest."""
    # Thousands of stores are made in one process, each with large tables of which little is used. glibc would begin to
    # reuse memory for them, which has to be zeroed first; what is always mapped anew comes as zeros.
    if hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 << 10)
    file = config.getoption("--figures")
    if file is not None:
        config.pluginmanager.register(Figures(file), "figures")
    if not config.getoption("--execute"):
        prepared = Prepared()
        config.add_cleanup(prepared.end)
        DaemonProcess.starter = ServiceManager.starter = prepared
