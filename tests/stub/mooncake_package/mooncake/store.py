"""A stand-in for Mooncake's package where that is not installed: objects are files, and names say what goes wrong.

With it the daemon's side, the child and all between them run as they are. What Mooncake itself does is tested with the
real one (`make engines test-engines`).
"""

import ctypes
import os
import threading
import time
from pathlib import Path
from typing import Any

NOT_FOUND, INVALID, FAILED = -704, -600, -800
LATE = "LATE"  # a file of this name: what is read is written to again after it was said to be there
LATE_AFTER_S, LATE_FOR_S = 0.003, 0.05


class MooncakeDistributedStore:
    """As much of it as the child uses. The master's address is a folder's path behind a colon."""

    def setup(self, config: dict[str, Any]) -> int:
        """0, or what the folder's name asks for."""
        self._folder = Path(os.environ["MOONCAKE_STUB"])
        assert config["global_segment_size"] == "0"
        return int(os.environ.get("MOONCAKE_STUB_SETUP", "0"))

    def _path(self, name: str) -> Path:
        return self._folder / name.replace("/", "%")

    def batch_get_into(self, names: list[str], addresses: list[int], rooms: list[int]) -> list[int]:
        """Misbehaves as a name in the batch says."""
        lengths = []
        for name, address, room in zip(names, addresses, rooms, strict=True):
            if "dies" in name:
                os._exit(3)
            if "hangs" in name:
                time.sleep(60)
            if "raises" in name:
                raise RuntimeError("of some kind")
            if "fails" in name:
                lengths.append(FAILED)
                continue
            if "lies" in name:
                lengths.append(room + 1)
                continue
            path = self._path(name)
            content = path.read_bytes() if path.exists() else None
            if content is None or len(content) > room:
                lengths.append(NOT_FOUND if content is None else INVALID)
                continue
            ctypes.memmove(address, content, len(content))
            lengths.append(len(content))
        if (self._folder / LATE).exists():
            threading.Timer(LATE_AFTER_S, _write_late, (addresses, lengths)).start()
        return lengths

    def get_size(self, name: str) -> int:
        """Bytes of an object."""
        return self._path(name).stat().st_size if self._path(name).exists() else NOT_FOUND

    def is_exist(self, name: str) -> int:
        """1 or 0."""
        return int(self._path(name).exists())

    def batch_is_exist(self, names: list[str]) -> list[int]:
        """Of each."""
        return [-900 if "unanswered" in name else self.is_exist(name) for name in names]

    def put_from(self, name: str, address: int, size: int) -> int:
        """Full if the name says so."""
        if "full" in name:
            return -200
        self._path(name).write_bytes(ctypes.string_at(address, size))
        return 0

    def batch_remove(self, names: list[str], force: bool) -> list[int]:
        """0 or NOT_FOUND."""
        assert force
        codes = [0 if self._path(name).exists() else NOT_FOUND for name in names]
        for name in names:
            self._path(name).unlink(missing_ok=True)
        return codes


def _write_late(addresses: list[int], lengths: list[int]) -> None:
    """A transfer that goes on after it was over: the last byte of each object, again and again."""
    until = time.monotonic() + LATE_FOR_S
    while time.monotonic() < until:
        for address, length in zip(addresses, lengths, strict=True):
            if length > 0:
                ctypes.memset(address + length - 1, 0xEE, 1)
        time.sleep(0.0002)
