"""An engine's KV memory on a GPU in the hands of the daemon (mode daemon): `Client.attach`, `ns.load`, `ns.save`.

    memory = client.attach(tensor.device, pages)           pages: kvkernels.device.pages.pages_of(device, layers)
    ns.save(keys, memory[ids], stream=compute)             the daemon copies pages -> its memory
    loading = ns.start_load(keys, memory[ids], groups=4)   its memory -> pages, group of layers by group
    loading.wait(1)                                        the first quarter of the layers is there

Nothing is copied by this process. What the daemon may be writing to, or reading, is not to be used for anything else:
`settled` of a result says so, and `AttachedMemory.settle` waits. It ends with the daemon's word, or with the daemon: by
its pidfd, since a socket's end comes before the last write may. A session that breaks while the daemon lives is settled
by attaching anew, which the daemon answers when nothing of the former session is under way. That may take as long as a
copy that hangs: who attaches waits once as long as a plain call may, and then nobody does but `settle`.
"""

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from kvclient import flows
from kvclient.calls import Call
from kvclient.connection import Connection
from kvclient.copying import Gate
from kvclient.devices import copies_for
from kvclient.flows import Flow
from kvclient.storing import NAP_NS_MAX
from kvclient.transfers import Answered, AttachCall, CancelCall, DetachCall, Moved, Transfer
from kvkernels.device.pages import Pages
from kvkernels.device.port import Device, DeviceError, Handle, Via
from kvkernels.device.sharing import share_pages
from kvproto.device_frames import Attach, Opens, Piece, SharedHandle, State
from kvproto.errors import AttachError, KvError, LimitError, UsageError
from kvproto.frames import Mode

if TYPE_CHECKING:
    from kvclient.protocol import Session

_OPENS: Final = {Via.IPC: Opens.IPC, Via.DESCRIPTOR: Opens.DESCRIPTOR}
_clock = time.monotonic_ns


class AttachedPages:
    """Some pages of it, by number, in the order of the keys that they belong to. Made by indexing the memory."""

    def __init__(self, memory: "AttachedMemory", ids: Sequence[int]) -> None:
        """Raises UsageError."""
        try:
            self.ids: tuple[int, ...] = tuple(memory.pages.ids(ids).tolist())
        except (DeviceError, TypeError, ValueError) as error:
            raise UsageError(str(error)) from error
        self.memory = memory
        self.gate: Gate | None = None  # which a `save` passes whenever it asks; not while it waits for room


class AttachedMemory:
    """Made by `Client.attach`; attached anew by itself when the session was. Any thread."""

    def __init__(self, connection: Connection, device: Device, pages: Pages) -> None:
        self.pages = pages
        self.device = device
        self.connection = connection
        self._lock = threading.Lock()
        self._attaching = threading.Lock()
        self._session: Session | None = None  # in which it has a number
        self._number = 0
        self._refusal: KvError | None = None  # of that session
        self._asked: AttachCall | None = None  # not answered yet, as far as is known
        self._transfers: list[Transfer] = []  # under way, as far as is known
        self._closed = False

    def __getitem__(self, ids: Sequence[int]) -> AttachedPages:
        """Pages by number. Raises UsageError for those that there are not."""
        return AttachedPages(self, ids)

    @property
    def attached(self) -> bool:
        """In the session that there is right now?"""
        session = self.connection.session()
        return session is not None and self._session is session and bool(self._number)

    # -- attaching -----------------------------------------------------------------------------------------------

    def attach(self, until_ns: int | None = None) -> "tuple[Session, int] | None":
        """The session and the number in it; None where there is none right now.

        Waits until then, or else as long as a plain call may; not again where a former session's copies keep the daemon
        from answering. Raises AttachError, UsageError as the daemon refuses it, once a session; LimitError each time.
        """
        if self._closed:
            return None
        asked = self._asked
        overdue = asked is not None and asked.abandoned and not asked.session.over
        plain_ns = self._plain_deadline() if until_ns is None else until_ns
        return self._attach(0 if overdue else plain_ns)

    def _plain_deadline(self) -> int:
        return _clock() + self.connection.timeout_ns

    def _attach(self, until_ns: int) -> "tuple[Session, int] | None":
        if not self._attaching.acquire(timeout=max(0, until_ns - _clock()) / 1e9):
            return None
        try:
            session = self.connection.session()
            if session is None or session.over:
                return None
            if self._session is session and (self._number or self._refusal or self._closed):
                if self._refusal is not None:
                    raise type(self._refusal)(*self._refusal.args)
                return (session, self._number) if self._number else None
            if session.mode is not Mode.DAEMON:
                raise AttachError(_not_in_mode(session))
            return self._attach_to(session, until_ns)
        finally:
            self._attaching.release()

    def _attach_to(self, session: "Session", until_ns: int) -> "tuple[Session, int] | None":
        call = self._asked
        if call is not None and call.session is session:
            self.connection.catch_up()
            self.connection.run(watching(Answered(call, until_ns)))
        else:
            call = self._ask(session, until_ns)
        if not call.came:
            return None
        self._asked = None
        if call.error is not None:
            if not isinstance(call.error, LimitError):  # what it has too much of may be less by the next time
                self._session, self._number, self._refusal = session, 0, call.error
            raise type(call.error)(*call.error.args)
        self._session, self._number, self._refusal = session, call.memory, None
        self._fenced(session)
        return session, call.memory

    def _ask(self, session: "Session", until_ns: int) -> AttachCall:
        attach, fds = shared(self.device, self.pages)
        call = self._asked = AttachCall(session, attach, fds, until_ns)
        try:
            self.connection.run(one(call))
        finally:
            if not call.request:  # it was never sent
                self._asked = None
            for fd in fds:
                os.close(fd)
        return call

    def _fenced(self, session: "Session") -> None:
        """The daemon has said that nothing of a former session of this process is under way there any more."""
        with self._lock:
            for transfer in self._transfers:
                theirs, ours = transfer.daemon, session.daemon
                if transfer.broken and theirs is not None and ours is not None and theirs.is_same(ours):
                    transfer.end(State.FAILED)

    def detach(self) -> bool:
        """Take it back, for good; whether the daemon has let go of it. What is under way is waited for."""
        with self._lock:
            self._closed = True
        settled = self.settle(self.connection.timeout_ns / 1e9)
        return self._let_go(self._plain_deadline()) and settled

    def _let_go(self, until_ns: int) -> bool:
        asked = self._asked
        if asked is not None and not asked.session.over:  # its answer brings a number that is to be given back
            with suppress(KvError):
                self._attach(until_ns)
            if self._asked is asked:
                return False
        session = self.connection.session()
        if session is None or session is not self._session or not self._number:
            return True
        call = DetachCall(session, self._number, until_ns)
        self.connection.run(one(call))
        self._number = 0
        return call.answered

    # -- what is under way ---------------------------------------------------------------------------------------

    def begin(self, transfer: Transfer) -> None:
        """Raises UsageError where its pages are in use by another one."""
        with self._lock:
            self._transfers = [each for each in self._transfers if not is_settled(each)]
            mine = {*transfer.pages}
            for other in self._transfers:
                if (transfer.loads or other.loads) and not mine.isdisjoint(other.pages):
                    raise UsageError("some of these pages may still be written to or read; see AttachedMemory.settle")
            self._transfers.append(transfer)

    def unsettled(self) -> list[int]:
        """Pages that the daemon may be writing to, or reading, right now."""
        with self._lock:
            self._transfers = [each for each in self._transfers if not is_settled(each)]
            return sorted({page for transfer in self._transfers for page in transfer.pages})

    def settle(self, timeout_s: float = 1.0) -> bool:
        """Cancel what is under way, and wait until nothing of this memory is written to or read; whether that is so."""
        until_ns = _clock() + flows.nanoseconds("timeout_s", timeout_s)
        while True:
            with self._lock:
                self._transfers = [each for each in self._transfers if not is_settled(each)]
                waiting = list(self._transfers)
            if not waiting:
                return True
            left_s = (until_ns - _clock()) / 1e9
            if left_s <= 0:
                return False
            self._settle(waiting[0], until_ns)

    def _settle(self, transfer: Transfer, until_ns: int) -> None:
        """One step towards it."""
        if not transfer.broken:
            self.connection.run(cancelling(transfer, until_ns))
            return
        nap_s = min(NAP_NS_MAX, max(0, until_ns - _clock())) / 1e9
        if transfer.daemon is not None and not transfer.daemon.exited(nap_s):
            with suppress(KvError):  # not there, or with another daemon: the end of the former one helps
                self._attach(until_ns)
                if self._closed:  # that was for the answer alone
                    self._let_go(until_ns)

    def settle_one(self, transfer: Transfer, timeout_ns: int) -> None:
        """The same of one transfer. It may not be settled then."""
        until_ns = _clock() + timeout_ns
        while not is_settled(transfer) and _clock() < until_ns:
            self._settle(transfer, until_ns)


def is_settled(transfer: Transfer) -> bool:
    """Is nothing of it under way any more, as far as is known? Never waits."""
    if transfer.broken and transfer.daemon is not None and transfer.daemon.exited():
        transfer.end(State.FAILED)
    return transfer.over


def _not_in_mode(session: "Session") -> str:
    notes = session.welcome.notes if session.welcome is not None else ""
    return f"the session is in mode {session.mode.name.lower()}" + (f" ({notes})" if notes else "")


def shared(device: Device, pages: Pages) -> tuple[Attach, list[int]]:
    """As it travels, and the descriptors that go with it, which the caller closes. Raises AttachError, UsageError."""
    try:
        given = share_pages(device, pages)
    except DeviceError as error:
        raise AttachError(f"memory that cannot be handed on: {error}") from error
    handles = [SharedHandle(each.whole_bytes, _OPENS[each.via], each.text) for each in given.handles]
    pieces = [Piece(*piece) for piece in given.pieces]
    identity = bytes.fromhex(device.properties.identity)
    return Attach(identity, handles, pieces, given.piece_bytes, given.blocks), _descriptors(given.handles)


def _descriptors(handles: Sequence[Handle]) -> list[int]:
    return [handle.fd for handle in handles if handle.via is Via.DESCRIPTOR]


def attach(connection: Connection, place: Any, pages: Pages) -> AttachedMemory:
    """`Client.attach`."""
    if not isinstance(pages, Pages):
        raise UsageError(f"pages are kvkernels.device.pages.Pages, not {type(pages).__name__}")
    memory = AttachedMemory(connection, copies_for(place).device, pages)
    memory.attach()
    return memory


def one(call: Call) -> Flow[None]:
    """A request, and no more."""
    yield call


def watching(answered: Answered) -> Flow[None]:
    """Wait, and no more."""
    yield answered


def cancelling(transfer: Transfer, deadline_ns: int) -> Flow[None]:
    """Have it cancelled, once it has a number."""
    if not transfer.number:  # it was asked for, and not answered yet
        yield Moved(transfer, transfer.groups + 1, min(deadline_ns, _clock() + NAP_NS_MAX))
    if transfer.over or not transfer.number:
        return
    if transfer.cancelled:  # once is enough
        yield Moved(transfer, transfer.groups + 1, deadline_ns)
        return
    call = CancelCall(transfer.session, transfer, deadline_ns)
    yield call
    transfer.cancelled = bool(call.request)
