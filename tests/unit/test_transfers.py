"""Whose word frees pages: the same daemon's, told from another one's by its pidfd."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvclient.transfers import Pidfd
from tests.contract.test_processes import NEEDS_INODES


@contextmanager
def another() -> Iterator[int]:
    """A process that waits."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.communicate(b"\n")


def pidfd_of(pid: int) -> Pidfd:
    fd = os.pidfd_open(pid)
    try:
        return Pidfd(fd)
    finally:
        os.close(fd)


def test_descriptors_of_one_process_are_told_from_those_of_another() -> None:
    with another() as pid:
        assert pidfd_of(pid).is_same(pidfd_of(pid))
        assert not pidfd_of(pid).is_same(pidfd_of(os.getpid()))


@NEEDS_INODES
def test_it_takes_no_number_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pidfd, "_pid", lambda _self: 0)  # as from another pid namespace
    with another() as pid:
        assert pidfd_of(pid).is_same(pidfd_of(pid))
        assert not pidfd_of(pid).is_same(pidfd_of(os.getpid()))


@pytest.mark.parametrize(("mine", "theirs", "same"), [(7, 7, True), (7, 8, False), (0, 0, False), (-1, -1, False)])
def test_where_all_have_one_inode_the_number_says_it(
    monkeypatch: pytest.MonkeyPatch, mine: int, theirs: int, same: bool
) -> None:
    shared = [os.eventfd(0), os.eventfd(0)]  # an older kernel's pidfds are of the same file system
    one, other = (Pidfd(fd) for fd in shared)
    for fd in shared:
        os.close(fd)
    numbers = {one: mine, other: theirs}
    monkeypatch.setattr(Pidfd, "_pid", lambda self: numbers[self])
    assert one.is_same(other) is same
