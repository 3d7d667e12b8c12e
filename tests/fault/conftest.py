"""One real daemon for the whole folder: what one test does to it must not harm the next."""

from collections.abc import Iterator

import pytest

from bench.process import DaemonProcess
from tests.raw import RawClient, raw_client, real_daemon


@pytest.fixture(scope="session")
def shared_daemon() -> Iterator[DaemonProcess]:
    """A daemon with 64 MiB in eight arenas."""
    with real_daemon("--ring", "1MiB") as daemon:
        yield daemon
        assert daemon.process.poll() is None, "the daemon died"


@pytest.fixture
def daemon(shared_daemon: DaemonProcess) -> Iterator[DaemonProcess]:
    """It must be alive before and after every test, and serve a bystander."""
    with raw_client(shared_daemon.runtime_dir) as bystander:
        yield shared_daemon
        bystander.ping()


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[RawClient]:
    """A session in good standing."""
    with raw_client(daemon.runtime_dir) as connected:
        yield connected
