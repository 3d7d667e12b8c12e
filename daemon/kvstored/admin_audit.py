"""What was done on the control socket, and by whom: a file that only grows, until it is put aside.

    AUDIT_DIR/audit.log      one line of JSON an act, mode 0600, the newest at the end
             /audit.log.1    what came before, and so on to .4: at most 5 MiB in all

A thread of its own writes. Whoever acts waits half a second for their line to be there and no longer, so a disk that is
full or hangs holds nobody up: then the act counts as done, the failure is counted and said, and the line is remembered
here, among the last 512. An act that goes on when its caller's time is over has its line when it is over, or when the
daemon ends before. Lines name scopes, never keys, tokens or bytes. Any thread.
"""

import json
import logging
import os
import queue
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from kvproto import control_pb2 as pb
from kvstored.requests import named

log = logging.getLogger(__name__)

FILE: Final = "audit.log"
FILE_BYTES: Final = 1 << 20  # some 4,000 acts
FILES: Final = 5
REMEMBERED: Final = 512
LINE_BYTES: Final = 4096
SCOPE_LETTERS: Final = 512
OUTCOME_LETTERS: Final = 300
WAITING: Final = 1024  # lines that a hung disk holds up; more are remembered only
REFUSED_AT_ONCE: Final = 32  # of those whom everybody can send; all files together hold some 20,000 acts
REFUSED_EVERY_S: Final = 60.0
WRITE_S: Final = 0.5  # what an act waits for its line


@dataclass(frozen=True, slots=True)
class Act:
    """One call that changed something, or tried to."""

    unix_s: float
    uid: int  # -1: nobody on this host, see `who`
    pid: int  # 0: unknown
    who: str  # of a certificate, its name; else empty
    verb: str  # as kvctl has it: `quota set`
    scope: str  # what follows it; empty where nothing does
    blocks: int
    bytes: int
    outcome: str  # "done", or why not


class Audit:
    """The acts of this daemon, and of those that served here before."""

    def __init__(self, directory: Path | None) -> None:
        """Without a directory, or with one that cannot be used, acts are remembered and not written."""
        if directory is not None:
            with suppress(OSError):  # each act then says that it is not in the file, and why
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = None if directory is None else directory / FILE
        self.lost = 0  # lines that are in no file
        self.heard: Callable[[Act], None] = lambda _act: None  # `Chronicle`
        self.unheard = 0  # refused acts since the last one that was noted
        self._refusals, self._refused_s = float(REFUSED_AT_ONCE), time.monotonic()
        self._recent: deque[Act] = deque(self._read(), maxlen=REMEMBERED)
        self._going: dict[Future[Any], Act] = {}  # begun, and their callers are gone
        self._lock = threading.Lock()
        self._lines: queue.Queue[tuple[bytes, threading.Event] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._write_all, name="audit", daemon=True)
        self._thread.start()

    def note(self, act: Act) -> None:
        """Write it down. Returns once it is, or after `WRITE_S`; never raises."""
        self._note(act, WRITE_S)

    def note_when_over(self, act: Act, end: "Future[Any]") -> None:
        """The same of an act that goes on, once `end` has its report. If we stop before, that is what is written."""
        with self._lock:
            self._going[end] = act
        end.add_done_callback(self._over)

    def _over(self, end: "Future[Any]") -> None:
        """Any thread, the owner's too: nothing is waited for."""
        with self._lock:
            act = self._going.pop(end, None)
        if act is None:
            return
        error, now_s = end.exception(), time.time()
        if error is not None:
            text = str(error.args[0] if error.args else error)
            outcome = f"failed: {type(error).__name__}: {text}"[:OUTCOME_LETTERS]
            self._note(replace(act, unix_s=now_s, outcome=outcome), 0.0)
            return
        counted = end.result()
        blocks, size_bytes = int(getattr(counted, "blocks", 0)), int(getattr(counted, "bytes", 0))
        self._note(replace(act, unix_s=now_s, blocks=blocks, bytes=size_bytes, outcome="done"), 0.0)

    def _note(self, act: Act, wait_s: float) -> None:
        with self._lock:
            self._recent.append(act)
        self.heard(act)
        log.info(
            "act: verb=%s uid=%d pid=%d scope=%r blocks=%d bytes=%d outcome=%r",
            act.verb, act.uid, act.pid, act.scope, act.blocks, act.bytes, act.outcome,
        )  # fmt: skip
        if self.path is None:
            return
        written = threading.Event()
        try:
            self._lines.put_nowait((json.dumps(asdict(act)).encode() + b"\n", written))
        except queue.Full:
            self._lose("the disk hangs")
            return
        written.wait(wait_s)

    def note_refused(self, act: Act) -> None:
        """The same of one whom anybody could have sent: so few of these that they never push others out for long."""
        with self._lock:
            now_s = time.monotonic()
            self._refusals = min(REFUSED_AT_ONCE, self._refusals + (now_s - self._refused_s) / REFUSED_EVERY_S)
            self._refused_s = now_s
            if self._refusals < 1:
                self.unheard += 1
                return
            self._refusals -= 1
            unheard, self.unheard = self.unheard, 0
        more = f" (and {unheard} others before it)" if unheard else ""
        self.note(replace(act, outcome=act.outcome[: OUTCOME_LETTERS - 40] + more))

    def recent(self, most: int) -> tuple[Act, ...]:
        """The last acts, the newest at the end."""
        with self._lock:
            return tuple(self._recent)[-most:] if most else ()

    def stop(self, patience_s: float) -> None:
        """Write what waits, for so long at most."""
        end_s = time.monotonic() + patience_s
        with self._lock:
            going, self._going = self._going, {}
        for act in going.values():
            self._note(replace(act, unix_s=time.time(), outcome="unknown: it was going on when the daemon ended"), 0.0)
        with suppress(queue.Full):  # behind all that waits
            self._lines.put(None, timeout=patience_s)
        self._thread.join(max(0.0, end_s - time.monotonic()))

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            text, written = line
            try:
                self._append(text)
            except OSError as error:
                self._lose(str(error))
            written.set()

    def _append(self, line: bytes) -> None:
        """Whole or not at all, as far as anybody reads: half a line is ended by the next one, and left out."""
        assert self.path is not None
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        fd = os.open(self.path, flags, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(f"{self.path} is not a file")
            if os.fstat(fd).st_size + len(line) > FILE_BYTES:
                self._put_aside()
                os.close(fd)
                fd = os.open(self.path, flags, 0o600)
            os.fchmod(fd, 0o600)
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                line = b"\n" + line
            written = os.write(fd, line)
            if written < len(line):
                raise OSError(f"{written} of {len(line)} bytes were written")
        finally:
            os.close(fd)

    def _put_aside(self) -> None:
        assert self.path is not None
        for number in range(FILES - 1, 0, -1):
            older = self.path.with_name(f"{FILE}.{number}")
            newer = self.path if number == 1 else self.path.with_name(f"{FILE}.{number - 1}")
            with suppress(FileNotFoundError):
                newer.replace(older)

    def _lose(self, why: str) -> None:
        self.lost += 1
        log.warning("an act is not in the audit file: %s", why)

    def _read(self) -> Iterator[Act]:
        """What former lives wrote, as far as it can be read, the newest at the end."""
        if self.path is None:
            return
        for path in (self.path.with_name(f"{FILE}.1"), self.path):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
                with os.fdopen(fd, "rb") as file:
                    lines = file.read(FILE_BYTES + LINE_BYTES).splitlines()
            except OSError:
                continue
            for line in lines[-REMEMBERED:]:
                act = _parsed(line)
                if act is not None:
                    yield act


def _parsed(line: bytes) -> Act | None:
    """None for what is no line of ours."""
    try:
        said = json.loads(line)
        return Act(**{one.name: _TYPES[str(one.type)](said[one.name]) for one in fields(Act)})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


_TYPES: Final[Mapping[str, type]] = {"float": float, "int": int, "str": str} | {
    str(kind): kind for kind in (float, int, str)
}


def acts_of(request: pb.ListActsRequest, audit: Audit) -> pb.ListActsResponse:
    """The answer in its form on the wire. Raises ValueError."""
    most = request.most or REMEMBERED
    if most > REMEMBERED:
        raise ValueError(f"at most {REMEMBERED} acts are remembered; {audit.path or 'no file'} has more")
    return pb.ListActsResponse(
        acts=[pb.Act(**named(act)) for act in audit.recent(most)], path=str(audit.path or ""), lost=audit.lost
    )
