"""Tensors on a GPU, for `store` and `copy_to`: where their blocks lie, and who copies them.

Imported when the first such tensor is seen; an engine on CPU never does. A tensor is taken by what it can do: torch's
on `cuda`, or one whose `device` has a `port` (the emulation, in tests). One `Copies` a device serves the whole process:
two streams of its own, a pinned buffer, and registrations of the daemon's memory, made in the background.

    fetch   arena -> [pinned buffer, unless the device reaches the arena by itself] -> tensor
    store   tensor -> ring (registered, or by way of the buffer)
"""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvclient.buffers import Scattered
from kvclient.copying import Move
from kvkernels.device.engines import Engines, kept, load_or_measure
from kvkernels.device.pages import Pages
from kvkernels.device.pinning import Copier, Pins, State
from kvkernels.device.port import Device, DeviceError, Direction, Event, Stream
from kvkernels.device.tables import Tables
from kvproto.errors import UsageError

if TYPE_CHECKING:
    from kvclient.buffers import Memory
    from kvclient.codecs import Codec
    from kvclient.codecs_device import Coding
    from kvclient.mapping import Mapping, Place

SWEEP_S: Final = 0.5
_log = logging.getLogger(__name__)


class Copies:
    """Copies between this process's maps of the daemon's memory and one device. Any thread.

    `calibrate`: measure which engine is best, in the background, unless that was kept in `folder`.
    """

    def __init__(self, device: Device, folder: Path | None = None, *, calibrate: bool = False) -> None:
        self.device = device
        self._tables = Tables(device)
        self.engines = Engines(device, self._tables)
        self.pins = Pins(device)
        self.copier = Copier(device, self.engines, self.pins)
        self._streams = {each: device.stream() for each in (Direction.TO_DEVICE, Direction.TO_HOST)}
        self._locks = {each: threading.Lock() for each in Direction}
        self._coding: Coding | None = None
        self._sweeping = False
        self._closing = threading.Event()
        found = kept(device, folder)
        if found is not None:
            self.engines.crossover = found
        elif calibrate:
            threading.Thread(target=self._calibrate, args=(folder,), name="kvclient-calibrate", daemon=True).start()

    def copy(
        self, direction: Direction, moves: Sequence[Move], maps: "Sequence[Mapping]", after: Event | None
    ) -> Event:
        """Begin; the event comes when all is there. Raises DeviceError."""
        self._want(maps)
        stream = self._streams[direction]
        with self._locks[direction]:
            if after is not None:
                stream.wait(after)
            if direction is Direction.TO_DEVICE:
                return self.copier.to_device(stream, moves)
            return self.copier.to_host(stream, moves)

    def settle(self, direction: Direction) -> None:
        """Return when nothing that was begun this way still runs. Never raises: a device that is gone does nothing."""
        with self._locks[direction], suppress(DeviceError):
            self._streams[direction].synchronize()

    def coding(self, maps: "Sequence[Mapping]") -> "Coding":
        """What encodes and decodes there, out of these maps or into them. Raises DeviceError."""
        from kvclient.codecs_device import Coding  # noqa: PLC0415  raw namespaces never need it

        self._want(maps)
        with self._locks[Direction.ON_DEVICE]:
            if self._coding is None:
                self._coding = Coding(self.device, self._tables, self.engines, self.copier)
            return self._coding

    def close(self) -> None:
        """Wait for what is under way, and let go of everything."""
        self._closing.set()
        if self._coding is not None:
            self._coding.close()
        for stream in self._streams.values():
            stream.close()
        self.copier.close()
        self.pins.close()
        self._tables.close()

    def _want(self, maps: "Sequence[Mapping]") -> None:
        """Have these registered by the time that they are copied again."""
        for mapping in dict.fromkeys(maps):
            if mapping.gone:
                continue
            state = self.pins.want(mapping.address, mapping.bytes, mapping, read_only=not mapping.writable)
            if state is not State.REFUSED and not self._sweeping:
                self._sweeping = True
                threading.Thread(target=self._sweep_forever, name="kvclient-sweep", daemon=True).start()

    def sweep(self) -> None:
        """Let go of what the daemon took back: it stays mapped, and the daemon's memory in use, until then."""
        if not any(_is_gone(mapping) for mapping in self.pins.owners()):
            return
        with self._locks[Direction.ON_DEVICE], ExitStack() as still:
            if self._coding is not None:  # first: it may take long, and holds up nobody else so
                still.enter_context(self._coding.still())
            for direction in self._streams:
                still.enter_context(self._locks[direction])
            for stream in self._streams.values():  # a copy that came too late may still be reading it
                stream.synchronize()
            self.pins.forget_if(_is_gone)

    def _sweep_forever(self) -> None:
        while not self._closing.wait(SWEEP_S):
            try:
                self.sweep()
            except DeviceError:  # it is gone for good, and its registrations with it
                return

    def _calibrate(self, folder: Path | None) -> None:
        try:
            self.engines.crossover = load_or_measure(self.device, self._tables, folder)
        except DeviceError as error:
            _log.warning("which way to copy is best could not be measured: %s", error)


def _is_gone(mapping: Any) -> bool:
    return bool(mapping.gone)


class Side:
    """The device's side of one `store` or `copy_to`: what `buffers.Memory.device` is. One thread at a time.

    What is copied into the device is under way when `fill` returns, and there when `finish` does; what is copied out
    of it is there when `drain` returns.
    """

    def __init__(self, copies: Copies, after: Event | None) -> None:
        self.copies = copies
        self._after = after  # of the caller's stream: what the tensors hold is there, or no more in use
        self._events: list[Event] = []
        self._begun = threading.Event()  # everything is in the stream
        self._failed = False

    def fill(self, moves: Sequence[Move], maps: "Sequence[Mapping]") -> None:
        """Host to device. The maps are kept until `finish`."""
        try:
            self._events.append(self.copies.copy(Direction.TO_DEVICE, moves, maps, self._after))
        except DeviceError as error:
            self._fail(error)

    def drain(self, moves: Sequence[Move], maps: "Sequence[Mapping]") -> None:
        """Device to host. Raises DeviceError."""
        try:
            self.copies.copy(Direction.TO_HOST, moves, maps, self._after).wait()
        except BaseException:  # nothing may be written there any more once this has returned
            self.copies.settle(Direction.TO_HOST)
            raise

    def encode(
        self, codec: "Codec", memory: "Memory", indices: Sequence[int], targets: Sequence[int],
        maps: "Sequence[Mapping]",
    ) -> int:  # fmt: skip
        """See `codecs_device.Coding`. Raises DeviceError."""
        return self.copies.coding(maps).encode(codec, memory, indices, targets, self._after)

    def decode(self, codec: "Codec", memory: "Memory", first: int, places: "Sequence[Place]") -> bool:
        """See `codecs_device.Coding`; a device that fails fills nothing, and `finish` says so."""
        try:
            coding = self.copies.coding([mapping for mapping, _ in places])
            return coding.decode(codec, memory, first, places, self._after)
        except DeviceError as error:
            self._fail(error)
            return True

    def finish(self) -> bool:
        """Wait for all that was begun; whether it is there. Nothing arrives any more once this has returned."""
        self._begun.set()
        for event in self._events:
            try:
                event.wait()
            except DeviceError as error:
                self._fail(error)
        if self._failed:  # a copy that was refused half way has no event, and its first part may be in the stream
            self.copies.settle(Direction.TO_DEVICE)
        return not self._failed

    def order(self, stream: Stream) -> None:
        """Have another stream of the device wait for what was begun; waits itself until all of it was."""
        self._begun.wait()
        for event in self._events[-1:]:
            stream.wait(event)

    def _fail(self, error: DeviceError) -> None:
        self._failed = True
        _log.warning("a copy to %s failed: %s", self.copies.device.properties.name, error)


class DeviceCopy:
    """A copy under way, made by `Lease.start_copy`. Any thread."""

    def __init__(self, side: Side, work: Callable[[], bool]) -> None:
        self._side = side
        self._over = threading.Event()
        self._filled = False
        threading.Thread(target=self._run, args=(work,), name="kvclient-copy", daemon=True).start()

    @property
    def done(self) -> bool:
        """Is it over? Never waits."""
        return self._over.is_set()

    def result(self, timeout_s: float | None = None) -> bool:
        """As `Lease.copy_to` answers; waits for it, at most so long. False too if it is not over by then: a miss."""
        return self._over.wait(timeout_s) and self._filled

    def order(self, stream: object) -> None:
        """Have a stream of the engine's wait for the bytes; waits itself until the copies are in theirs.

        What is computed behind it is only good if `result` turns out to be True.
        """
        self._side.order(stream_of(self._side.copies.device, stream))

    def _run(self, work: Callable[[], bool]) -> None:
        try:
            self._filled = work()
        finally:
            self._side.finish()
            self._over.set()


class Uses:
    """How many copies read a lease's blocks right now, and what is to be done when none does. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._then: Callable[[], None] | None = None

    def begin(self) -> None:
        """One more."""
        with self._lock:
            self._count += 1

    def end(self) -> None:
        """One less."""
        with self._lock:
            self._count -= 1
            then, self._then = (None, self._then) if self._count else (self._then, None)
        if then is not None:
            then()

    def after(self, then: Callable[[], None]) -> None:
        """At once, or when the last one ends."""
        with self._lock:
            if self._count:
                self._then = then
                return
        then()


def paged_blocks(place: Any, pages: Pages, ids: Sequence[int], stream: object = None) -> Scattered:
    """These pages of an engine's memory, for one `store` or `copy_to`: pieces go straight from and to where they lie.

    `place`: what a tensor's `device` is; `stream` as there. Raises UsageError for pages that there are not.
    """
    side = side_of(place, stream)
    try:
        numbers = pages.ids(ids).tolist()
    except DeviceError as error:
        raise UsageError(str(error)) from error
    pieces = list(zip(pages.bases, pages.strides, strict=True))
    addresses = [[base + number * stride for base, stride in pieces] for number in numbers]
    return Scattered(addresses, (pages.piece_bytes,) * len(pieces), pages.owner, device=side)


# -- whose memory it is ------------------------------------------------------------------------------------------------

_lock: Final = threading.Lock()
_by_gpu: Final[dict[int, Copies]] = {}
_by_port: Final[dict[int, Copies]] = {}  # by id: whoever made the port ends it with `forget`


def copies_for(place: Any) -> Copies:
    """For the device that a tensor's `device` names. Raises UsageError for one that there is no port for."""
    port: Device | None = getattr(place, "port", None)
    with _lock:
        if port is not None:
            found = _by_port.get(id(port))
            if found is None:
                found = _by_port[id(port)] = Copies(port)
            return found
        if place.type != "cuda":
            raise UsageError(f"a tensor on {place}; only memory of the CPU and of CUDA devices can be copied")
        number = place.index or 0
        if number not in _by_gpu:
            from kvkernels.device.cuda import Cuda  # noqa: PLC0415  # only where there is such a tensor

            try:
                _by_gpu[number] = Copies(Cuda(number), _folder(), calibrate=True)
            except DeviceError as error:
                raise UsageError(f"a tensor on {place}, which cannot be reached: {error}") from error
        return _by_gpu[number]


def port_of(place: Any) -> Device:
    """What `pages_of` takes, for the device that a tensor's `device` names (torch's `cuda:0`). Any thread.

    One a device serves the whole process. Raises UsageError for a device that there is no port for.
    """
    return copies_for(place).device


def forget(device: Device) -> None:
    """Close what was made for it, before it is closed itself. Nothing may be copied any more."""
    with _lock:
        known = [key for key, each in _by_port.items() if each.device is device]
        found = [_by_port.pop(key) for key in known]
    for copies in found:
        copies.close()


def _folder() -> Path | None:
    """Where calibrations are kept."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home) / "kvstored"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a user that nobody knows has no home
        return None
    return folder


def side_of(place: Any, stream: object) -> Side:
    """For one call. `stream`: of the caller's, whose work so far comes first."""
    copies = copies_for(place)
    if stream is None:
        return Side(copies, None)
    try:
        return Side(copies, stream_of(copies.device, stream).record())
    except DeviceError as error:
        raise UsageError(f"a stream that cannot be waited for: {error}") from error


def stream_of(device: Device, stream: object) -> Stream:
    """One of torch's, a number as the driver has it, or one of the port's own. Raises UsageError."""
    handle = getattr(stream, "cuda_stream", getattr(stream, "handle", stream))
    if isinstance(handle, bool) or not isinstance(handle, int):
        raise UsageError(f"a stream is torch's, the port's or a number, not {type(stream).__name__}")
    return device.adopt(handle)


def address_of(side: Side, tensor: Any, block_bytes: int) -> int:
    """Of exactly so many bytes on this device. Raises UsageError."""
    length = tensor.numel() * tensor.element_size()
    if length != block_bytes:
        raise UsageError(f"{length} bytes where exactly {block_bytes} belong")
    if not tensor.is_contiguous():
        raise UsageError("not C-contiguous")
    if tensor.is_neg() or tensor.is_conj():
        raise UsageError("a lazily negated or conjugated tensor: its bytes are not its values (resolve it first)")
    address = int(tensor.data_ptr())
    try:
        side.copies.device.check(address, length)
    except DeviceError as error:
        raise UsageError(f"a tensor on {tensor.device}: {error}") from error
    return address
