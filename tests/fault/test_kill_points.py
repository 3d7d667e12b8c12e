"""Fault 4: a real daemon dies inside commit, publish, demotion, promotion, a commit of the index, and a hand-over.

It kills itself at a step that is chosen by a seed, before it or behind it, while a client works (`tests/dying.py`).
The load, and what must be there in the next life, are those of `test_kill_loop.py`.
"""

import os
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from random import Random

import pytest

from bench.process import DaemonProcess
from tests.dying import DIES, STEPS, Death, Dying
from tests.fault.test_kill_loop import DURABLE_BACK, Load, Totals, end_life
from tests.figures import Recorder
from tests.node import Node

SEED = 20_261_204
TIMES = 100  # each point, in the long form
MOST = 4  # times as many lives: not each comes to its point
PATIENCE_S = 4.0  # until a daemon has come to the step where it is to die
WORK_S = (0.1, 0.3)  # before a hand-over


class KillPoints:
    """Lives of one node's daemon; each ends where it is told to."""

    def __init__(self, node: Node, load: Load, random: Random) -> None:
        self._node, self._load, self._random = node, load, random
        self.reached: Counter[str] = Counter()  # deaths, by point
        self.steps: Counter[str] = Counter()  # the same, by step
        self.number = 0
        self._handed_over = False  # the life before ended in a hand-over: what is left of that is to be taken over

    def live(self, point: str) -> None:
        """A life: what is there from those before is looked at, then the client works until it is over."""
        death = Death.at(point, self._random)
        handing_over = point == "hand-over"
        self._start(None if handing_over else death, keep=handing_over or self._keeps(point) or self._handed_over)
        self._handed_over = handing_over
        self._load.check_all()
        self._load.begin_life(self.number)
        self.number += 1
        if not handing_over:
            self._work_until_dead(death)
            return
        over = threading.Event()
        killer = threading.Timer(self._random.uniform(*WORK_S), end_life, [self._node, over])
        killer.start()
        self._load.work_until(over)
        killer.join()
        self._die_while_taking_over(death)

    def end(self) -> None:
        """A last life, that looks."""
        self._start(None, keep=True)
        self._load.check_all()

    def _keeps(self, point: str) -> bool:
        """What is kept need not be read from disk."""
        return point != "promotion" and self._random.random() < 0.5

    def _start(self, death: Death | None, *, keep: bool) -> None:
        with pytest.MonkeyPatch.context() as environment:
            if death is not None:
                environment.setenv(DIES, str(death))
            self._node.start("--keep", "true" if keep else "false", "--disk-admission", "all")

    def _work_until_dead(self, death: Death) -> None:
        daemon, over = self._node.daemon, threading.Event()
        assert daemon is not None
        in_time = True

        def watch() -> None:
            nonlocal in_time
            try:
                daemon.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                in_time = False
                daemon.kill()
            over.set()

        watcher = threading.Thread(target=watch)
        watcher.start()
        os.kill(daemon.process.pid, signal.SIGUSR1)
        self._load.work_until(over)
        watcher.join()
        daemon.kill()
        assert daemon.process.returncode == -signal.SIGKILL, self._node.log()[-3000:]
        self._count(death, reached=in_time)

    def _die_while_taking_over(self, death: Death) -> None:
        try:
            self._start(death, keep=True)
        except RuntimeError:
            assert "Traceback" not in self._node.log(), self._node.log()[-3000:]
            self._count(death, reached=True)
        else:  # it did not do this so often
            self._node.kill()
            self._count(death, reached=False)

    def _count(self, death: Death, *, reached: bool) -> None:
        self.reached[death.point] += reached
        self.steps[f"{death.point}: {death.step}"] += reached
        self._load.totals.lives.append(f"{death}{'' if reached else ' (not reached)'}")


@pytest.fixture(scope="module")
def dying() -> Iterator[None]:
    """Daemons of this file are forked off one process, which knows how to have them die."""
    prepared, before = Dying(), DaemonProcess.starter
    DaemonProcess.starter = prepared
    try:
        yield
    finally:
        DaemonProcess.starter = before
        prepared.end()


def run(times: int, seed: int, points: tuple[str, ...] = tuple(STEPS)) -> tuple[KillPoints, Totals]:
    """Lives until each of these points was reached so often, in turn."""
    print("seed", seed)
    random = Random(seed)
    with Node(dram="12MiB", size="192MiB", segment="8MiB") as node:
        node.start("--keep", "true", "--disk-admission", "all")
        load = Load(node, random)
        lives = KillPoints(node, load, random)
        try:
            load.begin_life(-1)
            node.kill()
            while lives.number < MOST * times * len(points) and any(lives.reached[point] < times for point in points):
                lives.live(min(points, key=lambda point: lives.reached[point]))
            lives.end()
            warm = node.log().count("memory: warm=True")
            assert warm >= lives.reached["hand-over"], "who dies on the way leaves nothing to the next"
        finally:
            load.close()
    print(dict(lives.reached), dict(lives.steps), load.totals)
    return lives, load.totals


def assert_sound(lives: KillPoints, totals: Totals, times: int, points: tuple[str, ...] = tuple(STEPS)) -> None:
    """Nothing was wrong on the way, and each point was reached; what was durable is back."""
    assert all(lives.reached[point] >= times for point in points), lives.reached
    assert totals.back >= DURABLE_BACK * totals.expected, f"{totals.back} of {totals.expected} durable blocks are back"
    assert times < TIMES or totals.expected >= 5 * lives.number, "the load was too light to prove anything"


@pytest.mark.usefixtures("dying")
def test_a_daemon_that_dies_inside_of_anything_leaves_what_is_right_and_what_is_durable() -> None:
    points = ("hand-over",)
    assert_sound(*run(1, SEED, points), times=1, points=points)


@pytest.mark.long
@pytest.mark.usefixtures("dying")
@pytest.mark.timeout(3 * 3600)
def test_every_kill_point_a_hundred_times(record_property: Recorder) -> None:
    lives, totals = run(TIMES, SEED + 1)
    for point, count in lives.reached.items():
        record_property(point.replace(" ", "_").replace("-", "_"), count)
    for step, count in lives.steps.items():
        record_property(f"at_{step}".replace(": ", "_").replace(" ", "_").replace("-", "_"), count)
    record_property("durable_blocks_looked_for", totals.expected)
    record_property("durable_blocks_back", totals.back)
    record_property("hits", totals.hits)
    assert_sound(lives, totals, TIMES)
