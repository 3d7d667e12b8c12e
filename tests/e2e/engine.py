"""An engine of the day: runs in the installed prefix, knows nothing of this checkout, and is told what to do by lines.

{"do": "store", "name": "a", "chains": 4, "flush_s": 30}  ->  {"accepted": 32, "known": 0, "refused": {}, ...}
{"do": "fetch", "name": "a", "chains": 4}                 ->  {"asked": 32, "hit": 32, "disk": 0, "wrong": 0}
{"do": "talk"}: it stores and fetches from now on, and compares every byte
{"do": "hush"}    ->  {"calls": 812, "hits": 3100, "misses": 4, "wrong": 0, "raised": 0, "longest_s": 0.02, ...}
{"do": "weight"}    ->  {"heavy": []}: what it has imported that an engine should not have to
"""

import hashlib
import json
import sys
import threading
import time
from collections import Counter
from typing import Any

import numpy as np

import kvclient

BLOCK_BYTES = 64 << 10
CHAIN = 8  # blocks of a chain
TALKS = 24  # conversations that go on side by side
TIMEOUT_S = 2.0
TOLD_S = 20.0
HEAVY = {"torch", "numba", "grpc", "lmdb", "cupy", "kvstore", "kvstored", "llvmlite", "typer", "google"}
NOISE = np.random.default_rng(1).integers(0, 256, BLOCK_BYTES + (1 << 20), dtype=np.uint8)


def chain(name: str, number: int) -> list[bytes]:
    """Keys of one chain."""
    return [hashlib.sha256(f"{name}/{number}/{index}".encode()).digest() for index in range(CHAIN)]


def value(key: bytes) -> Any:
    """The bytes that belong to a key."""
    start = int.from_bytes(key[:4], "little") % (1 << 20)
    block = NOISE[start : start + BLOCK_BYTES].copy()
    block.reshape(-1, 4096)[:, :32] = np.frombuffer(key, dtype=np.uint8)
    return block


class Engine:
    """One of them. Its own thread talks, the main one does what it is told."""

    def __init__(self, runtime_dir: str, tenant: str) -> None:
        self.client, self.ns = self._connected(runtime_dir, tenant, TIMEOUT_S)
        # What is told, and counted, has more patience: a host that stands still for a moment has lost nothing.
        self.patient, self.told = self._connected(runtime_dir, tenant, TOLD_S)
        self.tenant = tenant
        self.talking = threading.Event()
        self.counts: Counter[str] = Counter()
        self.longest_s = 0.0
        self.thread: threading.Thread | None = None

    def _connected(self, runtime_dir: str, tenant: str, timeout_s: float) -> tuple[kvclient.Client, kvclient.Namespace]:
        client = kvclient.connect(runtime_dir, name=f"day-{tenant}", tenant=tenant, timeout_s=timeout_s)
        assert client.wait_connected(30), client.status
        return client, client.namespace(model="m", engine="day", layout="flat", dtype="uint8", block_bytes=BLOCK_BYTES)

    def store(self, name: str, chains: int, flush_s: float = 0.0) -> dict[str, Any]:
        """Chains of a set."""
        assert self.patient.wait_connected(30), self.patient.status
        total: Counter[str] = Counter()
        refused: Counter[str] = Counter()
        if flush_s:
            self.told.flush(flush_s)  # the next one speaks of these chains alone
        for number in range(chains):
            keys = chain(name, number)
            result = self.told.store(keys, [value(key) for key in keys], wait=True, space_s=TOLD_S)
            total.update(accepted=result.accepted, known=result.known)
            refused.update({str(reason): count for reason, count in result.reasons.items()})
        if flush_s:
            flushed = self.told.flush(flush_s)
            total.update(durable=flushed.durable, failed=flushed.failed + flushed.evicted)
        return {**total, "refused": dict(refused)}

    def fetch(self, name: str, chains: int, wait_s: float = 10.0) -> dict[str, Any]:
        """Chains of a set, and every byte of theirs."""
        assert self.patient.wait_connected(30), self.patient.status
        total: Counter[str] = Counter(asked=0, hit=0, disk=0, wrong=0)
        for number in range(chains):
            hit, disk, wrong = self._fetch(self.told, chain(name, number), wait_s)
            total.update(asked=CHAIN, hit=hit, disk=disk, wrong=wrong)
        return dict(total)

    def talk(self) -> dict[str, Any]:
        """From now on."""
        self.counts.clear()
        self.longest_s = 0.0
        self.talking.set()
        self.thread = threading.Thread(target=self._talk, daemon=True)
        self.thread.start()
        return {}

    def hush(self) -> dict[str, Any]:
        """No more; what became of it."""
        self.talking.clear()
        assert self.thread is not None
        self.thread.join(30)
        assert not self.thread.is_alive(), "a call hangs"
        names = ("calls", "hits", "misses", "wrong", "raised", "stored", "refused")
        return {name: self.counts[name] for name in names} | {"longest_s": self.longest_s}

    def weight(self) -> dict[str, Any]:
        """What this process has imported that it should not need."""
        return {"heavy": sorted(HEAVY & set(sys.modules)), "from": kvclient.__file__}

    def _talk(self) -> None:
        turn = 0
        while self.talking.is_set():
            keys = chain(f"talk-{self.tenant}", turn % TALKS)
            try:
                self._timed(lambda: self._turn(keys))  # noqa: B023  called at once
            except Exception as error:  # noqa: BLE001  an engine must never see one
                self.counts["raised"] += 1
                print(repr(error), file=sys.stderr)
            turn += 1
            time.sleep(0.002)

    def _turn(self, keys: list[bytes]) -> None:
        hit, _, wrong = self._fetch(self.ns, keys, 0.2)
        self.counts.update(calls=1, hits=hit, misses=len(keys) - hit, wrong=wrong)
        if hit < len(keys):
            parent = keys[hit - 1] if hit else None
            result = self.ns.store(keys[hit:], [value(key) for key in keys[hit:]], parent=parent, space_s=0.2)
            self.counts.update(calls=1, stored=result.accepted, refused=len(result.refused))

    def _fetch(self, ns: kvclient.Namespace, keys: list[bytes], wait_s: float) -> tuple[int, int, int]:
        targets = np.zeros((len(keys), BLOCK_BYTES), dtype=np.uint8)
        with ns.fetch(keys, wait_s=wait_s, ttl_s=TOLD_S) as lease:
            whole = lease.expected == 0 or lease.copy_to(targets[: lease.expected])
            good = lease.expected if whole else lease.blocks if lease.valid() else 0
            disk = lease.tiers.disk
        equal = sum(np.array_equal(targets[index], value(key)) for index, key in enumerate(keys[:good]))
        others = sum(np.array_equal(targets[index], value(key[::-1])) for index, key in enumerate(keys[:good]))
        assert not others, "the control is equal as well"
        return good, disk, good - equal

    def _timed(self, work: Any) -> None:
        begun_s = time.monotonic()
        work()
        self.longest_s = max(self.longest_s, time.monotonic() - begun_s)


def main() -> None:
    """Do what lines say, until there are no more."""
    engine = Engine(*sys.argv[1:3])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(getattr(engine, order.pop("do"))(**order)), flush=True)
    engine.client.close()
    engine.patient.close()


if __name__ == "__main__":
    main()
