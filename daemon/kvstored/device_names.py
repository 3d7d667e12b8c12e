"""Which GPUs a configuration names, in words. Light: nothing of a GPU is loaded to read a configuration.

gpu.devices = "cuda:0, cuda:1"      two GPUs, by the driver's numbers
gpu.devices = "emulation"           one in host memory, for tests; it is no GPU, and every status says so
"""

import re
from typing import Final, NamedTuple

from kvproto.sizes import quoted
from kvstored.units import Kind

NO_DEVICES: Final = "none"
DEVICES_MAX: Final = 16
_NAME: Final = re.compile(r"(cuda|emulation)(?::([0-9]{1,2}))?")


class DeviceName(NamedTuple):
    """One of them."""

    kind: str  # cuda or emulation
    number: int


def devices_of(text: str) -> tuple[DeviceName, ...]:
    """Those that a text names, in its order. Raises ValueError."""
    if text.strip() in ("", NO_DEVICES):
        return ()
    names: list[DeviceName] = []
    for part in text.split(","):
        found = _NAME.fullmatch(part.strip())
        if found is None:
            raise ValueError(f"{quoted(part.strip())} is no device; such as cuda:0, or emulation")
        name = DeviceName(found[1], int(found[2] or 0))
        if name in names:
            raise ValueError(f"{quoted(part.strip())} is listed twice")
        names.append(name)
    if len(names) > DEVICES_MAX:
        raise ValueError(f"{len(names)} devices are more than {DEVICES_MAX}")
    return tuple(names)


def devices_kind() -> Kind[str]:
    """Devices, with commas between them, or none."""

    def parse(text: str) -> str:
        return ",".join(f"{name.kind}:{name.number}" for name in devices_of(text)) or NO_DEVICES

    return Kind(parse, str, (str,), 'devices, such as "cuda:0,cuda:1"', f"at most {DEVICES_MAX}, or {NO_DEVICES}")
