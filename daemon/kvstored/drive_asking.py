"""Questions about folders whose drives may hang: asked of all at once, each on a thread of its own, with a limit.

    stat, listing, holding    -> whoever answers within the limit has answered
    none of them              -> silent: a drive whose controller resets, or a file server that is gone

A call to such a drive never returns while it hangs, and no signal ends it. So the thread is left behind, and the folder
is not asked again before it has come back.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Final, TypeVar

Answer = TypeVar("Answer")

ANSWER_S: Final = 5.0  # as long as `drive_health.HUNG_NS`: a disk that spins up may take longer, and heals then
SILENT: Final = f"it did not answer within {ANSWER_S:g} s"

_asked: set[Path] = set()  # folders with a question that has no answer yet: of this process, as its threads are


def ask_each(
    folders: Iterable[Path], question: Callable[[Path], Answer], answer_s: float | None = None
) -> dict[Path, "Future[Answer]"]:
    """Answers by folder; those that are not `done()` are silent. All have `answer_s` together (None: `ANSWER_S`). One
    that comes later is still set: give it a callback if something has to be let go then. One thread at a time.
    """
    answers: dict[Path, Future[Answer]] = {folder: Future() for folder in folders}
    fresh = answers.keys() - _asked
    for folder in fresh:
        _asked.add(folder)
        words = (folder, question, answers[folder])
        threading.Thread(target=_ask, args=words, name=f"ask {folder}", daemon=True).start()
    wait([answers[folder] for folder in fresh], ANSWER_S if answer_s is None else answer_s)
    return answers


def _ask(folder: Path, question: Callable[[Path], Answer], answer: "Future[Answer]") -> None:
    try:
        said = question(folder)
    except BaseException as error:  # noqa: BLE001  whoever asked has it raised
        _asked.discard(folder)
        answer.set_exception(error)
    else:
        _asked.discard(folder)
        answer.set_result(said)
