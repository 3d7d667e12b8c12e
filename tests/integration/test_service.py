"""The daemon as a unit starts it: a socket that outlives it, status lines, a watchdog, an end that loses nothing."""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import kvclient
from kvproto import control_pb2, control_pb2_grpc, frames
from kvproto.control_token import token_metadata
from kvproto.errors import Grant
from kvproto.limits import KIB
from tests.node import Node, assert_blocks, chain, fetch, managed, put, roots, until, values
from tests.raw import dial, raw_client
from tests.systemd import ServiceManager

BLOCK_BYTES = 64 * KIB
WAIT_S = 30.0
# The owner thread hangs when an operator drains; all other threads go on.
HANGING = """
import sys, threading
import kvstored.admin
def drain(self, *, on):
    print("the owner hangs", file=sys.stderr, flush=True)
    threading.Event().wait()
kvstored.admin.Admin.drain = drain
from kvstored.cli import main
sys.exit(main())
"""


@contextmanager
def unit(
    *arguments: str, disks: int = 0, command: Sequence[str] = ("-m", "kvstored"), watchdog_s: float = 0.0
) -> Iterator[tuple[Node, ServiceManager]]:
    """A node whose daemons a service manager runs, with its hot socket."""
    with ExitStack() as stack:
        node = stack.enter_context(Node(disks=disks))
        manager = stack.enter_context(managed(node, *arguments, command=command, watchdog_s=watchdog_s))
        yield node, manager


def change(node: Node, channel: grpc.Channel, verb: str) -> grpc.StatusCode:
    """What becomes of a call that changes something."""
    stub, request = control_pb2_grpc.ControlStub(channel), getattr(control_pb2, f"{verb}Request")()
    try:
        getattr(stub, verb)(request, timeout=WAIT_S, metadata=token_metadata(node.run))
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return grpc.StatusCode.OK


def began(manager: ServiceManager) -> ServiceManager:
    """It serves."""
    manager.start()
    manager.wait_ready()
    return manager


# The socket


def test_the_socket_of_a_unit_outlives_the_daemon_and_clients_wait_for_nobody() -> None:
    with unit() as (node, manager):
        listener = manager.listen(node.run / "hot.sock")
        inode = (node.run / "hot.sock").stat().st_ino
        with kvclient.connect(node.run, timeout_s=0.2) as early:
            ns = early.namespace(model="m", engine="node", layout="flat", dtype="uint8", block_bytes=BLOCK_BYTES)
            keys = chain("early", 8)
            assert ns.fetch(keys).blocks == 0, "a socket that nobody serves: a miss, and no exception"
            assert not early.status.connected
            began(manager)
            assert until(lambda: early.wait_connected(WAIT_S))
        ns = node.namespace(BLOCK_BYTES)
        put(ns, keys, values(keys, BLOCK_BYTES), durable=False)
        for end in (manager.stop, manager.kill):
            end()
            assert (node.run / "hot.sock").stat().st_ino == inode, "the socket is the manager's"
            assert ns.fetch(keys).blocks == 0
            began(manager)
            assert node.client.connected
            assert_blocks(fetch(ns, keys).blocks, values(keys, BLOCK_BYTES))
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        assert "memory: warm=True kept=8 lost=0" in node.log()


def test_without_a_socket_unit_the_daemon_makes_its_own_and_takes_it_away() -> None:
    with unit() as (node, manager):
        began(manager)
        assert node.client.connected
        assert manager.stop() == 0
        assert not (node.run / "hot.sock").exists()


def test_a_client_that_connects_while_no_daemon_runs_is_served_by_the_next_one() -> None:
    with unit() as (node, manager):
        manager.listen(node.run / "hot.sock")
        early = dial(node.run)
        early.send(frames.build_hello(1, frames.Hello(name="early")))
        began(manager)
        early.answer(frames.Verb.WELCOME)
        early.close()


# What is wrong with the configuration is no reason to try again


def elsewhere(node: Node, manager: ServiceManager) -> None:
    manager.listen(node.home / "other.sock")


def a_stream(node: Node, manager: ServiceManager) -> None:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.bind(str(node.home / "stream"))
    made.listen()
    manager.sockets.append(("hot", made))


def no_socket(node: Node, manager: ServiceManager) -> None:
    manager.sockets.append(("hot", Path(os.devnull).open("rb")))  # noqa: SIM115  the manager closes it


def two(node: Node, manager: ServiceManager) -> None:
    manager.listen(node.run / "hot.sock")
    manager.listen(node.run / "cold.sock")


def environment(node: Node, manager: ServiceManager) -> None:
    manager.environ["KVSTORED_DRAM"] = "much"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (elsewhere, "other.sock, and clients look at"),
        (a_stream, "not a Unix one that listens for sequential packets"),
        (no_socket, "is not a socket"),
        (two, "two sockets are called hot"),
        (environment, "KVSTORED_DRAM"),
    ],
)
def test_what_no_restart_can_mend_ends_with_78(wrong: Callable[[Node, ServiceManager], None], said: str) -> None:
    with unit() as (node, manager):
        wrong(node, manager)
        manager.start()
        assert manager.process is not None
        assert manager.process.wait(WAIT_S) == 78, node.log()
        assert said in node.log()
        assert "READY=1" not in manager.said


# What the manager hears


def test_a_start_is_told_step_by_step_and_then_how_it_stands() -> None:
    with unit() as (_, manager):
        began(manager)
        steps = [line for line in manager.said if line.startswith("STATUS=starting")]
        assert len(steps) == 2
        assert manager.said.index("READY=1") > manager.said.index(steps[-1])
        assert until(lambda: manager.said[-1].startswith("STATUS=serving: 0.0 of 0.1 GiB in 0 blocks, 0 sessions")), (
            manager.said
        )
        assert not manager.count("WATCHDOG=1"), "nobody asked for it"


def test_a_loop_that_hangs_is_silent_though_all_else_answers_and_the_next_life_has_every_block() -> None:
    with unit(command=("-c", HANGING), watchdog_s=0.5) as (node, manager):
        began(manager)
        ns = node.namespace(BLOCK_BYTES)
        keys = chain("kept", 20)
        put(ns, keys, values(keys, BLOCK_BYTES), durable=False)
        manager.wait_count("WATCHDOG=1", 4)
        with grpc.insecure_channel(f"unix:{node.run}/control.sock") as channel:
            token = token_metadata(node.run)
            stub = control_pb2_grpc.ControlStub(channel)
            draining = stub.Drain.future(control_pb2.DrainRequest(), timeout=WAIT_S, metadata=token)
            assert until(lambda: "the owner hangs" in node.log())
            assert not draining.done()
            health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
            assert health.status == health_pb2.HealthCheckResponse.SERVING, "no other thread notices"
            draining.cancel()
        manager.watch()
        assert "Fatal Python error: Aborted" in node.log()
        assert "in run" in node.log().split("Fatal Python error")[1], "where each thread was"
        began(manager)
        assert node.client.connected
        assert_blocks(fetch(ns, keys).blocks, values(keys, BLOCK_BYTES))


# The end


def test_a_stop_finishes_what_has_begun_and_refuses_what_is_new() -> None:
    with unit() as (node, manager):
        began(manager)
        ns = node.namespace(BLOCK_BYTES)
        keys, begun, late = chain("there", 8), roots("begun", 1), roots("late", 1)
        put(ns, keys, values(keys, BLOCK_BYTES), durable=False)
        with raw_client(node.run) as raw:
            number = raw.open(BLOCK_BYTES, engine="node", dtype="uint8")
            (granted,) = raw.reserve(number, begun)
            assert granted.ticket
            assert manager.process is not None
            manager.process.terminate()
            manager.wait_said("STOPPING=1")
            assert f"EXTEND_TIMEOUT_USEC={65 * 10**6}" in manager.said
            manager.wait_said("STATUS=stopping: 1 blocks are being stored")
            assert raw.reserve(number, late)[0].grant == Grant.DRAINING
            assert_blocks(fetch(ns, keys).blocks, values(keys, BLOCK_BYTES))
            with grpc.insecure_channel(f"unix:{node.run}/control.sock") as channel:
                for verb in ("Undrain", "Drain"):
                    assert change(node, channel, verb) is grpc.StatusCode.FAILED_PRECONDITION, "nobody takes it back"
                health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
                stub: Any = control_pb2_grpc.ControlStub(channel)
                assert not stub.GetStatus(control_pb2.GetStatusRequest(), timeout=WAIT_S).serving
            assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert raw.reserve(number, late)[0].grant == Grant.DRAINING
            assert raw.commit([granted.ticket]) == 0
            assert manager.process.wait(WAIT_S) == 0
        assert "stop: everything is finished" in node.log()
        began(manager)
        assert node.client.connected
        assert (ns.match(begun).blocks, ns.match(late).blocks) == (1, 0)


@pytest.mark.parametrize("how", ["deadline", "asked twice"])
def test_a_stop_waits_for_nobody_for_ever(how: str) -> None:
    with unit("--stop-within", "300ms" if how == "deadline" else "1h") as (node, manager):
        began(manager)
        with raw_client(node.run) as raw:
            number = raw.open(BLOCK_BYTES)
            assert raw.reserve(number, roots("never", 1))[0].ticket
            assert manager.process is not None
            manager.process.terminate()
            manager.wait_said("STOPPING=1")
            if how == "asked twice":
                assert raw.reserve(number, roots("late", 1))[0].grant == Grant.DRAINING, "it waits"
                manager.process.terminate()
            assert manager.process.wait(WAIT_S) == 0
        assert ("stop: 1 blocks are being stored" in node.log()) is (how == "deadline")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_stop_writes_what_is_on_its_way_to_disk() -> None:
    assert written_by_a_stop("1m") == 64
    # Where we are held up between the last store and the stop, all is written without patience as well.
    assert any(written_by_a_stop("0s") < 64 for _ in range(5)), "the control: without patience, some are lost"


def written_by_a_stop(within: str) -> int:
    """How many of 64 blocks the next life finds on disk."""
    slow = ("--disk-admission", "all", "--disk-write-rate", "4MiB", "--disk-codec", "raw")
    with unit(*slow, "--stop-within", within, disks=1) as (node, manager):
        began(manager)
        ns = node.namespace(BLOCK_BYTES)
        canary = roots("canary", 1)
        put(ns, canary, values(canary, BLOCK_BYTES))
        keys = roots("written", 64)
        for key, block in zip(keys, values(keys, BLOCK_BYTES), strict=True):
            put(ns, [key], block[np.newaxis], durable=False)
        assert manager.stop() == 0
        manager.forget()
        began(manager)
        node.await_disk(ns, canary)
        return sum(ns.match([key]).blocks for key in keys)
