"""A thread of the daemon that ends by an error: said in the log and by `kvctl status`; whoever is served goes on."""

import sys
import threading
from collections.abc import Iterator

import pytest

from kvstored import threads
from tests.integration.test_kvctl_acting import body, kvctl
from tests.node import Node, assert_blocks, chain, fetch, managed, put, until, values

BLOCK_BYTES = 4096
# The daemon, with one thread that ends as soon as it has begun.
BROKEN = """
import sys
from kvstored.admin_audit import Audit
from kvstored.cli import main
def ends(self):
    raise ValueError("nobody had thought of this")
Audit._write_all = ends
sys.exit(main())
"""


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # put back afterwards
    threads.forget()
    threads.watch()
    yield
    threads.forget()


def run(name: str, error: BaseException) -> None:
    def end() -> None:
        raise error

    thread = threading.Thread(target=end, name=name)
    thread.start()
    thread.join()


@pytest.mark.usefixtures("watched")
def test_each_thread_that_ended_is_told_of_once() -> None:
    assert threads.ended() == ()
    run("leaf-0", ValueError("of one"))
    run("leaf-0", ValueError("of another"))
    run("commit", OSError(5, "two\nlines" + "x" * 1000))
    first, second = threads.ended()
    assert "\n" not in second
    assert "the thread leaf-0 has ended by an error (ValueError: of one)" in first
    assert "restart kvstored" in first
    assert len(second) < 400
    for number in range(20):
        run(f"reader-{number}", KeyError(number))
    assert len(threads.ended()) == threads.NAMES_MOST


@pytest.mark.usefixtures("watched")
def test_a_thread_that_means_to_end_has_not_failed() -> None:
    run("leaf-0", SystemExit(1))
    thread = threading.Thread(target=sys.getsizeof, args=(1,))
    thread.start()
    thread.join()
    assert threads.ended() == ()


def test_an_operator_is_told_and_engines_go_on() -> None:
    with Node(disks=0) as node, managed(node, command=("-c", BROKEN)) as manager:
        manager.start()
        manager.wait_ready()
        ns, keys = node.namespace(BLOCK_BYTES), chain("goes on", 4)
        put(ns, keys, values(keys, BLOCK_BYTES), durable=False)
        assert_blocks(fetch(ns, keys).blocks, values(keys, BLOCK_BYTES))
        words = "the thread audit has ended by an error (ValueError: nobody had thought of this)"

        def told() -> bool:
            return any(words in one for one in body(kvctl(node, "status", "-o", "json"), "status")["warnings"])

        assert until(told)
        assert "Traceback" in node.log()
