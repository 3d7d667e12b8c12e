"""ZeroMQ: for each tenant a PUB socket, and a ROUTER for what somebody missed; as vllm.distributed.kv_events has them.

    PUB       topic | number, 8 bytes, big endian | payload
    ROUTER    <-  "" | number to begin with, 8 bytes
              ->  "" | topic | number | payload     for each that is remembered from there on
              ->  "" | ""    | -1     | ""          and that was all

A subscriber that is `high_water` messages behind misses what comes until it has caught up, and nobody waits for it.
ZeroMQ says when that begins, and not how much it is. Who is connected is heard of each socket's monitor. One thread.
Needs the packages of [events].
"""

import logging
import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

import zmq

from kvstore.announcing import Changes, Place
from kvstored.block_events_address import ANY_TENANT, FOLDER, IPC, EventsConfig, endpoints_of
from kvstored.block_events_schema import Encoder
from kvstored.block_log import Batch, BlockLog, EventTally

log = logging.getLogger(__name__)

END: Final = (-1).to_bytes(8, "big", signed=True)
REQUESTS_MOST: Final = 4  # of a socket, before others have their turn
CONNECTIONS_MOST: Final = 64  # of a socket, that came or went, likewise
MONITORED: Final = struct.Struct("=HI")  # what a monitor's message begins with: an event, and a descriptor
REQUEST_BYTES: Final = 1024  # of a subscriber's: it has 16, and a topic at most 512


class Sockets:
    """Those of one daemon."""

    def __init__(self, config: EventsConfig, gid: int | None, tally: EventTally) -> None:
        """Raises OSError or ValueError where they cannot be."""
        self._config = config
        self._tally = tally
        self._gid = gid
        self._encoder = Encoder(config.form, config.hashes)
        self._context = zmq.Context()
        self._publish: dict[str, zmq.Socket[bytes]] = {}
        self._routers: dict[str, zmq.Socket[bytes]] = {}
        self._monitors: dict[str, zmq.Socket[bytes]] = {}
        self._connected: set[tuple[str, int]] = set()  # tenant, descriptor
        self._refused: set[str] = set()
        if config.listen == IPC:
            folder = config.runtime_dir / FOLDER
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700 if self._gid is None else 0o710)
            if self._gid is not None:
                os.chown(folder, -1, self._gid)
            for left in folder.iterdir():  # by a daemon that was killed
                if left.is_socket():
                    left.unlink()
        if config.tenant == ANY_TENANT:
            return
        try:
            self._open(config.tenant)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """What was not sent yet is forgotten."""
        self._context.destroy(linger=0)

    def encode(self, changes: Changes, place: Place | None) -> bytes:
        """A payload."""
        return self._encoder.cleared() if place is None else self._encoder.encode(changes, place)

    def send(self, batch: Batch, tenant: str) -> None:
        """To whoever listens; never waits."""
        if tenant not in self._publish and not self._opened(tenant):
            return
        frames = (batch.topic, batch.number.to_bytes(8, "big"), batch.payload)
        publish = self._publish[tenant]
        try:
            publish.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:  # somebody is too far behind: the others get it
            self._tally.overruns += 1
            publish.setsockopt(zmq.XPUB_NODROP, 0)
            publish.send_multipart(frames, zmq.NOBLOCK)
            publish.setsockopt(zmq.XPUB_NODROP, 1)

    def replay(self, logs: Mapping[str, BlockLog]) -> None:
        """Answer those who ask, and hear who comes and goes; never waits."""
        for tenant, monitor in self._monitors.items():
            with suppress(zmq.Again):
                for _ in range(CONNECTIONS_MOST):
                    self._hear(tenant, monitor.recv_multipart(zmq.NOBLOCK)[0])
        self._tally.subscribers = len(self._connected)
        for tenant, router in self._routers.items():
            with suppress(zmq.Again):
                for _ in range(REQUESTS_MOST):
                    self._answer(router, router.recv_multipart(zmq.NOBLOCK), logs.get(tenant))

    def _answer(self, router: "zmq.Socket[bytes]", frames: list[bytes], its: BlockLog | None) -> None:
        if len(frames) != 3 or frames[1] or len(frames[2]) != 8:
            log.warning("events: a request for replay has %d frames and is ignored", len(frames))
            return
        client, start = frames[0], int.from_bytes(frames[2], "big")
        self._tally.replays += 1
        if its is not None:
            for batch in its.after(min(max(start, its.first), its.next)) or ():
                number = batch.number.to_bytes(8, "big")
                router.send_multipart((client, b"", batch.topic, number, batch.payload), zmq.NOBLOCK)
                self._tally.replayed += 1
        router.send_multipart((client, b"", b"", END, b""), zmq.NOBLOCK)

    def _hear(self, tenant: str, event: bytes) -> None:
        kind, descriptor = MONITORED.unpack(event)
        if kind == zmq.EVENT_ACCEPTED:
            self._connected.add((tenant, descriptor))
        else:
            self._connected.discard((tenant, descriptor))

    def _opened(self, tenant: str) -> bool:
        """False: it has no sockets, and was told so before."""
        if tenant in self._refused:
            return False
        try:
            self._open(tenant)
        except (OSError, ValueError) as error:
            log.warning("events: tenant %s has no sockets: %s", tenant, error)
            self._refused.add(tenant)
            return False
        return True

    def _open(self, tenant: str) -> None:
        """Raises OSError or ValueError."""
        endpoints = endpoints_of(self._config.listen, self._config.runtime_dir, tenant)
        publish, router = self._context.socket(zmq.PUB), self._context.socket(zmq.ROUTER)
        try:
            publish.setsockopt(zmq.SNDHWM, self._config.high_water)
            publish.setsockopt(zmq.XPUB_NODROP, 1)  # so that it says when one has that much
            self._monitors[tenant] = publish.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
            router.setsockopt(zmq.SNDHWM, self._config.replay + 2)  # a whole answer
            for one, endpoint in ((publish, endpoints.publish), (router, endpoints.replay)):
                one.setsockopt(zmq.LINGER, 0)
                one.setsockopt(zmq.MAXMSGSIZE, REQUEST_BYTES)  # of what comes in
                one.setsockopt(zmq.IPV6, "[" in endpoint)
                self._bind(one, endpoint)
        except zmq.ZMQError as error:
            publish.disable_monitor()
            for one in (self._monitors.pop(tenant), publish):
                one.close()
            router.close()
            raise OSError(error.errno, f"{endpoints.publish}: {error}") from None
        self._publish[tenant], self._routers[tenant] = publish, router

    def _bind(self, one: "zmq.Socket[bytes]", endpoint: str) -> None:
        one.bind(endpoint)  # replaces a file that a dead daemon left behind
        if endpoint.startswith("ipc://") and self._gid is not None:
            path = endpoint.removeprefix("ipc://")
            os.chown(path, -1, self._gid)
            os.chmod(path, 0o660)  # noqa: PTH101  a string already
