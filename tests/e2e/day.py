"""A day in the life of one host, told as it happens: `make day`.

Install a wheel into a prefix, start it under a service manager, serve two tenants, upgrade under load, fill a drive,
drain, pull another drive, lose power, come back. Real processes, real files, one promise after another; all of them
once more at the end, with what was found. The service manager is systemd where one runs, else `tests/systemd.py` in its
place (`supervisor.py`); the shipped units under a real systemd are `tests/integration/test_service_systemd.py`.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.host import WAIT_S, Drive, Engine, Host
from tests.e2e.prefix import Prefix, build_wheel, next_release
from tests.e2e.supervisor import Supervisor, supervisor_of
from tests.node import until

TENANTS = ("chat", "batch")
CHAIN = 8  # blocks of a chain, as in `engine.py`: 512 KiB
CALM = 6  # chains that each tenant has, and that must be there whatever happens
FILLS = 16  # of four chains, until a drive is found to have no room: memory and the other drive can keep them all
DEADLINE_S = 6.0  # of a turn of an engine: a fetch and a store, each with all the waiting that it allows
TALK_S = 1.0
FLUSH_S = 30.0


@dataclass(frozen=True, slots=True)
class Promise:
    """One figure."""

    what: str
    promised: str
    found: str
    held: bool


@dataclass(slots=True)
class Day:
    """What has been told so far."""

    say: Callable[[str], None]
    patient: bool  # wait for the daemon's own pace; else what was given up is tried again sooner
    begun_s: float = field(default_factory=time.monotonic)
    promises: list[Promise] = field(default_factory=list)

    def tell(self, text: str) -> None:
        """A line of the story."""
        self.say(f"{time.monotonic() - self.begun_s:6.1f} s  {text}")

    def promise(self, what: str, promised: str, found: object, *, held: bool) -> None:
        """A figure, and whether it is as promised."""
        shown = f"{found:.2f} s" if isinstance(found, float) else str(found)
        self.promises.append(Promise(what, promised, shown, held))
        self.say(f"            {'as promised' if held else 'NOT AS PROMISED'}: {what}: {shown} ({promised})")

    def table(self) -> str:
        """All of them."""
        wide = max(len(one.what) for one in self.promises)
        found = max(len(one.found) for one in self.promises)
        return "\n".join(
            f"{'ok ' if one.held else 'BAD'}  {one.what:{wide}}  {one.found:>{found}}  {one.promised}"
            for one in self.promises
        )


def live(say: Callable[[str], None], *, patient: bool) -> list[Promise]:
    """The whole day. Raises what nobody promised anything about."""
    day = Day(say, patient)
    with Host() as host:
        wheel = install(day, host)
        with set_up(day, host) as manager:
            start(day, host, manager)
            serve(day, host)
            upgrade(day, host, manager, wheel)
            fill(day, host, manager)
            drain(day, host)
            pull(day, host)
            lose_power(day, host, manager)
            stop(day, manager)
    say("")
    say(day.table())
    return day.promises


# -- morning -----------------------------------------------------------------------------------------------------------


def install(day: Day, host: Host) -> Path:
    """A wheel, in an environment of its own."""
    day.tell("Install: a wheel is built, and put into a prefix of its own")
    wheel = build_wheel(host.home / "wheels")
    host.prefix = Prefix(host.home / "prefix")
    host.prefix.install(wheel)
    version = host.prefix.bin / "kvstored"
    day.promise("an installation", "kvstored, kvctl and kvclient, from the wheel", wheel.name, held=version.exists())
    return wheel


def set_up(day: Day, host: Host) -> Supervisor:
    """Two drives, two tenants, a socket, a watchdog."""
    host.drives = [Drive(host.home / f"drive{number}") for number in range(2)]
    host.config.write_text(
        "".join(f"[tenants.{name}]\nuids = [{os.geteuid()}]\ndram_guaranteed = '24MiB'\n" for name in TENANTS)
    )
    command = [
        str(host.prefix.bin / "kvstored"), "--runtime-dir", str(host.run), "--config", str(host.config),
        "--dram", "96MiB", "--arena", "4MiB", "--lock", "false", "--disk-admission", "all", "--disk-codec", "raw",
        "--disk", ":".join(str(drive.folder) for drive in host.drives), "--disk-size", "128MiB",
        "--disk-segment", "8MiB",
    ]  # fmt: skip
    environ = host.prefix.environ()
    if not day.patient:
        environ["PYTHONPATH"] = _impatience(host)
    return supervisor_of(command, environ, host.run, host.log)


def start(day: Day, host: Host, manager: Supervisor) -> None:
    """Until it says READY."""
    day.tell(f"Start: {manager.name} starts it, with a socket, a watchdog and a descriptor store")
    begun_s = time.monotonic()
    manager.start()
    assert "compiling" not in host.log.read_text(), "what an installation compiles was taken along"
    day.promise("ready after a start", "within 30 s", time.monotonic() - begun_s, held=time.monotonic() - begun_s < 30)


def _impatience(host: Host) -> str:
    """A folder for PYTHONPATH: what was given up is tried again each second, not every ten."""
    folder = host.home / "soon"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'kvstored' in sys.orig_argv[1]:\n"
        "    from kvstore.tier import segments\n"
        "    from kvstored import drive_health\n"
        "    drive_health.PROBE_NS = segments.REFUSED_NS = 10**9\n"
    )
    return str(folder)


def serve(day: Day, host: Host) -> None:
    """Two engines, a tenant each."""
    day.tell("Serve: an engine of each of two tenants stores, fetches, and compares every byte")
    host.engines = [Engine(host.prefix, host.run, tenant, host.log) for tenant in TENANTS]
    for engine in host.engines:
        engine.begin()
    chat, batch = host.engines
    weight = chat.ask("weight")
    ours = str(weight["from"]).startswith(str(host.prefix.folder))
    day.promise("what an engine imports", "NumPy and nothing heavier", weight["heavy"] or "nothing more",
                held=not weight["heavy"] and ours)  # fmt: skip
    stored = [engine.ask("store", name="calm", chains=CALM, flush_s=FLUSH_S) for engine in host.engines]
    durable = sum(answer["durable"] for answer in stored)
    day.promise(
        "blocks made durable", "all that were stored", f"{durable} of {2 * CALM * 8}", held=durable == 2 * CALM * 8
    )
    chat.ask("store", name="secret", chains=1)
    seen = batch.ask("fetch", name="secret", chains=1)["hit"]
    own = chat.ask("fetch", name="secret", chains=1)["hit"]
    day.promise("blocks of one tenant that the other finds", "0", f"{seen}, itself {own}", held=seen == 0 and own == 8)
    _all_there(day, host, "blocks that are there")


def upgrade(day: Day, host: Host, manager: Supervisor, wheel: Path) -> None:
    """Another release, while engines go on."""
    later = next_release(wheel)
    day.tell(f"Upgrade under load: {later.name} is installed, and the service restarted")
    for engine in host.engines:
        engine.ask("talk")
    before = manager.pid
    host.prefix.install(later)
    stopped_s = time.monotonic()
    code = manager.restart()
    gap_s = time.monotonic() - stopped_s
    time.sleep(TALK_S)  # of load on the new one
    _hush(day, host, "while it was upgraded")
    status = host.status()
    version = later.name.split("-")[1]
    day.promise("the new release serves", version, status.version,
                held=status.version == version and status.pid != before and code == 0)  # fmt: skip
    day.promise("from stop to ready", "within 30 s", gap_s, held=gap_s < 30.0)
    kept, found = status.restart.kept_blocks, status.restart.found_blocks
    day.promise("blocks of memory taken over", "all", f"{kept} of {found}",
                held=status.restart.began == "warm" and kept == found > 0)  # fmt: skip
    _all_there(day, host, "blocks that are there after the upgrade")


# -- trouble -----------------------------------------------------------------------------------------------------------


def fill(day: Day, host: Host, manager: Supervisor) -> None:
    """A drive without room."""
    day.tell("Fill a drive: nothing more fits, and engines go on")
    for engine in host.engines:
        engine.ask("talk")
    chat, numbers = host.engines[0], iter(range(FILLS))
    with host.drives[0].full(manager.pid) as (state, remedy):

        def store_and_look() -> bool:
            """A drive that only fails is tried again: it is found so as long as there is something to write."""
            chat.ask("store", name=f"more-{next(numbers, FILLS - 1)}", chains=4, flush_s=0.3)
            return any(drive.state == state for drive in host.status().disk.drives) and host.warns(remedy)

        warned = until(store_and_look, WAIT_S)
        stored = [chat.ask("fetch", name=f"more-{number}", chains=4) for number in range(next(numbers, FILLS))]
        hit, asked, wrong = (sum(answer[name] for answer in stored) for name in ("hit", "asked", "wrong"))
        day.promise("an operator is told", "a warning with what to do", "yes" if warned else "no", held=warned)
        day.promise(
            "blocks stored meanwhile that are there", "all", f"{hit} of {asked}", held=hit == asked and not wrong
        )
    _hush(day, host, "while a drive was full")
    begun_s = time.monotonic()
    healed = until(lambda: all(drive.state == "ok" for drive in host.status().disk.drives), 60.0)
    day.promise("writes go on once there is room", "within 20 s", time.monotonic() - begun_s, held=healed)
    _all_there(day, host, "blocks that are there afterwards")


def drain(day: Day, host: Host) -> None:
    """No new blocks."""
    day.tell("Drain: new blocks are refused, what is there is served")
    host.kvctl("drain", "--yes")
    chat, _ = host.engines
    refused = chat.ask("store", name="late", chains=1)
    told = refused["refused"].get("draining", 0)
    day.promise("new blocks while it drains", "refused, as draining", f"{refused['accepted']} taken, {told} told so",
                held=not refused["accepted"] and told > 0)  # fmt: skip
    _all_there(day, host, "blocks that are served while it drains")
    host.kvctl("undrain")
    taken = chat.ask("store", name="late", chains=1)["accepted"]
    day.promise("new blocks once it does not", "taken", taken, held=taken == 8)


def pull(day: Day, host: Host) -> None:
    """A drive that is no more."""
    day.tell("Pull a drive: its blocks are misses, unless memory has them; nothing else changes")
    for engine in host.engines:
        engine.ask("talk")
    host.drives[1].pull()
    gone = host.warned(str(host.drives[1].folder))
    day.promise("an operator is told", "a warning that names the drive", "yes" if gone else "no", held=gone)
    time.sleep(TALK_S)
    _hush(day, host, "with a drive less")
    stored = [engine.ask("store", name="after", chains=CALM, flush_s=FLUSH_S) for engine in host.engines]
    durable, all_blocks = sum(answer.get("durable", 0) for answer in stored), len(TENANTS) * CALM * CHAIN
    day.promise("new blocks made durable on the other drive", "all", f"{durable} of {all_blocks}",
                held=durable == all_blocks)  # fmt: skip


def lose_power(day: Day, host: Host, manager: Supervisor) -> None:
    """Nothing is left but what the drive has."""
    day.tell("Lose power: memory is gone, and what is durable comes back from the drive")
    manager.lose_power()
    begun_s = time.monotonic()
    manager.start()
    chat, batch = host.engines
    first = until(lambda: chat.ask("fetch", name="after", chains=1)["hit"] == 8, 30.0)
    day.promise("from start to a hit from disk", "within 30 s", time.monotonic() - begun_s, held=first)
    answers = [engine.ask("fetch", name="after", chains=CALM) for engine in host.engines]
    back, asked, disk = (sum(answer[name] for answer in answers) for name in ("hit", "asked", "disk"))
    wrong = sum(answer["wrong"] for answer in answers)
    day.promise("durable blocks that are back", "99.9 %, byte by byte", f"{back} of {asked}, {disk} from disk",
                held=back >= 0.999 * asked and disk > 0 and not wrong)  # fmt: skip
    lost = batch.ask("fetch", name="never", chains=1)["hit"]
    day.promise("blocks that nobody stored", "0", lost, held=lost == 0)


def stop(day: Day, manager: Supervisor) -> None:
    """The end of it."""
    day.tell("Stop")
    code = manager.stop()
    day.promise("a stop ends well", "0", code, held=code == 0)


def _all_there(day: Day, host: Host, what: str) -> None:
    answers = [engine.ask("fetch", name="calm", chains=CALM) for engine in host.engines]
    hit, asked, wrong = (sum(answer[name] for answer in answers) for name in ("hit", "asked", "wrong"))
    day.promise(what, "all, byte by byte", f"{hit} of {asked}, {wrong} wrong", held=hit == asked and not wrong)


def _hush(day: Day, host: Host, when: str) -> None:
    """What engines saw meanwhile."""
    answers = [engine.ask("hush") for engine in host.engines]
    calls, hits, wrong, raised = (
        sum(answer[name] for answer in answers) for name in ("calls", "hits", "wrong", "raised")
    )
    longest_s = max(answer["longest_s"] for answer in answers)
    day.promise(f"wrong bytes and exceptions {when}", "0 and 0", f"{wrong} and {raised} in {calls} calls, {hits} hits",
                held=not wrong and not raised and hits > 0)  # fmt: skip
    day.promise(
        f"the longest turn of an engine {when}", f"within {DEADLINE_S:.0f} s", longest_s, held=longest_s < DEADLINE_S
    )


def main() -> int:
    """On the screen, at the daemon's own pace. 1 if a promise was broken."""
    promises = live(lambda line: print(line, flush=True), patient="--fast" not in sys.argv)
    broken = sum(not one.held for one in promises)
    print(f"\n{len(promises)} promises, {broken} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
