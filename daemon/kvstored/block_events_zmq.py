"""ZeroMQ: of each tenant an XPUB socket, and a ROUTER for what was missed; as vllm.distributed.kv_events has them.

    XPUB      topic | number, 8 bytes, big endian | payload
    ROUTER    <-  "" | number to begin with, 8 bytes
              ->  "" | topic | number | payload     for each that is remembered from there on
              ->  "" | ""    | -1     | ""          and that was all

A subscriber that is `high_water` messages behind misses what comes until it has caught up, and nobody waits for it.
ZeroMQ says when that begins, and not how much it is. At an address, whoever takes nothing at all is cut off. Who is
connected is heard of each socket's monitor, and who subscribes of the socket itself. One thread. Needs the packages of
[events].

A replay goes on as its peer reads: of one that reads nothing, a few messages wait and no more. It is given up when
others need its place; what it missed shows by the numbers, and that was not all.
"""

import logging
import os
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import zmq

from kvstore.announcing import Changes, Place
from kvstored.block_events_address import (
    ANY_TENANT,
    FOLDER,
    IPC,
    PUBLISH,
    REPLAY,
    Endpoints,
    EventsConfig,
    endpoints_of,
)
from kvstored.block_events_schema import Encoder
from kvstored.block_log import Batch, BlockLog, EventTally

log = logging.getLogger(__name__)

END: Final = (-1).to_bytes(8, "big", signed=True)
REQUESTS_MOST: Final = 4  # of a socket, before others have their turn
REQUESTS_WAITING: Final = 64  # of a connection, before ZeroMQ reads no more of it
REPLAYS_MOST: Final = 64  # of a socket, under way
REPLAY_AHEAD: Final = 16  # messages that wait for who asked: 0.25 MB mostly, 1 MB at most (`BATCH_CHANGES`)
STALLED_S: Final = 5.0  # without reading: then whoever asks next may have its place
DEAD_S: Final = 60  # without a sign of a peer at an address, or without its taking anything: it is cut off
GREETED_S: Final = 1.0  # from one word for new subscribers to the next one
COMPLAIN_S: Final = 60.0  # from one word about malformed requests to the next one
FORMER_MOST: Final = 64  # tenants of former lives: as many as a daemon has places for
SUBSCRIPTIONS_MOST: Final = 4096  # of a socket, at a time
SUBSCRIBE: Final = b"\x01"  # what a message that subscribes begins with
CONNECTIONS_MOST: Final = 64  # of a socket, that came or went, likewise
MONITORED: Final = struct.Struct("=HI")  # what a monitor's message begins with: an event, and a descriptor
REQUEST_BYTES: Final = 1024  # of a subscriber's: it has 16, and a topic at most 512


@dataclass(slots=True)
class Replay:
    """What somebody asked for, and how far it has come."""

    client: bytes
    next: int
    stop: int  # what is told after it was asked for is heard from the other socket
    moved_s: float  # when it last came on


class Sockets:
    """Those of one daemon."""

    def __init__(self, config: EventsConfig, gid: int | None, tally: EventTally) -> None:
        """Raises OSError or ValueError where they cannot be."""
        self._config = config
        self._tally = tally
        self._gid = gid
        self._encoder = Encoder(config.form, config.hashes, apart=config.has("namespace"))
        self._context = zmq.Context()
        self._publish: dict[str, zmq.Socket[bytes]] = {}
        self._routers: dict[str, zmq.Socket[bytes]] = {}
        self._monitors: dict[str, zmq.Socket[bytes]] = {}
        self._connected: set[tuple[str, int]] = set()  # tenant, descriptor
        self._refused: set[str] = set()
        self._replays: dict[str, list[Replay]] = {}
        self._subscribed: set[str] = set()  # tenants that somebody has subscribed to since they were greeted
        self._greeted_s: dict[str, float] = {}
        self._malformed, self._complained_s = 0, -COMPLAIN_S
        former: list[str] = []
        if config.listen == IPC:
            folder = config.runtime_dir / FOLDER
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700 if self._gid is None else 0o710)
            if self._gid is not None:
                os.chown(folder, -1, self._gid)
            former = _former(folder)
        if config.tenant == ANY_TENANT:
            for tenant in former:
                self._opened(tenant)
            return
        try:
            self._open(config.tenant)
        except BaseException:
            self.close()
            raise

    @property
    def tenants(self) -> list[str]:
        """Those who have sockets."""
        return list(self._publish)

    def close(self) -> None:
        """What was not sent yet is forgotten. Where somebody listened a file stays: the next life tells them."""
        self._context.destroy(linger=0)
        if self._config.listen == IPC:
            for tenant in self._greeted_s:
                with suppress(OSError):
                    Path(self._endpoints(tenant).publish.removeprefix("ipc://")).touch(0o600)

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

    def replay(self, logs: Mapping[str, BlockLog]) -> bool:
        """Answer those who ask, and hear who comes and goes; never waits. Did some of them read what they asked for?"""
        for tenant, monitor in self._monitors.items():
            with suppress(zmq.Again):
                for _ in range(CONNECTIONS_MOST):
                    self._hear(tenant, monitor.recv_multipart(zmq.NOBLOCK)[0])
        self._tally.subscribers = len(self._connected)
        now_s = time.monotonic()
        for tenant, router in self._routers.items():
            with suppress(zmq.Again):
                for _ in range(REQUESTS_MOST):
                    if not router.poll(0) or not self._place_for_one(tenant, now_s):
                        break  # nobody asks, or who does waits in the socket
                    self._take(tenant, router.recv_multipart(zmq.NOBLOCK), logs.get(tenant), now_s)
        moved = [self._go_on(tenant, logs.get(tenant), now_s) for tenant in self._routers]  # none is left out
        return any(moved)

    def _place_for_one(self, tenant: str, now_s: float) -> bool:
        under_way = self._replays[tenant]
        if len(under_way) >= REPLAYS_MOST:
            under_way[:] = [one for one in under_way if now_s - one.moved_s < STALLED_S]
        return len(under_way) < REPLAYS_MOST

    def _take(self, tenant: str, frames: list[bytes], its: BlockLog | None, now_s: float) -> None:
        if len(frames) != 3 or frames[1] or len(frames[2]) != 8:
            self._malformed += 1
            if now_s - self._complained_s >= COMPLAIN_S:
                text = "events: %d requests for replay were malformed and are ignored; the last one has %d frames"
                log.warning(text, self._malformed, len(frames))
                self._malformed, self._complained_s = 0, now_s
            return
        self._tally.replays += 1
        first, end = (its.first, its.next) if its is not None else (0, 0)
        start = int.from_bytes(frames[2], "big")
        start = max(start, first) if start <= end else first  # beyond the end: of another life, whatever that was
        self._replays[tenant].append(Replay(frames[0], start, end, now_s))

    def _go_on(self, tenant: str, its: BlockLog | None, now_s: float) -> bool:
        """A few messages of each replay, of a client's several one after the other. Did any of them come on?"""
        moved, served = False, set[bytes]()
        for one in list(self._replays[tenant]):
            if one.client in served:
                continue
            served.add(one.client)
            try:
                over = self._slice(self._routers[tenant], one, its, now_s)
            except zmq.Again:  # as much as may wait for it
                over = False
            except zmq.ZMQError:  # it is gone
                over = True
            moved = moved or one.moved_s == now_s
            if over:
                self._replays[tenant].remove(one)
        return moved

    def _slice(self, router: "zmq.Socket[bytes]", one: Replay, its: BlockLog | None, now_s: float) -> bool:
        """Was that all? Raises zmq.Again, or ZMQError where nobody is there any more."""
        if its is not None and one.next < one.stop:
            for batch in its.after(max(one.next, its.first), REPLAY_AHEAD) or ():
                if batch.number >= one.stop:
                    break
                number = batch.number.to_bytes(8, "big")
                router.send_multipart((one.client, b"", batch.topic, number, batch.payload), zmq.NOBLOCK)
                self._tally.replayed += 1
                one.next, one.moved_s = batch.number + 1, now_s
            if max(one.next, its.first) < one.stop:
                return False
        router.send_multipart((one.client, b"", b"", END, b""), zmq.NOBLOCK)
        one.moved_s = now_s
        return True

    def subscribed(self) -> list[str]:
        """Tenants whom somebody has subscribed to, who is to hear that it may have missed something; never waits."""
        for tenant, publish in self._publish.items():
            with suppress(zmq.Again):
                for _ in range(SUBSCRIPTIONS_MOST):
                    if publish.recv(zmq.NOBLOCK)[:1] == SUBSCRIBE:
                        self._subscribed.add(tenant)
        now_s = time.monotonic()
        found = [one for one in self._subscribed if now_s - self._greeted_s.get(one, -GREETED_S) >= GREETED_S]
        self._greeted_s.update(dict.fromkeys(found, now_s))
        self._subscribed.difference_update(found)
        return found

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
        endpoints = self._endpoints(tenant)
        publish, router = self._context.socket(zmq.XPUB), self._context.socket(zmq.ROUTER)
        try:
            publish.setsockopt(zmq.SNDHWM, self._config.high_water)
            publish.setsockopt(zmq.XPUB_NODROP, 1)  # so that it says when one has that much
            self._monitors[tenant] = publish.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
            publish.setsockopt(zmq.XPUB_VERBOSE, 1)  # each subscription, and not only the first one to a topic
            router.setsockopt(zmq.SNDHWM, REPLAY_AHEAD)
            router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # so that it says when one has that much
            for one, endpoint in ((publish, endpoints.publish), (router, endpoints.replay)):
                one.setsockopt(zmq.LINGER, 0)
                one.setsockopt(zmq.RCVHWM, REQUESTS_WAITING)
                one.setsockopt(zmq.MAXMSGSIZE, REQUEST_BYTES)  # of what comes in
                one.setsockopt(zmq.IPV6, "[" in endpoint)
                one.setsockopt(zmq.TCP_KEEPALIVE, 1)  # a peer whose host is gone says nothing
                one.setsockopt(zmq.TCP_KEEPALIVE_IDLE, DEAD_S)
                one.setsockopt(zmq.TCP_KEEPALIVE_INTVL, DEAD_S // 3)
                one.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
                one.setsockopt(zmq.TCP_MAXRT, 1000 * DEAD_S)  # and one that takes nothing of what waits for it
                self._bind(one, endpoint)
        except zmq.ZMQError as error:
            publish.disable_monitor()
            for one in (self._monitors.pop(tenant), publish):
                one.close()
            router.close()
            raise OSError(error.errno, f"{endpoints.publish}: {error}") from None
        self._publish[tenant], self._routers[tenant], self._replays[tenant] = publish, router, []

    def _endpoints(self, tenant: str) -> Endpoints:
        return endpoints_of(self._config.listen, self._config.runtime_dir, tenant)

    def _bind(self, one: "zmq.Socket[bytes]", endpoint: str) -> None:
        one.bind(endpoint)  # replaces a file that a dead daemon left behind
        if endpoint.startswith("ipc://") and self._gid is not None:
            path = endpoint.removeprefix("ipc://")
            os.chown(path, -1, self._gid)
            os.chmod(path, 0o660)  # noqa: PTH101  a string already


def _former(folder: Path) -> list[str]:
    """Tenants that former lives have told of: who subscribed to them is to hear that it is over. Their files go."""
    left = [path for path in folder.iterdir() if path.suffix in (PUBLISH, REPLAY) and not path.is_dir()]
    names = {path.stem: path.lstat().st_mtime for path in left if path.suffix == PUBLISH}
    for path in left:
        path.unlink()
    return sorted(names, key=lambda name: -names[name])[:FORMER_MOST]
