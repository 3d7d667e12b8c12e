"""Questions about folders whose drives may hang: asked of all at once, each on a thread of its own, with a limit.

    stat, listing, holding    -> whoever answers within the limit has answered
    not yet                   -> the log says who, and for how long
    not within the limit      -> silent: a drive whose controller resets, or a file server that is gone

A call to such a drive never returns while it hangs, and no signal ends it. So the thread is left behind, and the folder
is not asked again before it has come back: who asks meanwhile waits for what is left of the limit, and then no more.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

Answer = TypeVar("Answer")

log = logging.getLogger(__name__)

# Disks spin up, RAIDs assemble, and automounts replay a journal in tens of seconds, and a directory left out for that
# is missed for a whole life, less what its tenants delete. It is short against the unit's TimeoutStartSec, 10 min.
PATIENCE_S: Final = 60.0
SLOW_S: Final = 5.0  # from then on the log says who has not answered
REPEAT_S: Final = 15.0  # and says it again

_limit_s: ContextVar[float] = ContextVar("limit_s", default=math.inf)


@dataclass(slots=True)
class _Question:
    """One that has no answer yet. Times are of `time.monotonic`."""

    over: "Future[None]" = field(default_factory=Future)  # set once its thread is back, and another may be asked
    since_s: float = field(default_factory=time.monotonic)
    said_after_s: float = field(default_factory=lambda: SLOW_S)  # counted from `since_s`: then the log names the folder

    def is_awaited(self, now_s: float) -> bool:
        return not self.over.done() and now_s < self.since_s + patience_s()

    def next_s(self) -> float:
        """When whoever waits has to look again."""
        return self.since_s + min(patience_s(), self.said_after_s)

    def say(self, folder: Path, now_s: float) -> None:
        """Name the folder in the log, if it is time to."""
        if now_s >= self.since_s + self.said_after_s:
            waited = f"{now_s - self.since_s:.0f} s of at most {patience_s():g} s"
            log.warning("directory=%s does not answer yet: %s have passed", folder, waited)
            while self.since_s + self.said_after_s <= now_s:
                self.said_after_s += REPEAT_S


_asked: dict[Path, _Question] = {}  # by folder; of this process, as its threads are


def patience_s() -> float:
    """For how long a question is waited for."""
    return min(PATIENCE_S, _limit_s.get())


def silent() -> str:
    """What is wrong with a folder that is silent."""
    return f"it did not answer within {patience_s():g} s"


@contextmanager
def patience_of_at_most(limit_s: float) -> Iterator[None]:
    """Whatever this thread asks meanwhile has `limit_s` seconds, if that is less: somebody sits there and waits."""
    token = _limit_s.set(limit_s)
    try:
        yield
    finally:
        _limit_s.reset(token)


def ask_each(folders: Iterable[Path], question: Callable[[Path], Answer]) -> dict[Path, "Future[Answer]"]:
    """Answers by folder; those that are not `done()` are silent, having said nothing for `patience_s()`, since now or
    since a question before this one. An answer that comes later is still set: give it a callback if something has to be
    let go then. One thread at a time.
    """
    answers: dict[Path, Future[Answer]] = {folder: Future() for folder in folders}
    unasked = dict(answers)
    awaited = {folder: _asked[folder] for folder in answers if folder in _asked}
    while True:
        for folder in [folder for folder in unasked if folder not in _asked]:
            awaited[folder] = _start(folder, question, unasked.pop(folder))
        if any(asked.over.done() for folder, asked in awaited.items() if folder in unasked):
            continue  # a question before this one was answered just now
        now_s = time.monotonic()
        awaited = {folder: asked for folder, asked in awaited.items() if asked.is_awaited(now_s)}
        if not awaited:
            return answers
        for folder, asked in awaited.items():
            asked.say(folder, now_s)
        again_s = min(asked.next_s() for asked in awaited.values())
        wait([asked.over for asked in awaited.values()], again_s - now_s, FIRST_COMPLETED)


def _start(folder: Path, question: Callable[[Path], Answer], answer: "Future[Answer]") -> _Question:
    asked = _asked[folder] = _Question()
    words = (folder, question, answer, asked.over)
    threading.Thread(target=_ask, args=words, name=f"ask {folder}", daemon=True).start()
    return asked


def _ask(folder: Path, question: Callable[[Path], Answer], answer: "Future[Answer]", over: "Future[None]") -> None:
    try:
        said = question(folder)
    except BaseException as error:  # noqa: BLE001  whoever asked has it raised
        answer.set_exception(error)
    else:
        answer.set_result(said)
    del _asked[folder]
    over.set_result(None)
