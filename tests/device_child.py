"""Another process that opens memory: `python -m tests.device_child KIND VIA LENGTH OFFSET WHOLE TEXT FD END`.

KIND is `emulation` or a GPU's number. Prints the sum of the bytes that it finds, and leaves every one of them plus 1;
where END is `dies`, with the memory still open.
"""

import os
import signal
import sys

import numpy as np

from kvkernels.aligned import aligned
from kvkernels.device.cuda import Cuda
from kvkernels.device.emulation import Emulation
from kvkernels.device.port import Device, Direction, Handle, Via


def main() -> None:
    """See above."""
    kind, via, length, offset, whole, text, fd, end = sys.argv[1:]
    device: Device = Emulation() if kind == "emulation" else Cuda(int(kind))
    identity = device.properties.identity
    handle = Handle(Via(via), identity, int(length), int(offset), int(whole), bytes.fromhex(text), int(fd))
    opened = device.open(handle)
    host = aligned(int(length))
    registration = device.register(int(host.ctypes.data), host.size)
    stream = device.stream()
    stream.copy(Direction.TO_HOST, [(registration.address, opened.address, opened.length)])
    stream.synchronize()
    seen = host[: opened.length]
    print(int(seen.sum(dtype=np.int64)), flush=True)
    seen += 1
    stream.copy(Direction.TO_DEVICE, [(opened.address, registration.address, opened.length)])
    stream.close()
    if end == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    device.free(opened)


if __name__ == "__main__":
    main()
