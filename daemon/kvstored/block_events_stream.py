"""WatchBlocks: where a tenant's blocks are, and what changes, as a stream. Handler threads, a few of which it may keep.

    no number, or one that is forgotten    "cleared", then what is there, slice by slice, then changes
    a number that is remembered            changes from there on

What is there is of many moments, and changes that happened meanwhile follow behind it: they are told as they were, so
that who takes each block's word of where it is now ends up with what is true.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

import grpc

from kvproto import control_pb2 as pb
from kvstore.announcing import IN_DRAM, IN_REMOTE, ON_DISK, Changes, Place, Told
from kvstored.admin_look import Owner
from kvstored.block_events import BlockEvents, by_place
from kvstored.block_log import Batch, BlockLog
from kvstored.requests import namespace_of

WATCHERS: Final = 4  # at once; each has a thread
# Of them, of one tenant where tenants themselves ask; and the last one is for a tenant that has none.
WATCHERS_OF_ONE: Final = 2
OWNER_WAIT_S: Final = 10.0
LOOK_UP_S: Final = 0.5  # how often to see whether somebody still listens
CHANGES_MOST: Final = 1024  # of a message
_DRAM, _DISK, _REMOTE = int(IN_DRAM), int(ON_DISK), int(IN_REMOTE)
_HERE = _DRAM | _DISK  # in a row of the table, which knows its parent


class WatchedBlocks:
    """The changes that one control socket tells of. None: nobody looks for any."""

    def __init__(self, events: BlockEvents | None, owner: Owner, of_one: int = WATCHERS) -> None:
        """`of_one`: so many may watch one tenant at once."""
        self._events = events
        self._owner = owner
        self._of_one = of_one
        self._lock = threading.Lock()
        self._watching: Counter[str] = Counter()  # by tenant

    def stream(self, request: pb.WatchBlocksRequest, context: grpc.ServicerContext) -> Iterator[pb.BlockChanges]:
        """See control.proto."""
        digest = ""
        try:
            named = namespace_of(request)
            digest = named.hex() if named is not None else ""
        except ValueError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if not request.tenant:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "tenant must name whose blocks are meant")
        if self._events is None:
            text = "nobody looks where blocks lie here; set events.listen to grpc, or to more"
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
        watching = self._begin(request.tenant)
        if watching:
            text = f"{watching} watch already; end one of them, or do not follow"
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        try:
            with self._events.watched(), self._events.log_for(request.tenant) as log:
                yield from self._told(log, request, digest, context)
        except TimeoutError:
            context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the owner thread did not answer in time")
        finally:
            self._end(request.tenant)

    def _begin(self, tenant: str) -> int:
        """0: it may watch; else how many do that are too many."""
        with self._lock:
            kept = 1 if self._of_one < WATCHERS and self._watching[tenant] else 0
            if self._watching.total() >= WATCHERS - kept:
                return self._watching.total()
            if self._watching[tenant] >= self._of_one:
                return self._of_one
            self._watching[tenant] += 1
            return 0

    def _end(self, tenant: str) -> None:
        with self._lock:
            self._watching[tenant] -= 1
            if not self._watching[tenant]:
                del self._watching[tenant]

    def _told(
        self, log: BlockLog, request: pb.WatchBlocksRequest, digest: str, context: grpc.ServicerContext
    ) -> Iterator[pb.BlockChanges]:
        number = request.start_from if request.HasField("start_from") else None
        while context.is_active():
            batches = log.after(number) if number is not None else None
            if batches is None:
                number = log.next
                yield from self._all(log.tenant, number, digest)
                continue
            for batch in batches:
                number = batch.number + 1
                if batch.place is None or digest in ("", batch.place.digest):
                    yield _message(batch, log.tenant)
            assert number is not None, "it was given, or is that of the next one"
            if batches:
                continue
            if not request.follow or not log.wait(number, LOOK_UP_S):
                return

    def _all(self, tenant: str, number: int, digest: str) -> Iterator[pb.BlockChanges]:
        yield pb.BlockChanges(number=number, next=number, unix_s=time.time(), tenant=tenant, cleared=True, there=True)
        start = 1
        while start:
            told, start = self._owner.ask(_slice_of(tenant, start), OWNER_WAIT_S)
            for changes, place in by_place(told):
                if digest in ("", place.digest):
                    for at in range(0, changes.size, CHANGES_MOST):
                        part = _changes(changes[at : at + CHANGES_MOST], parents=False)
                        yield pb.BlockChanges(
                            number=number, next=number, unix_s=time.time(), tenant=tenant,
                            namespace_digest=place.digest, there=True, changes=part,
                        )  # fmt: skip


def _slice_of(tenant: str, start: int) -> Callable[[Any], tuple[Told, int]]:
    return lambda port: port.routing.there(tenant, start)


def _message(batch: Batch, tenant: str) -> pb.BlockChanges:
    place: Place | None = batch.place
    return pb.BlockChanges(
        number=batch.number, next=batch.number + 1, unix_s=batch.unix_s, tenant=tenant,
        namespace_digest=place.digest if place is not None else "", cleared=place is None,
        changes=_changes(batch.changes, parents=True),
    )  # fmt: skip


def _changes(changes: Changes, *, parents: bool) -> list[pb.BlockChange]:
    keys, above = changes["key"], changes["parent"]
    return [
        pb.BlockChange(
            key=keys[i].tobytes(),
            parent=above[i].tobytes() if parents and now & _HERE and was ^ now != _REMOTE else b"",
            dram=bool(now & _DRAM), disk=bool(now & _DISK), remote=bool(now & _REMOTE),
            was_dram=bool(was & _DRAM), was_disk=bool(was & _DISK), was_remote=bool(was & _REMOTE),
        )
        for i, (was, now) in enumerate(zip(changes["was"].tolist(), changes["now"].tolist(), strict=True))
    ]  # fmt: skip
