"""The load itself: a daemon, a warm-up, the crowd on a failing drive, and what is left when all are gone."""

import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import grpc

from bench.harness import home_on_drive, say
from bench.load.board import Board, Latency, Verb
from bench.load.client import Place
from bench.load.crowd import Crowd, members_of
from bench.load.faults import Fault, Page
from bench.load.levels import QUARANTINED, Levels, leaks, levels_of
from bench.process import DaemonProcess
from kvproto import control_pb2, control_pb2_grpc
from kvproto.control_token import token_metadata

CLIENTS: Final = 64
TENANTS: Final = 8
PROCESSES: Final = 16
UIDS: Final = 20_000  # the first of the tenants', if we may be anybody
HOME_BYTES: Final = 1 << 30
SETTLE_S: Final = 60.0  # until nothing is held any more
CALM_S: Final = 15.0  # until what has grown is as it was
KILL_S: Final = 0.7  # between two kills
STOP_S: Final = 3.1  # between two stops
LOOK_S: Final = 0.05
SAY_S: Final = 5.0
FAULT_S: Final = (0.3, 7.0)  # for so long something is wrong with the drive, and then nothing for as long
FAULT_SHARE: Final = 0.2  # of the time, at most, so that a short load sees several


@dataclass(slots=True)
class Outcome:
    """What a load has come to. `wrong`: a sentence for each broken promise; `leaks` and `hangs` are some of them."""

    seconds: float
    kills: int
    stops: int
    faults: int
    board: Board
    before: Levels
    after: Levels
    peak_anonymous_bytes: int
    leaks: list[str]
    hangs: list[str]
    wrong: list[str]
    settled_s: float
    statistics: dict[str, float] = field(default_factory=dict)

    def latencies(self) -> dict[Verb, Latency]:
        """Of every verb."""
        return {verb: self.board.latency(verb) for verb in Verb if verb is not Verb.NOTHING}


def load(seconds: float, warm_s: float, seed: int) -> Outcome:
    """Run it. Takes `seconds` and the warm-up, and some ten seconds more."""
    with home_on_drive(HOME_BYTES) as home:
        home.chmod(0o755)
        return Load(home, seed).run(seconds, warm_s)


class Load:
    """One daemon, and what happens to it."""

    def __init__(self, home: Path, seed: int) -> None:
        self._home = home
        self._random = random.Random(seed)
        self._seed = seed
        self._page = Page(home / "faults")
        self._board = Board.make(home / "board", CLIENTS)
        self._trouble = home / "trouble"
        self._trouble.mkdir()
        self._trouble.chmod(0o777)
        self._metrics = home / "run/metrics"
        self._audited = ""
        self._faults = 0
        self._peak_bytes = 0

    def run(self, seconds: float, warm_s: float) -> Outcome:
        """See `load`."""
        with self._daemon() as daemon, self._crowd() as crowd:
            daemon.await_memory()
            self._press(daemon, crowd, warm_s)
            before, _ = self._end(daemon, crowd)
            left = [f"after the warm-up: {sentence}" for sentence in before.leftovers()]
            wrong = [f"after the warm-up: {sentence}" for sentence in self._wrong(before)]
            self._board.forget()
            crowd.kills = crowd.stops = self._faults = 0
            self._press(daemon, crowd, seconds)
            after, settled_s = self._end(daemon, crowd)
            after = self._calm(daemon, before, after)
            left += [*after.leftovers(), *leaks(before, after)]
            wrong += [*self._wrong(after), *crowd.hangs, *left]
            if daemon.process.poll() is not None:
                wrong.append("the daemon died")
            return Outcome(
                seconds, crowd.kills, crowd.stops, self._faults, self._board, before, after, self._peak_bytes, left,
                crowd.hangs, wrong, settled_s, dict(after.figures),
            )  # fmt: skip

    @contextmanager
    def _daemon(self) -> Iterator[DaemonProcess]:
        """With eight tenants and two drives, one of them a bad one."""
        home = self._home
        names = [f"tenant-{number}" for number in range(TENANTS)]
        tables = [
            f"[tenants.{name}]\nuids = [{uid}]\n" + ("dram_max = '48MiB'\n" if number == 0 else "")
            for number, (name, uid) in enumerate(zip(names, self._uids() or [os.geteuid()] * TENANTS, strict=True))
        ]
        (home / "kvstored.toml").write_text("".join(tables))
        for folder in ("bad", "good"):
            (home / folder).mkdir()
        with DaemonProcess(
            home / "run", "--config", str(home / "kvstored.toml"), "--dram", "128MiB", "--arena", "4MiB",
            "--ring", "2MiB", "--lock", "false", "--log-level", "warning", "--disk", f"{home / 'bad'}:{home / 'good'}",
            "--disk-size", "384MiB", "--disk-segment", "8MiB", "--ticket-ttl", "2s", "--disk-codec", "raw",
            "--disk-admission", "all", "--metrics-listen", str(self._metrics),
            log_file=home / "log", module=("bench.load.victim", str(home)),
        ) as daemon:  # fmt: skip
            yield daemon

    @staticmethod
    def _uids() -> list[int]:
        """A user a tenant, where we may be any; else we are all of them."""
        return [UIDS + number for number in range(TENANTS)] if os.geteuid() == 0 else []

    def _crowd(self) -> Crowd:
        names = tuple(f"tenant-{number}" for number in range(TENANTS))
        run, board = str(self._home / "run"), str(self._home / "board")
        place = Place(run, board, str(self._trouble), names, tuple(self._uids()), self._seed)
        return Crowd(place, self._board, members_of(CLIENTS, TENANTS, PROCESSES), self._seed)

    # -- pressure ------------------------------------------------------------------------------------------------

    def _press(self, daemon: DaemonProcess, crowd: Crowd, seconds: float) -> None:
        """All clients at once, kills, stops and faults, for so long."""
        crowd.start_all()
        begun_s = time.monotonic()
        due = {"kill": begun_s + KILL_S, "stop": begun_s + STOP_S, "say": begun_s + SAY_S, "fault": begun_s + 1.0}
        while (now_s := time.monotonic()) < begun_s + seconds and not self._over(daemon):
            crowd.tick()
            if now_s >= due["kill"]:
                crowd.kill_one()
                due["kill"] = now_s + self._random.uniform(0.5, 1.5) * KILL_S
            if now_s >= due["stop"]:
                crowd.stop_one()
                due["stop"] = now_s + STOP_S
            if now_s >= due["fault"]:
                self._change_fault()
                due["fault"] = now_s + min(self._random.uniform(*FAULT_S), FAULT_SHARE * seconds)
            if now_s >= due["say"]:
                self._say(daemon, crowd, now_s - begun_s)
                due["say"] = now_s + SAY_S
            time.sleep(LOOK_S)
        self._page.fault = Fault.NONE

    def _over(self, daemon: DaemonProcess) -> bool:
        """Something is wrong already."""
        return daemon.process.poll() is not None or any(self._trouble.iterdir())

    def _change_fault(self) -> None:
        """Each in its turn, with pauses between them."""
        if self._page.fault is Fault.NONE:
            self._page.fault = list(Fault)[1 + self._faults % (len(Fault) - 1)]
            self._faults += 1
        else:
            self._page.fault = Fault.NONE

    def _say(self, daemon: DaemonProcess, crowd: Crowd, passed_s: float) -> None:
        now = levels_of(daemon.process.pid, self._metrics)
        self._peak_bytes = max(self._peak_bytes, now.anonymous_bytes)
        fetch, board = self._board.latency(Verb.FETCH), self._board
        connected = int(board.lines["connected"].sum())
        say(
            f"{passed_s:6.0f} s  {board.asked() / passed_s:7.0f} calls/s  {connected:2} connected  "
            f"fetch p50 {fetch.p50_s * 1e3:5.1f} p99 {fetch.p99_s * 1e3:6.1f} ms  hits {board.total('hits')} "
            f"({board.total('disk_hits')} disk)  wrong {board.total('wrong')}  kills {crowd.kills}  late "
            f"{board.total('late')}  drive {self._page.fault.name.lower()}  fds {now.total}  anon "
            f"{now.anonymous_bytes >> 20} MiB"
        )

    # -- the end -------------------------------------------------------------------------------------------------

    def _end(self, daemon: DaemonProcess, crowd: Crowd) -> tuple[Levels, float]:
        """`kill -9` for everybody; what is left once that is noticed and all is cleared, and how long noticing took."""
        crowd.kill_all()
        begun_s = time.monotonic()
        look = partial(levels_of, daemon.process.pid, self._metrics)
        now, said_s = look(), begun_s
        while time.monotonic() < begun_s + SETTLE_S and (now.busy() or not now.figures or self._sick(now)):
            if time.monotonic() > said_s + SAY_S:
                said_s = time.monotonic()
                say(f"after {said_s - begun_s:.0f} s: a drive is {'down' if self._sick(now) else 'up'}, {now.busy()}")
            time.sleep(LOOK_S)
            now = look()
        settled_s = time.monotonic() - begun_s
        say(f"settled after {settled_s:.1f} s, {now.figures.get('kvstored_blocks', 0):.0f} blocks")
        self._audited = self._verdict()  # with all that is stored
        say(f"audited after {time.monotonic() - begun_s:.1f} s")
        with grpc.insecure_channel(f"unix:{self._home}/run/control.sock") as channel:
            everything = control_pb2.ClearRequest(everything=control_pb2.ClearRequest.Everything())
            token = token_metadata(self._home / "run")
            control_pb2_grpc.ControlStub(channel).Clear(everything, timeout=SETTLE_S, metadata=token)
        cleared_s = time.time()
        now = look()
        before: Mapping[str, int] = {}
        while time.monotonic() < begun_s + 2 * SETTLE_S and (
            now.left() or now.figures["kvstored_snapshot_timestamp_seconds"] < cleared_s or now.descriptors != before
        ):
            if time.monotonic() > said_s + SAY_S:
                said_s = time.monotonic()
                unused = now.figures.get(QUARANTINED, 0)
                say(f"after {said_s - begun_s:.0f} s: cleared, and there is still {now.left()}; damaged {unused:.0f}")
            before = now.descriptors
            time.sleep(4 * LOOK_S)
            now = look()
        return now, settled_s

    def _calm(self, daemon: DaemonProcess, before: Levels, now: Levels) -> Levels:
        """Look again for a while where something has grown: a leak stays, what a busy host is late with does not."""
        end_s = time.monotonic() + CALM_S
        while leaks(before, now) and time.monotonic() < end_s and daemon.process.poll() is None:
            time.sleep(4 * LOOK_S)
            now = levels_of(daemon.process.pid, self._metrics)
        return now

    @staticmethod
    def _sick(now: Levels) -> bool:
        """A drive has not come back, or not yet."""
        return now.figures.get("kvstored_drive_up", 2.0) < 2.0

    def _wrong(self, levels: Levels) -> list[str]:
        """What must not be, now that nobody is there and nothing is stored; but for what is left over."""
        board = self._board
        wrong = [f"{path.name}: {path.read_text()[-2000:]}" for path in sorted(self._trouble.iterdir())]
        if self._sick(levels):
            wrong.append("a drive has not come back")
        if board.total("wrong"):
            wrong.append(f"{board.total('wrong')} blocks had wrong bytes")
        if not board.total("compared_bytes"):
            wrong.append("nothing was compared")
        wrong += [f"audit: {verdict}" for verdict in (self._audited, self._verdict()) if verdict]
        return wrong

    def _verdict(self) -> str:
        """Of the audit of all tables."""
        self._page.ask_for_audit()
        path = self._home / f"audit-{self._page.audits}"
        deadline_s = time.monotonic() + SETTLE_S
        with grpc.insecure_channel(f"unix:{self._home}/run/control.sock") as channel:
            stub = control_pb2_grpc.ControlStub(channel)
            while not path.exists():
                if time.monotonic() > deadline_s:
                    return "no verdict"
                stub.Ping(control_pb2.PingRequest(), timeout=SETTLE_S)  # turns the loop
        return path.read_text()
