"""The vLLM connector's copies where the engine's memory is a GPU's: in what order they and the engine's own work come.

    engine's thread    mark     an event behind all that the engine has asked of its stream so far
    other threads      side     of one copy, once that event has come; the copy has a stream of the client's

A load is marked when it is begun: whoever had its blocks before, or zeroes them, comes first. It is over when its last
byte is there, and the engine asks for nothing that reads it sooner. A save is marked behind the forward of its step,
which comes after all that wrote its blocks. What writes them again is asked for once the gate of that save is closed,
within which whoever copies stays until the bytes are out. The event is waited for outside that gate, and before a
stream or a buffer is taken that others copy by: nobody waits for a forward but who must.

Imported by engines on a GPU alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

from kvclient.devices import Copies, Side, copies_for, stream_of
from kvkernels.device.port import DeviceError, Event
from kvproto.errors import UsageError


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in the engine's stream. Any thread."""

    copies: Copies
    event: Event | None
    trouble: str = ""  # why there is no event

    def side(self) -> Side:
        """Of one copy, which may begin. Waits until the engine's work has come so far. Raises DeviceError."""
        if self.event is None:
            raise DeviceError(self.trouble)
        self.event.wait()
        return Side(self.copies, None)


class EngineStream:
    """The stream that an engine computes on. On its thread."""

    def __init__(self, place: object, current: Callable[[], object]) -> None:
        """`place`: what a tensor's `device` is; `current`: gives that stream, as `devices.stream_of` takes it.

        Raises UsageError for a device that there is no port for.
        """
        self._copies = copies_for(place)
        self._current = current

    def mark(self) -> Mark:
        """Here. Never raises: on a device that has failed, whatever was to come behind it is not copied."""
        try:
            return Mark(self._copies, stream_of(self._copies.device, self._current()).record())
        except (DeviceError, UsageError) as error:
            return Mark(self._copies, None, f"the engine's stream could not be marked: {error}")
