"""The far sides' own clients, each in a process of its own: what the remote tier is compared with.

`python remote_peer.py mooncake MASTER`, run by Mooncake's interpreter, or `python remote_peer.py s3 ENDPOINT BUCKET`.
For each line of input, the names of objects and their bytes as JSON, prints the seconds of reading all of them. Imports
nothing of ours.
"""

import ctypes
import importlib
import itertools
import json
import mmap
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

CONNECTIONS = 8  # as the daemon has
RANGE_BYTES = 8 << 20

Objects = list[tuple[str, int]]  # names and bytes
Read = Callable[[Objects], float]


def mooncake(master: str) -> Read:
    """One batched get into registered memory."""
    store = importlib.import_module("mooncake.store").MooncakeDistributedStore()
    code = store.setup(
        {
            "local_hostname": "127.0.0.1", "metadata_server": "P2PHANDSHAKE", "protocol": "tcp", "rdma_devices": "",
            "global_segment_size": "0", "local_buffer_size": "0", "master_server_addr": master,
        }
    )  # fmt: skip
    assert code == 0, f"setup: {code}"
    memory: dict[int, tuple[mmap.mmap, int]] = {}

    def read(objects: Objects) -> float:
        names, sizes = [name for name, _ in objects], [size for _, size in objects]
        total = sum(sizes)
        if total not in memory:
            buffer = mmap.mmap(-1, total)
            base = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
            ctypes.memset(base, 1, total)
            assert store.register_buffer(base, total) == 0
            memory[total] = buffer, base
        ends = list(itertools.accumulate(sizes))
        addresses = [memory[total][1] + end - size for end, size in zip(ends, sizes, strict=True)]
        begun = time.perf_counter()
        lengths = store.batch_get_into(names, addresses, sizes)
        seconds = time.perf_counter() - begun
        assert lengths == sizes, f"not all came: {set(lengths)}"
        return seconds

    return read


def s3(endpoint: str, bucket: str) -> Read:
    """Ranges of 8 MiB by as many threads as there are connections."""
    obstore: Any = importlib.import_module("obstore")
    store = importlib.import_module("obstore.store").S3Store(
        bucket, config={"endpoint": endpoint}, client_options={"allow_http": True}
    )
    threads = ThreadPoolExecutor(CONNECTIONS)

    def read(objects: Objects) -> float:
        ranges = [
            (name, at, min(at + RANGE_BYTES, size)) for name, size in objects for at in range(0, size, RANGE_BYTES)
        ]
        begun = time.perf_counter()
        parts = threads.map(lambda one: len(obstore.get_range(store, one[0], start=one[1], end=one[2])), ranges)
        assert sum(parts) == sum(size for _, size in objects)
        return time.perf_counter() - begun

    return read


def main() -> None:
    """Until the input ends."""
    read = mooncake(sys.argv[2]) if sys.argv[1] == "mooncake" else s3(*sys.argv[2:])
    for line in sys.stdin:
        print(f"seconds {read(json.loads(line))}", flush=True)


if __name__ == "__main__":
    main()
