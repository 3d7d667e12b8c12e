"""Events of an engine's streams that swaps wait for, asked in a thread of their own.

A driver that is busy, as one that registers memory is, answers late whether an event has passed. So nobody asks it
under the swapper's lock, which `tick` and `swap_*` take on the engine's thread, and no line of swaps waits for it.
"""

import logging
import threading
import time
from queue import SimpleQueue
from typing import Final

from kvclient.results import Reason
from kvclient.swap_lines import NAP_S, STOP_S
from kvclient.swaps import Swap
from kvkernels.device.port import DeviceError

_log: Final = logging.getLogger(__name__)


class Events:
    """One swapper's. `changed` guards its swaps, and is told of each that need not wait any more."""

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._came: SimpleQueue[Swap | None] = SimpleQueue()  # None: end
        self._thread: threading.Thread | None = None

    def put(self, swap: Swap) -> None:
        """One more; locked."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kvclient-swap-events", daemon=True)
            self._thread.start()
        self._came.put(swap)

    def stop(self) -> None:
        """Wait for the thread; one that hangs is left. Nothing is put any more."""
        if self._thread is not None:
            self._came.put(None)
            self._thread.join(STOP_S)

    def _run(self) -> None:
        waiting: list[Swap] = []
        while True:
            if waiting:
                time.sleep(NAP_S)
            while not waiting or not self._came.empty():
                came = self._came.get()
                if came is None:
                    return
                waiting.append(came)
            waiting = [swap for swap in waiting if self._waits(swap)]

    def _waits(self, swap: Swap) -> bool:
        """Does it go on waiting? Asks the driver."""
        after = swap.after
        if after is None or swap.why is not None:
            return False
        why: Reason | None = None
        try:
            if not after.done:
                return True
        except DeviceError:
            why = Reason.DEVICE
        except Exception:  # noqa: BLE001  whatever it was, nobody may wait for ever
            _log.exception("an event could not be asked")
            why = Reason.UNREACHABLE
        with self._changed:
            swap.after = None
            if why is not None:
                swap.end(why)
            self._changed.notify_all()
        return False
