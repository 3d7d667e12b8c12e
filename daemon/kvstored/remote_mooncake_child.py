"""Mooncake's client in a process of its own: `PYTHON remote_mooncake_child.py JSON`, run by its own interpreter.

    daemon -- a lane (SEQPACKET, one call at a time) --> a thread here --> Mooncake --> memory that both have mapped
           -- control: READY or FAILED once; its end: this process ends ----

Whatever Mooncake does, it does it here: it hangs, ends the process, prints, or writes into memory after it has said
that it failed. Reads come many at a time, and those that wait at the same time are one batch of Mooncake's: several
calls of it at a time are slower than one, on few cores.

Imports nothing but the standard library and Mooncake, so that any interpreter will do.

With TCP, shared memory is not registered: what is registered can be written to by every host that reaches this process.
RDMA wants that, so there each lane has a registered buffer of its own, and what was read is copied out of it.
"""

import ctypes
import importlib
import json
import mmap
import os
import queue
import signal
import socket
import sys
import threading
from typing import Any

MESSAGE_BYTES = 1 << 17
BATCH = 32  # reads at a time
PR_SET_PDEATHSIG = 1
OK = 0
NOT_FOUND = -704
THERE = 1  # what `put` answers for an object that is there
LOST = -1  # something was raised


def main() -> None:
    """Until the daemon is gone."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # the daemon decides when it ends
    request: dict[str, Any] = json.loads(sys.argv[1])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != request["parent"]:
        os._exit(0)
    control = socket.socket(fileno=request["control"])
    memory = mmap.mmap(request["memory"], request["memory_bytes"])
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    try:
        store = connect(request)
        reads: queue.SimpleQueue[Read] = queue.SimpleQueue()
        lanes = [Lane(fd, store, base, request, reads) for fd in request["lanes"]]
    except (ImportError, OSError, RuntimeError) as error:
        control.send(json.dumps({"failed": str(error)[:200], "lasting": isinstance(error, ImportError)}).encode())
        os._exit(0)
    control.send(b'{"ready": true}')
    threading.Thread(target=read_in_batches, args=(store, reads), daemon=True).start()
    for lane in lanes:
        threading.Thread(target=lane.serve, daemon=True).start()
    while control.recv(1):
        pass
    os._exit(0)  # `close` could wait for whom nobody reaches


def connect(request: dict[str, Any]) -> Any:
    """A client that gives no memory of its own. Raises ImportError, RuntimeError."""
    os.environ.setdefault("MC_RPC_TIMEOUT_MS", str(request["deadline_ms"]))
    os.environ.setdefault("MC_RPC_CONNECT_TIMEOUT_MS", str(request["deadline_ms"]))
    os.environ.setdefault("MC_STORE_CLIENT_METRIC", "0")
    store = importlib.import_module("mooncake.store").MooncakeDistributedStore()
    code = store.setup(
        {
            "local_hostname": request["host"], "metadata_server": request["metadata"], "protocol": request["protocol"],
            "rdma_devices": request["devices"], "global_segment_size": "0", "local_buffer_size": "0",
            "master_server_addr": request["master"],
        }
    )  # fmt: skip
    if code != OK:
        raise RuntimeError(f"Mooncake's client cannot be set up: {code}")
    return store


class Lane:
    """One thread, and whom it serves."""

    def __init__(
        self, fd: int, store: Any, base: int, request: dict[str, Any], reads: "queue.SimpleQueue[Read]"
    ) -> None:
        """Raises RuntimeError if its buffer cannot be registered."""
        self._link = socket.socket(fileno=fd)
        self._store = store
        self._base = base
        self._reads = reads
        self._own = 0
        self._own_bytes = request["object_bytes"]
        if request["protocol"] != "tcp":
            self._buffer = mmap.mmap(-1, request["object_bytes"])
            self._own = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
            if store.register_buffer(self._own, request["object_bytes"]) != OK:
                raise RuntimeError("memory cannot be registered")

    def serve(self) -> None:
        """Answer one call after the other."""
        while message := self._link.recv(MESSAGE_BYTES):
            call: dict[str, Any] = json.loads(message)
            verb = getattr(self, call.pop("do"))
            try:
                answer = verb(**call)
            except Exception as error:  # noqa: BLE001  of whatever kind: it is Mooncake's, and told to the daemon
                print(f"mooncake: {error!r}", file=sys.stderr, flush=True)
                answer = LOST
            if answer is not None:
                self.answer(answer)

    def answer(self, answer: Any) -> None:
        """To the call that is being made."""
        self._link.send(json.dumps(answer).encode())

    def get(self, name: str, at: int, room: int) -> int:
        """Bytes of the whole object, which lie at `at` then; or a code below 0."""
        (length,) = self._get_into([name], at, room)
        return length

    def get_many(self, names: list[str], at: int, room: int) -> "list[int] | None":
        """As `get`, of each; they lie `room` bytes apart. Answered later, with others, where memory is shared."""
        if self._own:
            return self._get_into(names, at, room)
        self._reads.put((self, names, [self._base + at + number * room for number in range(len(names))], room))
        return None

    def _get_into(self, names: list[str], at: int, room: int) -> list[int]:
        """At once; by way of the registered buffer where there is one, as many at a time as it holds."""
        many = max(1, self._own_bytes // room) if self._own else len(names)
        lengths: list[int] = []
        for first in range(0, len(names), many):
            some, target = names[first : first + many], self._base + at + first * room
            addresses = [(self._own or target) + number * room for number in range(len(some))]
            got: list[int] = self._store.batch_get_into(some, addresses, [room] * len(some))
            for number, length in enumerate(got):
                if self._own and length > 0:
                    ctypes.memmove(target + number * room, addresses[number], length)
            lengths += got
        return lengths

    def address(self, at: int) -> int:
        """Where Mooncake reads what is put."""
        return self._own or self._base + at

    def size(self, name: str) -> int:
        """Bytes of an object, or a code below 0."""
        length: int = self._store.get_size(name)
        return length

    def put(self, name: str, at: int, size: int) -> int:
        """OK, THERE, or a code below 0. Mooncake says that all is well if an object is there already."""
        found: int = self._store.is_exist(name)
        if found:
            return found
        if self._own:
            ctypes.memmove(self._own, self._base + at, size)
        code: int = self._store.put_from(name, self.address(at), size)
        return code

    def exists(self, names: list[str]) -> list[int]:
        """1, 0, or a code below 0, of each."""
        found: list[int] = self._store.batch_is_exist(names)
        return found

    def delete(self, names: list[str]) -> list[int]:
        """A code of each. What somebody reads right now goes, too: its checksum tells who reads."""
        codes: list[int] = self._store.batch_remove(names, True)
        return codes


Read = tuple[Lane, list[str], list[int], int]  # whom to answer, names, where each goes, and how much room there is


def read_in_batches(store: Any, reads: "queue.SimpleQueue[Read]") -> None:
    """Whatever waits, at once."""
    while True:
        batch = [reads.get()]
        while sum(len(names) for _, names, _, _ in batch) < BATCH and not reads.empty():
            batch.append(reads.get())
        names = [name for _, some, _, _ in batch for name in some]
        try:
            lengths: list[int] = store.batch_get_into(
                names, [one for _, _, addresses, _ in batch for one in addresses],
                [room for _, some, _, room in batch for _ in some],
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001  as above
            print(f"mooncake: {error!r}", file=sys.stderr, flush=True)
            lengths = [LOST] * len(names)
        for lane, some, _, _ in batch:
            lane.answer(lengths[: len(some)])
            lengths = lengths[len(some) :]


if __name__ == "__main__":
    main()
