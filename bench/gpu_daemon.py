"""Figures of `bench gpu` for what the daemon itself copies (mode daemon): out of DRAM, and out of its tier in HBM."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import grpc
import numpy as np

import kvclient
from bench.gpu_rig import BLOCK_BYTES, MIB, TIMEOUT_S, Rig, namespace_of
from bench.process import DaemonProcess
from kvclient.attached import AttachedMemory
from kvkernels.aligned import Bytes
from kvkernels.device.port import Direction
from kvproto import control_pb2, control_pb2_grpc


@dataclass
class Attached:
    """An engine's memory in the hands of a daemon, all of which is pages of 2 MiB over all layers."""

    rig: Rig
    process: DaemonProcess
    namespace: kvclient.Namespace
    memory: AttachedMemory
    keys: list[bytes] = field(init=False)

    def __post_init__(self) -> None:
        ids, half = self.rig.shuffled(self.memory.pages.blocks), self.memory.pages.blocks // 2
        self._first, self._second = ids[:half], ids[half : 2 * half]
        self._numbers = count()
        self.keys = self.fresh()
        total = self.rig.scale.total_bytes
        self.rig.up.copy(Direction.TO_DEVICE, [(self.memory.pages.bases[0], self.rig.source.address, total)])
        self.rig.up.synchronize()

    @property
    def blocks(self) -> int:
        """Of the chain that is stored: half of what the engine has."""
        return len(self._first)

    def fresh(self) -> list[bytes]:
        """Keys of a chain that nobody has stored."""
        return list(self.namespace.keys(range(16 * self.blocks), extra=str(next(self._numbers)).encode()))

    def save(self, keys: list[bytes]) -> None:
        """Store the first half of the pages."""
        saved = self.namespace.save(keys, self.memory[self._first], timeout_s=TIMEOUT_S, space_s=TIMEOUT_S)
        if saved.accepted != self.blocks:
            raise RuntimeError(f"{saved.accepted} of {self.blocks} blocks stored: {saved.reasons}")

    def load(self) -> None:
        """Fill the second half with what was stored."""
        loaded = self.namespace.load(self.keys, self.memory[self._second], timeout_s=TIMEOUT_S)
        if loaded.blocks != self.blocks:
            raise RuntimeError(f"{loaded.blocks} of {self.blocks} blocks loaded: {loaded.reason}")

    def loading_s(self) -> float:
        """Seconds of one `load`; the second half must come to hold what the first does, and not have held it before."""
        if np.array_equal(self._held(self._first), self._held(self._second)):
            raise RuntimeError("both halves are alike before anything is loaded")
        took = self.rig.seconds(self.load)
        if not np.array_equal(self._held(self._first), self._held(self._second)):
            raise RuntimeError("a load brought other bytes than were stored")
        return took

    def _held(self, ids: list[int]) -> Bytes:
        """What these pages hold, by a way that is not measured."""
        room = self.rig.target
        targets = [room.address + number * BLOCK_BYTES for number in range(len(ids))]
        self.rig.down.copy(Direction.TO_HOST, self.memory.pages.moves_out(ids, targets))
        self.rig.down.synchronize()
        return room.bytes[: len(ids) * BLOCK_BYTES].copy()


@contextmanager
def attached(rig: Rig, *arguments: str) -> Iterator[Attached]:
    """One, until the block ends."""
    with (
        rig.lent(rig.scale.total_bytes) as memory,
        rig.client("daemon", "--gpu-devices", rig.name, *arguments) as (process, client),
    ):
        one = Attached(rig, process, namespace_of(client), client.attach(rig.place, rig.pages(memory, BLOCK_BYTES)))
        yield one
        one.memory.detach()


def daemon_load_over_h2d(rig: Rig) -> float:
    """LOAD out of DRAM, of the bare copy."""
    with attached(rig) as one:
        one.save(one.keys)
        rig.found["dram_load_s"] = one.loading_s()
    return rig.limits["h2d"] / 2 / rig.found["dram_load_s"]


def daemon_save_over_d2h(rig: Rig) -> float:
    """SAVE, of the bare copy: the daemon hashes what it copies, and the blocks can be leased when it is over."""
    with attached(rig) as one:
        return rig.limits["d2h"] / 2 / rig.seconds(lambda: one.save(one.fresh()))


def hbm_hit_over_d2d(rig: Rig) -> float:
    """LOAD out of the daemon's tier on the GPU, all of it, of the bare copy on the device."""
    with attached(rig, "--gpu-hbm", f"{rig.scale.total_bytes // MIB + 64}MiB") as one:
        one.save(one.keys)
        one.namespace.prefetch(one.keys, tier="hbm", deadline_s=TIMEOUT_S)
        until(lambda: one.namespace.match(one.keys).tiers.hbm == one.blocks, "copies on the GPU")
        before = hits(one.process)
        rig.found["hbm_load_s"] = one.loading_s()
        loads = rig.scale.rounds + 1
        if hits(one.process) - before != loads * one.blocks:
            raise RuntimeError(
                f"of {loads * one.blocks} blocks {hits(one.process) - before} came from the GPU's memory"
            )
    return rig.limits["d2d"] / 2 / rig.found["hbm_load_s"]


def dram_load_over_hbm_load(rig: Rig) -> float:
    """How many times as long the same LOAD takes out of DRAM."""
    return rig.found["dram_load_s"] / rig.found["hbm_load_s"]


def hits(process: DaemonProcess) -> int:
    """Blocks that loads found in the tier on the GPU since the daemon began."""
    with grpc.insecure_channel(f"unix:{process.runtime_dir}/control.sock") as channel:
        status = control_pb2_grpc.ControlStub(channel).GetStatus(control_pb2.GetStatusRequest())
    return int(status.devices[0].hbm_hits)


def until(reached: Callable[[], bool], what: str) -> None:
    """Wait for something of the daemon's that nobody announces. Raises TimeoutError."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not reached():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{what}: not within {TIMEOUT_S:.0f} s")
        time.sleep(0.005)
