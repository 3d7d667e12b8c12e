"""Processes of clients: started, killed and stopped at random; and who of them hangs."""

import os
import random
import signal
import time
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from types import TracebackType
from typing import Final, Self

from bench.load.board import Board, Verb
from bench.load.client import Place, run_process

HANG_S: Final = 10.0  # over its time: a client that waits so long hangs
STOP_S: Final = (0.2, 1.6)  # for so long a process is stopped: mostly beyond its leases
END_S: Final = 20.0


@dataclass(slots=True)
class Member:
    """One process at a time, for so many clients of one tenant."""

    tenant: int
    first: int
    count: int
    life: int = 0
    process: ForkServerProcess | None = None
    stopped_until_s: float = 0.0  # 0: it runs


@dataclass(slots=True)
class Crowd:
    """All of them. A context manager that kills them. `place` is where they go, `members` who is there."""

    place: Place
    board: Board
    members: list[Member]
    seed: int
    kills: int = 0
    stops: int = 0
    hangs: list[str] = field(default_factory=list)
    deaths: int = 0  # of themselves
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def start_all(self) -> None:
        """All that do not run."""
        for member in self.members:
            if member.process is None:
                self._start(member)

    def tick(self) -> None:
        """Let those go on whose time has come, replace those that have died, look for those that hang."""
        now_s = time.monotonic()
        for member in self.members:
            if member.stopped_until_s and now_s >= member.stopped_until_s:
                self._go_on(member)
            if member.process is not None and not member.process.is_alive():
                self.deaths += 1
                self._reap(member)
                self._start(member)
        self._look_for_hangs()

    def kill_one(self) -> None:
        """`kill -9` for one that runs, and another one in its place."""
        member = self._random.choice(self.members)
        self._end(member)
        self.kills += 1
        self._start(member)

    def stop_one(self) -> None:
        """SIGSTOP, for a while."""
        member = self._random.choice(self.members)
        if member.stopped_until_s or member.process is None or member.process.pid is None:
            return
        self._mark_stop(member)
        os.kill(member.process.pid, signal.SIGSTOP)
        member.stopped_until_s = time.monotonic() + self._random.uniform(*STOP_S)
        self.stops += 1

    def kill_all(self) -> None:
        """All at once; waits until they are gone."""
        for member in self.members:
            self._end(member)

    def _start(self, member: Member) -> None:
        member.life += 1
        self.board.lines["verb"][member.first : member.first + member.count] = Verb.NOTHING
        arguments = (self.place, member.tenant, member.first, member.count, member.life)
        member.process = _CONTEXT.Process(target=run_process, args=arguments, daemon=True)
        member.process.start()

    def _end(self, member: Member) -> None:
        if member.process is not None:
            member.process.kill()
            self._reap(member)

    def _reap(self, member: Member) -> None:
        assert member.process is not None
        member.process.join(END_S)
        member.process.close()
        member.process, member.stopped_until_s = None, 0.0

    def _go_on(self, member: Member) -> None:
        member.stopped_until_s = 0.0
        if member.process is not None and member.process.pid is not None:
            self._mark_stop(member)
            os.kill(member.process.pid, signal.SIGCONT)

    def _mark_stop(self, member: Member) -> None:
        """Whatever its clients are waiting for now takes as long as we like."""
        lines = self.board.lines[member.first : member.first + member.count]
        lines["stops"] += 1
        lines["limit_ns"] += int(STOP_S[1] * 1e9)

    def _look_for_hangs(self) -> None:
        lines = self.board.lines
        late_ns = time.monotonic_ns() - int(HANG_S * 1e9)
        for member in self.members:
            if member.stopped_until_s:
                continue
            for number in range(member.first, member.first + member.count):
                line = lines[number]
                if line["verb"] and int(line["limit_ns"]) < late_ns:
                    verb, begun_ns = Verb(int(line["verb"])), int(line["begun_ns"])
                    over_s = (time.monotonic_ns() - int(line["limit_ns"])) / 1e9
                    self.hangs.append(f"client {number} in {verb.name} begun {begun_ns}, {over_s:.1f} s over its time")
                    line["verb"] = Verb.NOTHING  # said once

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill_all()


def members_of(clients: int, tenants: int, processes: int) -> list[Member]:
    """As even as it goes: each process is of one tenant."""
    each = clients // processes
    assert each * processes == clients, "as many clients in each process"
    assert processes % tenants == 0, "as many processes of each tenant"
    return [Member(number % tenants, number * each, each) for number in range(processes)]


# Forked from one process that has imported all there is, so that a new life takes milliseconds.
_CONTEXT: Final = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["bench.load.client"])
