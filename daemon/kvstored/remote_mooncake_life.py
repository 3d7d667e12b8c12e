"""One life of the process that has Mooncake's client in it (`remote_mooncake_child.py`): started, asked, ended.

A call that is not answered by its deadline ends the life: nobody can tell what Mooncake still writes, and where. So
does a transfer that failed half-way (its bytes may come later). The memory of a life is used by no other one.
"""

import json
import logging
import os
import queue
import socket
import subprocess
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvstored.leaf import NICE
from kvstored.niceness import be_nice
from kvstored.remote_mooncake_memory import Region
from kvstored.remote_port import RefusedError, UnreachableError

log = logging.getLogger(__name__)

LANES: Final = 8  # calls at a time
START_S: Final = 30.0  # until it is set up: imports and the first connection
MESSAGE_BYTES: Final = 1 << 17
CHILD: Final = Path(__file__).with_name("remote_mooncake_child.py")
LAST_LINES: Final = 5
LINE_BYTES: Final = 4096  # a longer one is read as several
CLOSED: Final = "closed"
ENDED: Final = "its client has ended"


@dataclass(frozen=True, slots=True)
class ChildRequest:
    """What it is told. `host` empty: as the way to the master says. `devices`: of RDMA, with commas; empty: all."""

    python: str
    master: str
    host: str
    metadata: str
    protocol: str
    devices: str
    deadline_s: float
    region_bytes: int
    object_bytes: int


class Life:
    """One process. Any thread."""

    def __init__(self, request: ChildRequest) -> None:
        """Starts it, and does not wait for it. Raises OSError."""
        self.region = Region(request.region_bytes)
        self.began_s = time.monotonic()
        self.reason = ""  # why it is over, or is not to be used any more
        self.lasting = False  # another life would end as this one did
        self._request = request
        self._ready = threading.Event()  # or over
        self._over = threading.Event()
        self._lanes: queue.SimpleQueue[socket.socket | None] = queue.SimpleQueue()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._heard = False
        self._thread = threading.Thread(target=self._run, name="remote-mooncake", daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        """Will it answer nobody any more?"""
        return self._over.is_set() or bool(self.reason)

    @property
    def pid(self) -> int:
        """Its number; 0: it has none yet."""
        return self._process.pid if self._process is not None else 0

    def ask(self, until_s: float, **call: Any) -> Any:
        """Have a verb of the child's carried out. Raises UnreachableError, RefusedError."""
        if not self._ready.wait(max(0.0, until_s - time.monotonic())):
            raise UnreachableError("Mooncake's client is being set up")
        self._check()
        try:
            lane = self._lanes.get(timeout=max(0.001, until_s - time.monotonic()))
        except queue.Empty:
            raise UnreachableError("too many calls at a time") from None
        if lane is None:
            self._lanes.put(None)
            self._check()
            raise UnreachableError(ENDED)
        try:
            lane.settimeout(max(0.001, until_s - time.monotonic()))
            lane.send(json.dumps(call).encode())
            answer = lane.recv(MESSAGE_BYTES)
        except OSError as error:
            answer, reason = b"", "slower than the deadline" if isinstance(error, TimeoutError) else ENDED
        else:
            reason = ENDED
        if not answer:
            lane.close()
            self.end(reason)
            raise UnreachableError(reason)
        self._lanes.put(lane)
        if self._over.is_set():
            self._close_lanes()
        try:
            return json.loads(answer)
        except ValueError:
            self.end("an answer that makes no sense")
            raise UnreachableError("an answer that makes no sense") from None

    def end(self, reason: str) -> None:
        """Kill it. Any number of times; the first reason counts."""
        with self._lock:
            self.reason = self.reason or reason
            if self._process is not None and not self._over.is_set():
                self._process.kill()

    def wait(self, deadline_s: float) -> bool:
        """Until it is gone."""
        return self._over.wait(deadline_s)

    def _close_lanes(self) -> None:
        """Those that nobody uses; who uses one closes it. Whoever waits for one hears of the end."""
        while True:
            try:
                lane = self._lanes.get_nowait()
            except queue.Empty:
                break
            if lane is not None:
                lane.close()
        self._lanes.put(None)

    def _check(self) -> None:
        if self.over:
            raise (RefusedError if self.lasting else UnreachableError)(self.reason or ENDED)

    # -- the thread that begins it, hears it, and sees it end: the kernel ends the child with this thread --

    def _run(self) -> None:
        # As nice as the threads that use it: it spins while it waits, and would keep the processor from them.
        be_nice(NICE)
        lanes: list[tuple[socket.socket, socket.socket]] = []
        ends: list[socket.socket] = []  # of the control socket: ours, the child's
        try:
            lanes += [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(LANES)]
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ends += (ours, theirs)
            host = self._request.host or way_to(self._request.master)  # this may wait for a name server
            with self._lock:
                if not self.reason:
                    self._process = self._start(host, theirs, [child for _, child in lanes])
            theirs.close()
            for _, child in lanes:
                child.close()
            if self._process is not None:
                self._hear(ours, [lane for lane, _ in lanes])
        except UnreachableError as error:
            self.reason = self.reason or str(error)
        except OSError as error:
            self.reason = self.reason or f"its client cannot be started: {error.strerror}"
        finally:
            with self._lock:
                self._over.set()
            self._ready.set()
            if self._process is None or not self._heard:
                for lane, _ in lanes:
                    lane.close()
            self._close_lanes()
            for end in (*ends, *(child for _, child in lanes)):
                end.close()
            self.region.close()

    def _start(self, host: str, control: socket.socket, lanes: list[socket.socket]) -> subprocess.Popen[bytes]:
        request = self._request
        numbers = [lane.fileno() for lane in lanes]
        told = {
            "parent": os.getpid(), "control": control.fileno(), "lanes": numbers, "memory": self.region.fd,
            "memory_bytes": request.region_bytes, "object_bytes": request.object_bytes, "master": request.master,
            "host": host, "metadata": request.metadata, "protocol": request.protocol,
            "devices": request.devices, "deadline_ms": max(100, int(800 * request.deadline_s)),
        }  # fmt: skip
        return subprocess.Popen(  # noqa: S603  as the operator says
            [request.python, "-P", str(CHILD), json.dumps(told)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            pass_fds=[control.fileno(), self.region.fd, *numbers],
        )  # fmt: skip

    def _hear(self, control: socket.socket, lanes: list[socket.socket]) -> None:
        process, last = self._process, deque[str](maxlen=LAST_LINES)
        assert process is not None, "it was started"
        assert process.stderr is not None, "as it was asked for"
        listener = threading.Thread(target=_drain, args=(process.stderr, last), daemon=True)
        listener.start()
        control.settimeout(START_S)
        try:
            said = json.loads(control.recv(MESSAGE_BYTES) or b"{}")
        except TimeoutError:
            said = {"failed": f"not set up within {START_S:.0f} s"}
        if said.get("ready"):
            self._heard = True  # that it was set up: from here on lanes are whose they are
            for lane in lanes:
                self._lanes.put(lane)
            self._ready.set()
            log.info("remote: Mooncake's client is connected: pid=%d master=%s", process.pid, self._request.master)
        else:
            self.lasting = bool(said.get("lasting"))
            self.end(str(said.get("failed") or ENDED))
        code = process.wait()
        listener.join(1.0)
        if self.reason != CLOSED:
            words = " | ".join(last) if not self.lasting else ""
            log.warning(
                "remote: Mooncake's client has ended: code=%d reason=%s said=%s",
                code,
                self.reason or "by itself",
                words,
            )


def way_to(master: str) -> str:
    """The address of this host on the way to another one. No packet is sent. Raises UnreachableError."""
    host, _, port = master.rpartition(":")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            own: str = probe.getsockname()[0]
    except (OSError, ValueError) as error:
        raise UnreachableError(f"there is no way to {master}") from error
    return own


def _drain(pipe: Any, last: deque[str]) -> None:
    with pipe:
        for line in iter(lambda: pipe.readline(LINE_BYTES), b""):
            text = line.decode(errors="replace").strip()
            if not text.startswith("I"):  # what all is well with, in the form of glog
                last.append(text[-200:])
