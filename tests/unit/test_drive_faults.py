"""Drives that fail, fill up, hang, vanish or hold somebody else's files: orders end, threads live, others go on."""

import errno
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from kvproto.limits import PAGE_BYTES
from kvstore.tier.format import Codec, slot_offset
from kvstore.tier.orders import DropSegment, Erase, MakeSegment, Order, Outcome, Pack, Save, Verify
from kvstored import drive_work
from tests.unit.drive_kit import Gate, Place, Rig, error, load_of, save_of

DONE, DAMAGED, FAILED, GONE = Outcome.DONE, Outcome.DAMAGED, Outcome.FAILED, Outcome.GONE
SLOT = 2 * PAGE_BYTES


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig([tmp_path / "one"]) as made:
        yield made


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Rig]:
    with Rig([tmp_path / "one", tmp_path / "two"]) as made:
        yield made


# -- calls that fail -------------------------------------------------------------------------------------------------


def test_one_bad_sector_costs_one_block(rig: Rig) -> None:
    places, saves = rig.save_blocks(1, 5, 100)
    bad = slot_offset(SLOT, 3)

    def rule(_: int, buffers: list[memoryview], offset: int) -> None:
        if offset <= bad < offset + sum(map(len, buffers)):
            raise OSError(errno.EIO, "bad sector")

    rig.files.rules["pread"] = rule
    assert rig.run([load_of(saves[i], places[i]) for i in range(5)]) == [DONE, DONE, DONE, FAILED, DONE]
    assert rig.drives.status()[0].errors == 1
    rig.files.rules["pwrite"] = rule
    for save in saves:
        save.outcome = Outcome.OPEN
    assert rig.run(saves) == [DONE, DONE, DONE, FAILED, DONE]


@pytest.mark.parametrize("call", ["pread", "pwrite"])
@pytest.mark.parametrize("came_bytes", [0, 1, 4096, 4097])
def test_a_call_that_stops_short_is_a_failure(rig: Rig, call: str, came_bytes: int) -> None:
    places, saves = rig.save_blocks(1, 2, 5000)
    rig.files.rules[call] = lambda *_: came_bytes
    orders: list[Order] = (
        [load_of(saves[i], places[i]) for i in range(2)]
        if call == "pread"
        else [save_of(rig, 1, i, places[i]) for i in range(2)]
    )
    assert rig.run(orders) == [FAILED] * 2


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.ENOMEM, errno.EINVAL])
@pytest.mark.parametrize("call", ["pread", "pwrite", "fdatasync"])
def test_a_failing_call_fails_its_orders_and_no_thread(rig: Rig, call: str, number: int) -> None:
    places, saves = rig.save_blocks(1, 2, 5000)
    rig.files.rules[call] = error(number)
    orders: dict[str, list[Order]] = {
        "pread": [load_of(saves[i], places[i]) for i in range(2)],
        "pwrite": [save_of(rig, 1, i, places[i]) for i in range(2)],
        "fdatasync": [Erase(1, 1, saves[0].slot_bytes)],
    }
    assert set(rig.run(orders[call])) == {FAILED}
    rig.files.rules.clear()
    assert rig.run([load_of(saves[0], places[0])]) == [DONE]
    wanted = {errno.ENOSPC: "full", errno.EDQUOT: "full", errno.EROFS: "read-only"}.get(number, "ok")
    assert rig.drives.status()[0].state == wanted
    rig.look(11)
    assert rig.drives.status()[0].state == "ok"


def test_a_bug_in_a_worker_fails_the_order_and_is_logged(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    places, saves = rig.save_blocks(1, 1, 100)
    monkeypatch.setattr(drive_work, "load", broken)
    for _ in range(5):  # more than there are readers
        assert rig.run([load_of(saves[0], places[0])]) == [FAILED]
    assert "ZeroDivisionError" in caplog.text


def test_a_failed_sync_is_told_once(rig: Rig) -> None:
    rig.save_blocks(1, 1, 100)
    rig.make(2, SLOT)
    assert rig.drives.sync([1, 2]) == set()
    rig.files.rules["fdatasync"] = error(errno.EIO, times=1)
    assert rig.drives.sync([1, 2]) == {1}
    assert rig.drives.sync([1, 2]) == set()


def test_a_sync_that_failed_for_an_erase_is_told_to_the_next_commit(rig: Rig) -> None:
    rig.save_blocks(1, 2, 100)
    rig.files.rules["fdatasync"] = error(errno.EIO, times=1)
    assert rig.run([Erase(1, 0, SLOT)]) == [FAILED]
    assert rig.drives.sync([1]) == {1}
    assert rig.drives.sync([1]) == set()


def test_a_sync_beside_one_that_fails_for_an_erase_is_told_of_it(rig: Rig) -> None:
    """The kernel has told the first of two; the second must not pass before that is noted."""
    rig.save_blocks(1, 2, 100)
    failed: list[set[int]] = []
    beside = threading.Thread(target=lambda: failed.append(rig.drives.sync([1])))
    calls = iter(range(1 << 30))

    def rule(*_: object) -> None:
        if not next(calls):
            beside.start()
            beside.join(0.2)  # it would pass now
            raise OSError(errno.EIO, "told once")

    rig.files.rules["fdatasync"] = rule
    assert rig.run([Erase(1, 0, SLOT)]) == [FAILED]
    beside.join()
    assert failed == [{1}]
    assert rig.drives.sync([1]) == set(), "the control: nothing is wrong any more"


def test_segments_that_nobody_knows_are_not_durable(rig: Rig) -> None:
    assert rig.drives.sync([5]) == {5}
    assert rig.run([Erase(5, 0, SLOT)]) == [GONE]
    assert rig.run([DropSegment(5)]) == [GONE]


# -- drives that hang, vanish or die ---------------------------------------------------------------------------------


def test_a_hung_drive_does_not_stop_another(pair: Rig) -> None:
    places, saves = pair.save_blocks(1, 2, 100)
    others = [save_of(pair, 2, slot, place) for slot, place in enumerate(places)]
    assert pair.make(2, SLOT) is DONE
    hung_fd = pair.drives._segments[1]._fd
    gate = Gate(if_=lambda fd, *_: fd == hung_fd)
    pair.files.rules |= {"pread": gate, "pwrite": gate, "fdatasync": gate}
    stuck: list[list[Order]] = [[load_of(saves[0], places[0])] for _ in range(5)]
    for batch in stuck:
        pair.drives.submit(batch)
    gate.wait_reached()
    assert pair.run(others) == [DONE] * 2
    assert pair.run([load_of(others[0], places[0])]) == [DONE]
    assert pair.drives.sync([2]) == set()
    pair.look(3)
    assert [status.state for status in pair.drives.status()] == ["ok", "ok"]
    pair.look(3)
    hung, well = pair.drives.status()
    assert (hung.state, well.state) == ("failing", "ok")
    assert "5 s" in hung.reason
    pair.wait(*stuck[2:])  # they had not begun
    assert {batch[0].outcome for batch in stuck[2:]} == {FAILED}
    assert {batch[0].outcome for batch in stuck[:2]} == {Outcome.OPEN}
    assert pair.run([load_of(saves[1], places[1])]) == [FAILED]
    assert pair.drives.sync([1, 2]) == {1}
    assert pair.make(3, SLOT) is DONE
    assert pair.path(3, directory=1).exists()
    gate.let_go()
    pair.wait(*stuck[:2])
    pair.look()
    assert pair.drives.status()[0].state == "ok"
    assert pair.run([load_of(saves[1], places[1])]) == [DONE]


@pytest.mark.parametrize("call", ["fallocate", "unlink"])
def test_a_drive_that_hangs_while_it_makes_or_removes_a_segment_is_found_out(pair: Rig, call: str) -> None:
    assert pair.make(1, SLOT) is DONE
    gate = Gate()
    pair.files.rules[call] = gate
    hanging: list[Order] = [MakeSegment(2, SLOT, "a")] if call == "fallocate" else [DropSegment(1)]
    pair.drives.submit(hanging)
    gate.wait_reached()
    hung = 1 if call == "fallocate" else 0
    pair.look(6)
    assert [status.state for status in pair.drives.status()][hung] == "failing"
    del pair.files.rules[call]
    assert pair.make(3, SLOT) is DONE
    assert pair.path(3, directory=1 - hung).exists(), "the next one is made elsewhere"
    gate.let_go()
    pair.wait(hanging)
    pair.look()
    assert [status.state for status in pair.drives.status()] == ["ok", "ok"]
    assert hanging[0].outcome is DONE


def test_it_is_known_which_drive_a_segment_lies_on(pair: Rig) -> None:
    assert pair.make(1, SLOT) is DONE
    assert pair.make(2, SLOT) is DONE
    assert [pair.drives.drive_of(segment) for segment in (1, 2, 3)] == [0, 1, -1]
    assert pair.run([DropSegment(2)]) == [DONE]
    assert pair.drives.drive_of(2) == -1


def test_loads_and_verifying_do_not_wait_behind_saves_and_packing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    places, saves = rig.save_blocks(1, 4, 100)
    gate, packing = Gate(), Gate()
    rig.files.rules["pwrite"] = gate
    packed: list[int] = []

    def pack(orders: list[Pack], _: object) -> None:
        packing()
        packed.append(len(packed) if verify[0].outcome is Outcome.OPEN else 100)

    monkeypatch.setattr(drive_work, "make_smaller", pack)
    verify = [Verify(0, 1, 0, 0, 100)]
    held: list[list[Order]] = [[save_of(rig, 1, i, places[i])] for i in range(4)]
    held += [[Pack(0, 1, 0, 0, 100, Codec.BF16_PLANES_ZSTD)] for _ in range(3)]
    for batch in held:
        rig.drives.submit(batch)
    gate.wait_reached()
    packing.wait_reached()
    assert rig.run([load_of(saves[0], places[0], slot=2)]) == [DAMAGED]
    rig.drives.submit(verify)
    packing.let_go()
    gate.let_go()
    rig.wait(*held, verify)
    assert packed == [0, 100, 100], "the one that ran already, then verifying, then those that waited"


def test_a_drive_that_hangs_at_start_stops_nobody(tmp_path: Path) -> None:
    rig, gate = Rig([tmp_path]), Gate()
    rig.files.rules["identity"] = gate
    rig.drives.adopt(1, tmp_path)
    rig.drives.start()
    gate.wait_reached()
    load = [load_of(save_of(rig, 1, 0, Place(0, 100)), Place(0, 100))]
    rig.drives.submit(load)
    rig.clock_ns += 6 * 10**9
    rig.drives.look_around()
    rig.wait(load)
    assert load[0].outcome is FAILED
    assert rig.make(2, SLOT) is FAILED
    gate.let_go()
    rig.until(rig.drives._drives[0].directory.ready.is_set)
    rig.look()
    assert rig.make(2, SLOT) is DONE
    rig.drives.stop()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_directory_that_cannot_be_opened_at_start_is_failing_until_it_can(tmp_path: Path, number: int) -> None:
    rig = Rig([tmp_path])
    rig.files.rules["open"] = error(number)
    with rig:
        assert rig.drives.status()[0].state == "failing"
        assert os.strerror(number) in rig.drives.status()[0].reason
        assert rig.make(1, SLOT) is FAILED
        rig.files.rules.clear()
        rig.look(11)
        assert rig.make(1, SLOT) is DONE


def test_orders_that_would_touch_a_neighbour_are_bugs_and_write_nothing(rig: Rig) -> None:
    places, _ = rig.save_blocks(1, 2, 100)
    before = rig.path(1).read_bytes()
    outside = save_of(rig, 1, 0, places[0])
    outside.arena_offset = rig.arena_bytes - 10
    too_long = save_of(rig, 1, 0, Place(0, 5000))
    too_long.slot_bytes = SLOT
    astray = save_of(rig, 1, 500_000, places[0])
    for save, outcome in ((outside, FAILED), (too_long, FAILED), (astray, DAMAGED)):
        assert rig.run([save]) == [outcome]
    assert rig.path(1).read_bytes() == before


@pytest.mark.parametrize("seed", range(6))
def test_whatever_fails_a_load_that_is_done_brings_the_right_bytes(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    block_bytes = chance.choice([100, 5000, 70_001])
    with Rig([tmp_path]) as rig:
        places = rig.fill(8, block_bytes, seed)
        slot_bytes = save_of(rig, 1, 0, places[0]).slot_bytes
        assert rig.make(1, slot_bytes) is DONE
        on_disk: dict[int, Save] = {}

        def fault(_: int, buffers: list[memoryview], __: int) -> int | None:
            kind = chance.random()
            if kind < 0.1:
                raise OSError(errno.EIO, "by chance")
            return chance.randrange(sum(map(len, buffers))) if kind < 0.2 else None

        rig.files.rules |= {"pread": fault, "pwrite": fault}
        loaded = 0
        for step in range(60):
            rig.look(11)
            slots = sorted(chance.sample(range(8), chance.randrange(1, 8)))
            if chance.random() < 0.4:
                rig.fill(8, block_bytes, seed=1000 * seed + step)
                saves = [save_of(rig, 1, slot, places[slot]) for slot in slots]
                for slot, outcome in zip(slots, rig.run(saves), strict=True):
                    on_disk.pop(slot, None)
                    if outcome is DONE:
                        on_disk[slot] = saves[slots.index(slot)]
            elif chance.random() < 0.2:
                for slot, outcome in zip(slots, rig.run([Erase(1, slot, slot_bytes) for slot in slots]), strict=True):
                    if outcome is DONE:
                        on_disk.pop(slot, None)
            else:
                rig.arena[:] = 0
                known = [slot for slot in slots if slot in on_disk]
                loads = [load_of(on_disk[slot], places[slot]) for slot in known]
                for load, outcome in zip(loads, rig.run(loads) if loads else [], strict=True):
                    loaded += outcome is DONE
                    content = rig.content(places[load.slot])
                    assert outcome is not DONE or xxhash.xxh3_64_intdigest(content.data) == load.checksum
        assert loaded > 20


def test_only_one_look_at_a_time(rig: Rig) -> None:
    gate = Gate()
    rig.files.rules["identity"] = gate
    rig.drives.look_around()
    gate.wait_reached()
    for _ in range(6):
        rig.clock_ns += 10**9
        rig.drives.look_around()
    assert rig.files.calls["identity"] == 1
    assert rig.drives.status()[0].state == "failing"
    gate.let_go()
    rig.look()
    rig.look()
    assert rig.drives.status()[0].state == "ok"


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_the_segments_of_a_folder_that_vanished_are_gone(pair: Rig, how: str) -> None:
    places, saves = pair.save_blocks(1, 1, 100)
    assert pair.make(2, SLOT) is DONE
    folder = pair.path(1).parent
    folder.rename(folder.with_name("elsewhere"))
    if how == "replaced":
        folder.mkdir()
    pair.look()
    assert pair.drives.status()[0].state == "gone"
    assert pair.drives.gone_segments() == [1]
    assert pair.drives.gone_segments() == []
    assert pair.run([load_of(saves[0], places[0])]) == [GONE]
    assert pair.make(3, SLOT) is DONE
    assert pair.path(3, directory=1).exists()
    pair.look(11)  # it is there again, and empty
    assert [(status.state, status.segments) for status in pair.drives.status()] == [("ok", 0), ("ok", 2)]
    assert pair.make(1, SLOT) is DONE
    assert pair.path(1).exists()


def test_a_directory_that_is_not_there_at_start_is_used_when_it_comes(tmp_path: Path) -> None:
    rig = Rig([tmp_path / "one"])
    (tmp_path / "one").rmdir()
    with rig:
        rig.drives.adopt(4, tmp_path / "one")
        assert rig.drives.status()[0].state == "gone"
        assert rig.drives.gone_segments() == [4]
        assert rig.make(1, SLOT) is FAILED
        rig.look(11)
        assert rig.drives.status()[0].state == "gone", "nobody makes the directory itself"
        assert rig.drives.gone_segments() == []
        (tmp_path / "one").mkdir()
        rig.look(11)
        assert rig.make(1, SLOT) is DONE


def test_eight_errors_without_a_success_suspend_a_drive_until_a_probe_succeeds(rig: Rig) -> None:
    places, saves = rig.save_blocks(1, 2, 100)
    rig.files.rules["pread"] = error(errno.EIO)
    for _ in range(7):
        assert rig.run([load_of(saves[0], places[0])]) == [FAILED]
    rig.files.rules.clear()
    assert rig.run([load_of(saves[0], places[0])]) == [DONE]
    rig.files.rules["pread"] = error(errno.EIO)
    for _ in range(8):
        assert rig.drives.status()[0].state == "ok"
        assert rig.run([load_of(saves[0], places[0])]) == [FAILED]
    assert rig.drives.status()[0].state == "failing"
    calls = rig.files.calls["pread"]
    assert rig.run([load_of(saves[0], places[0])]) == [FAILED]
    assert rig.files.calls["pread"] == calls, "nothing is tried"
    rig.look(11)
    assert rig.drives.status()[0].state == "failing", "the probe could not read"
    rig.files.rules.clear()
    assert rig.run([Erase(1, 1, SLOT)]) == [DONE], "erasing is always tried"
    rig.look(11)
    assert rig.drives.status()[0].state == "ok"
    assert rig.run([load_of(saves[0], places[0])]) == [DONE]


def test_a_probe_that_comes_back_changed_is_an_error(rig: Rig) -> None:
    rig.files.rules["fallocate"] = error(errno.EROFS, times=1)
    assert rig.make(1, SLOT) is FAILED
    rig.files.rules["pread"] = lambda _, buffers, __: sum(map(len, buffers))
    rig.look(11)
    assert rig.drives.status()[0].state == "read-only"
    rig.files.rules.clear()
    rig.look(11)
    assert rig.drives.status()[0].state == "ok"


def test_blocks_of_a_read_only_file_system_can_be_read_and_later_written(tmp_path: Path) -> None:
    with Rig([tmp_path]) as first:
        places, saves = first.save_blocks(7, 1, 100)

    def read_only(_: Path, flags: int) -> None:
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, "read-only")

    second = Rig([tmp_path])
    second.files.rules["open"] = read_only
    with second:
        assert second.drives.status()[0].state == "read-only"
        second.drives.adopt(7, tmp_path)
        assert second.run([load_of(saves[0], places[0])]) == [DONE]
        assert second.run([save_of(second, 7, 0, places[0])]) == [FAILED]
        second.files.rules.clear()
        second.look(11)
        assert second.run([save_of(second, 7, 0, places[0])]) == [DONE]


def test_a_fault_is_logged_once_a_kind(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    places, saves = rig.save_blocks(1, 1, 100)
    rig.files.rules["pread"] = error(errno.EIO)
    for _ in range(5):
        rig.run([load_of(saves[0], places[0])])
    assert sum("drive fault" in line for line in caplog.text.splitlines()) == 1


def test_stopping_waits_for_what_runs_and_starts_nothing_more(tmp_path: Path) -> None:
    rig = Rig([tmp_path], readers=1)
    with rig:
        places, saves = rig.save_blocks(1, 1, 100)
        gate = Gate()
        rig.files.rules["pread"] = gate
        batches: list[list[Order]] = [[load_of(saves[0], places[0])] for _ in range(3)]
        for batch in batches:
            rig.drives.submit(batch)
        gate.wait_reached()
        stopping = threading.Thread(target=rig.drives.stop)
        stopping.start()
        rig.until(lambda: rig.drives._stopping)
        gate.let_go()
        stopping.join()
        assert [batch[0].outcome for batch in batches] == [DONE, Outcome.OPEN, Outcome.OPEN]
        assert rig.drives.sync([1]) == {1}


def test_a_drive_is_asked_for_more_while_what_it_brought_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, check = Gate(), drive_work.check

    def check_later(*arguments: Any) -> None:
        gate()
        check(*arguments)

    monkeypatch.setattr(drive_work, "check", check_later)
    with Rig([tmp_path], readers=1) as rig:
        places, saves = rig.save_blocks(1, 1, 100)
        second = Gate(if_=lambda *_: gate.reached.is_set())
        rig.files.rules["pread"] = second
        batches: list[list[Order]] = [[load_of(saves[0], places[0])] for _ in range(4)]
        rig.files.sizes.clear()
        rig.drives.submit(batches[0])
        gate.wait_reached()
        for batch in batches[1:]:
            rig.drives.submit(batch)
        second.wait_reached()
        second.let_go()
        assert not rig.drives.take_done(), "what is not verified is not done"
        gate.let_go()
        rig.wait(*batches)
        assert [batch[0].outcome for batch in batches] == [DONE] * 4
        assert [call for call, _, _ in rig.files.sizes] == ["pread"] * 4


def test_what_cannot_be_verified_has_failed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    places, saves = rig.save_blocks(1, 2, 100)

    def check_not(*_: object) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(drive_work, "check", check_not)
        assert rig.run([load_of(saves[0], places[0])]) == [FAILED]
    assert rig.run([load_of(saves[1], places[1])]) == [DONE], "the control: the thread is still there"


def test_counted_bytes_are_those_that_went_over(rig: Rig) -> None:
    places, saves = rig.save_blocks(1, 3, 5000)
    assert rig.run([load_of(saves[i], places[i]) for i in range(3)]) == [DONE] * 3
    status = rig.drives.status()[0]
    assert (status.read_bytes, status.written_bytes) == (9 * PAGE_BYTES, 10 * PAGE_BYTES)
    assert 0 < status.free_bytes < status.capacity_bytes
    assert status.direct


def test_segments_are_made_one_a_batch_and_never_twice(rig: Rig) -> None:
    rig.make(1, SLOT)
    with pytest.raises(AssertionError):
        rig.drives.submit([MakeSegment(1, SLOT, "a")])
