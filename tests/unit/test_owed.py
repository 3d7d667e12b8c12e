"""What could not be erased is noted before DELETE is answered, and erased by the start that sees it again."""

import errno
from pathlib import Path

import pytest

from kvstore import survey
from kvstore.report import ClearScope
from kvstore.sessions import Namespace
from kvstore.tier.format import HEADER_BYTES
from kvstore.tier.orders import EVERY, WHOLE, Erase, Order, Outcome, Owe
from kvstored import index_owed
from kvstored import owed as owed_module
from kvstored.index import Index
from kvstored.index_marks import OWED, DamagedError
from kvstored.index_owed import carry_out
from kvstored.index_scan import Scan, scan
from kvstored.owed import PLACES, STORES, TENANTS, Owed, Sight, note_life, note_owed, read_owed, runs_of, write_owed
from tests.core import Client, Core, chain
from tests.segments import block, make_segment, path_of
from tests.unit.test_disk import begin, fetch, make, put, successor

STORE = b"s" * 16


def hidden(*directories: Path) -> Sight:
    """Nobody has seen anything of these."""
    return Sight(hidden=frozenset(map(str, directories)))


def refuses(core: Core, *kinds: type[Order]) -> None:
    """Its drive refuses these."""
    core.drive.fault = lambda order: Outcome.FAILED if isinstance(order, kinds) else None


def recovered(core: Core, keys: list[bytes]) -> int:
    """How many blocks of a chain a later life finds by headers."""
    core.drive.rebuild()
    after = successor(core)
    client, namespace = begin(after)
    return fetch(client, namespace, keys)


def test_what_could_not_be_erased_is_noted_before_the_answer_and_erased_by_a_start() -> None:
    core = make()
    client, namespace = begin(core)
    keys, others = chain(2, "deleted"), chain(2, "other")
    put(client, namespace, keys)
    put(client, namespace, others)
    refuses(core, Erase)
    answers = client.delete(namespace, keys[:1])
    core.finish_all()
    while not any(isinstance(batch[0], Owe) for batch in core.drive.waiting):
        core.work()
    assert answers == [], "not before it is noted"
    core.work_all()
    assert answers == [2]
    assert len(core.drive.owed) == 2
    core.audit()
    core.drive.fault = lambda _order: None
    assert recovered(core, keys) == 0
    assert recovered(core, others) == 2, "the control"
    assert not core.drive.owed, "done, and forgotten"


def test_a_place_that_is_noted_is_not_written_in_this_life() -> None:
    core = make()
    client, namespace = begin(core)
    keys = chain(2, "deleted")
    put(client, namespace, keys)
    assert survey.disk_tier(core.store).blocks == 2
    refuses(core, Erase)
    client.delete(namespace, keys[:1])
    core.finish_all()
    core.work_all()
    assert survey.disk_tier(core.store).blocks == 0, "what is nobody's is no block"
    core.drive.fault = lambda _order: None
    later = chain(14, "later")
    put(client, namespace, later)
    written = {(header.segment, header.slot) for header in core.drive.headers() if header.key in later}
    assert written
    assert not written & core.drive.owed
    assert recovered(core, later) == 14


def test_where_it_cannot_be_noted_either_the_answer_comes_all_the_same_and_the_next_one_tries_again() -> None:
    core = make()
    client, namespace = begin(core)
    put(client, namespace, chain(1, "first"))
    put(client, namespace, chain(1, "second"))
    refuses(core, Erase, Owe)
    answers = client.delete(namespace, chain(1, "first"))
    core.finish_all()
    core.work_all()
    assert answers == [1]
    assert not core.drive.owed
    refuses(core, Erase)
    answers = client.delete(namespace, chain(1, "second"))
    core.finish_all()
    core.work_all()
    assert answers == [1]
    assert len(core.drive.owed) == 2
    core.audit()


class TestFile:
    def test_holds_what_was_noted_by_store(self, tmp_path: Path) -> None:
        path = tmp_path / "state" / OWED
        assert read_owed(path).stores == {}
        note_owed(path, STORE, {(1, 2), (3, WHOLE)})
        note_owed(path, STORE, {(1, 4)})
        note_owed(path, b"t" * 16, {(9, 9)})
        assert read_owed(path).stores == {STORE.hex(): {(1, 2), (1, 4), (3, WHOLE)}, (b"t" * 16).hex(): {(9, 9)}}
        assert path.stat().st_mode & 0o777 == 0o600

    def test_that_is_damaged_is_said_and_left(self, tmp_path: Path) -> None:
        path = tmp_path / OWED
        note_owed(path, STORE, {(1, 2)})
        whole = path.read_bytes()
        for at in range(len(whole)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(DamagedError, match="nobody knows what was deleted"):
                note_owed(path, STORE, {(3, 4)})
            path.write_bytes(whole[:at])
            with pytest.raises(DamagedError):
                read_owed(path)
        path.write_bytes(whole)
        assert read_owed(path).stores == {STORE.hex(): {(1, 2)}}, "the control"

    def test_keeps_its_numbers_from_other_segments(self, tmp_path: Path) -> None:
        path = tmp_path / OWED
        assert read_owed(path).beyond(STORE) == 0
        note_owed(path, STORE, {(1, 2), (7, WHOLE)})
        make_segment(tmp_path, 3, 4, store=STORE)
        for owed, first in ((path, 8), (None, 4)):
            index = Index([tmp_path], lambda: None, owed=owed)
            index._lose("no child can be started")
            loaded = index.take_loaded()
            assert loaded is not None
            assert loaded.next_segment == first
            index.stop()

    def test_is_bounded(self, tmp_path: Path) -> None:
        path = tmp_path / OWED
        with pytest.raises(OSError, match="segments"):
            note_owed(path, STORE, {(number, 0) for number in range(PLACES + 1)})
        for number in range(STORES + 1):
            note_owed(path, bytes([number]) * 16, {(1, 1)})
        assert len(read_owed(path).stores) == STORES
        assert bytes(16).hex() not in read_owed(path).stores

    def test_that_is_full_notes_segments_with_the_most_places_as_a_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(owed_module, "PLACES", 10)
        path = tmp_path / OWED
        fits = {(1, slot) for slot in range(4)} | {(2, slot) for slot in range(5)} | {(3, WHOLE)}
        assert note_owed(path, STORE, fits) == []
        assert note_owed(path, STORE, {(3, 7)}) == [], "all of that is noted"
        assert read_owed(path).of(STORE) == fits
        assert note_owed(path, STORE, {(4, 0)}) == [2]
        assert read_owed(path).of(STORE) == {*((1, slot) for slot in range(4)), (2, WHOLE), (3, WHOLE), (4, 0)}
        assert note_owed(path, STORE, {(5, 0), (6, 0), (7, 0), (2, 9)}) == [], "there is room again"
        assert note_owed(path, STORE, {(number, 0) for number in (8, 9)}) == [1]
        assert note_owed(path, STORE, {(10, WHOLE)}) == []
        with pytest.raises(OSError, match="more than 10 segments"):
            note_owed(path, STORE, {(11, WHOLE)})
        assert read_owed(path).of(STORE) >= {(1, WHOLE), (2, WHOLE), (10, WHOLE), (9, 0)}, "as it was"

    def test_knows_what_was_seen_as_far_as_there_is_room(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of what is not known there, all of the tenant goes."""
        path = tmp_path / OWED
        tenants = {
            f"tenant {number}": Sight(runs_of(range(number, 40, 2)), frozenset({"/a"}), 40 + number // 2)
            for number in range(4)
        }
        write_owed(path, Owed(tenants=tenants))
        assert read_owed(path).tenants == tenants
        monkeypatch.setattr(owed_module, "RUNS", 40)
        write_owed(path, Owed(tenants=tenants))
        assert [bool(sight.seen) for sight in read_owed(path).tenants.values()] == [False, False, True, True]
        assert all(sight.hidden for sight in read_owed(path).tenants.values())


class TestSight:
    """By numbers of segments."""

    def test_says_which_it_has_not_seen(self) -> None:
        numbers = [1, 2, 3, 7, 9, 10]
        assert runs_of(reversed(numbers)) == ((1, 4), (7, 8), (9, 11))
        assert runs_of([4, 8, 20], runs_of(numbers)) == ((1, 5), (7, 11), (20, 21))
        for before, beyond in ((12, []), (None, [12, 13])):
            sight = Sight(runs_of(numbers), frozenset({"/a"}), before)
            assert [number for number in range(14) if sight.hides(number)] == [0, 4, 5, 6, 8, 11, *beyond]

    def test_forgets_a_directory_where_something_was_that_it_had_not_seen(self) -> None:
        sight = Sight(((1, 3),), frozenset({"/a", "/b"}), 10)
        nothing: list[dict[str, list[int]]] = [{"/a": []}, {"/a": [1, 2, 10, 11]}, {"/c": [5]}]
        for found in nothing:
            assert sight.less(found, ()) == sight, found
        once = sight.less({"/a": [1, 5, 6, 11]}, {5})
        assert once.hidden == {"/b"}
        assert once.less({"/b": [1, 6]}, ()) == once, "the same drive, at another place"
        assert once.less({"/b": [5]}, {5}).hidden == frozenset(), "a copy of what was removed goes, too"


class TestEverything:
    """Nobody knows which segments there are: all of a tenant is to go."""

    def blind(self) -> tuple[Core, Client, Namespace, str]:
        """A store that has no disk in this life, though there is one."""
        core = make()
        client, namespace = begin(core)
        core.store.disk.switch_off()
        return core, client, namespace, client.session.tenant.name

    def test_is_noted_before_the_answer_and_once(self) -> None:
        core, client, namespace, tenant = self.blind()
        answers = client.delete(namespace, chain(1, "a"))
        core.finish_all()
        while not any(isinstance(batch[0], Owe) for batch in core.drive.waiting):
            core.work()
        assert answers == [], "not before it is noted"
        core.work_all()
        assert (answers, core.drive.owed, core.drive.owed_tenants) == ([0], set(), {tenant})
        core.drive.owed_tenants.clear()
        assert client.delete(namespace, chain(1, "b")) == [0], "it is noted"
        assert not core.drive.owed_tenants

    def test_is_tried_again_where_that_could_not_be_noted(self) -> None:
        core, client, namespace, tenant = self.blind()
        refuses(core, Owe)
        answers = client.delete(namespace, chain(1, "a"))
        core.finish_all()
        core.work_all()
        assert (answers, core.drive.owed_tenants) == ([0], set())
        core.drive.fault = lambda _order: None
        client.delete(namespace, chain(1, "b"))
        core.finish_all()
        core.work_all()
        assert core.drive.owed_tenants == {tenant}

    @pytest.mark.parametrize("everything", [True, False])
    def test_is_that_of_whom_an_operator_clears(self, everything: bool) -> None:
        core, _, _, tenant = self.blind()
        cleared: list[object] = []
        core.store.clear(ClearScope(None if everything else tenant), cleared.append, dry_run=True)
        core.finish_all()
        core.work_all()
        assert core.drive.owed_tenants == set(), "a dry run"
        core.store.clear(ClearScope(None if everything else tenant), cleared.append, dry_run=False)
        core.finish_all()
        core.work_all()
        assert len(cleared) == 2
        assert core.drive.owed_tenants == {"" if everything else tenant}

    def test_is_not_noted_where_all_segments_are_known(self) -> None:
        core = make()
        client, namespace = begin(core)
        assert client.delete(namespace, chain(1, "a")) == [0]
        assert not core.drive.owed_tenants

    def test_goes_at_a_start_and_is_forgotten_once_no_directory_is_missing(self, tmp_path: Path) -> None:
        for segment, tenant in ((1, "chat"), (2, "batch"), (3, "chat")):
            make_segment(tmp_path, segment, 4, [block(segment, segment, 0)], tenant=tenant)
        note, other = tmp_path / "state" / OWED, tmp_path / "other"
        note_owed(note, b"", {EVERY}, "chat", hidden(tmp_path, other))
        found = scan([tmp_path, other], {other: "not mounted"})
        places, unfit = carry_out(note, found)
        assert (places, unfit, sorted(found.segments)) == ({(1, WHOLE), (3, WHOLE)}, [], [2])
        assert not path_of(tmp_path, 1).exists()
        assert path_of(tmp_path, 2).exists(), "the control"
        note_life(note, 4)
        assert list(read_owed(note).tenants) == ["chat"], "there may be more"

        make_segment(tmp_path, 5, 4, [block(5, 5, 0)], tenant="chat")
        assert carry_out(note, scan([tmp_path])) == (set(), []), "it is of a later life"
        make_segment(other, 3, 4, [block(3, 3, 0)], tenant="chat")
        make_segment(other, 6, 4, [block(6, 6, 0)], tenant="chat")
        found = scan([tmp_path, other])
        assert carry_out(note, found)[0] == {(3, WHOLE)}, "and 6 is later, too"
        note_life(note, 7)
        assert read_owed(note).tenants == {}

    def test_stays_noted_while_the_directory_is_not_configured(self, tmp_path: Path) -> None:
        here, there = tmp_path / "a", tmp_path / "b"
        note = tmp_path / "state" / OWED
        note_owed(note, b"", {EVERY}, "chat", hidden(there))
        make_segment(here, 1, 4, [block(1, 1, 0)], tenant="chat")
        found = scan([here])
        carry_out(note, found)
        note_life(note, 2)
        make_segment(tmp_path / "b at another place", 0, 4, [block(1, 1, 0)], tenant="chat")
        found = scan([here, tmp_path / "b at another place"])
        assert carry_out(note, found)[0] == {(0, WHOLE)}
        assert list(read_owed(note).tenants) == ["chat"]

    def test_that_is_deleted_again_in_a_later_life_is_what_is_hidden_then(self) -> None:
        first = Sight(((1, 3),), frozenset({"/b"}), 10)
        assert Sight(((1, 12),), frozenset({"/b"}), 20).after(first) == Sight(((1, 12),), frozenset({"/b"}), 20)
        assert Sight((), frozenset({"/a"}), None).after(first) == hidden(Path("/a"), Path("/b"))

    def test_stays_noted_of_what_could_not_be_removed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make_segment(tmp_path, 1, 4, [block(1, 1, 0)])
        make_segment(tmp_path, 2, 4, [block(2, 2, 0)])
        note = tmp_path / "state" / OWED
        note_owed(note, b"", {EVERY}, "", hidden(tmp_path))
        found = scan([tmp_path])

        def refused(_path: Path) -> None:
            raise OSError(errno.EROFS, "the drive refuses")

        monkeypatch.setattr(index_owed, "sync_folder", refused)
        _, unfit = carry_out(note, found)
        assert sorted(unfit) == [1, 2]
        assert read_owed(note).of(found.store) == {(1, WHOLE), (2, WHOLE)}

    def test_stays_noted_where_that_cannot_be_noted_either(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its directory is forgotten together with that, or not at all."""
        make_segment(tmp_path, 1, 4, [block(1, 1, 0)])
        note = tmp_path / "state" / OWED
        note_owed(note, b"", {EVERY}, "acme", hidden(tmp_path))

        def refused(*_: object) -> None:
            raise OSError(errno.EROFS, "it refuses")

        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", refused)
            patched.setattr(index_owed, "write_owed", refused)
            assert carry_out(note, scan([tmp_path])) == ({(1, WHOLE)}, [1])
        note_life(note, 2)
        assert list(read_owed(note).tenants) == ["acme"]
        found = scan([tmp_path])
        assert carry_out(note, found) == ({(1, WHOLE)}, [])
        assert not path_of(tmp_path, 1).exists()
        assert read_owed(note).tenants == {}

    def test_of_many_is_that_of_all(self, tmp_path: Path) -> None:
        path = tmp_path / OWED
        for number in range(3):
            note_owed(path, b"", {EVERY}, f"tenant {number}", hidden(tmp_path))
        assert read_owed(path).is_whole("tenant 1", 1)
        assert not read_owed(path).is_whole("another one", 1)
        sight = Sight((), frozenset({"/a"}), 9)
        write_owed(path, Owed(tenants={f"tenant {number}": sight for number in range(TENANTS)}))
        note_owed(path, b"", {EVERY}, "tenant 1", sight)
        assert len(read_owed(path).tenants) == TENANTS
        note_owed(path, b"", {EVERY}, "one more", Sight(((3, 4),), frozenset({"/b"}), 7))
        assert read_owed(path).tenants == {"": Sight(((3, 4),), frozenset({"/a", "/b"}), 9)}
        assert read_owed(path).is_whole("another one", 8)
        assert not read_owed(path).is_whole("another one", 3)
        assert not read_owed(path).is_whole("another one", 9)


class TestStart:
    """What a start does with the note, on segments of a real folder."""

    def prepared(self, tmp_path: Path) -> tuple[Path, Scan]:
        """Three segments with a block each. Noted: a slot, a whole one, one that is not there, and another store's."""
        for segment in (1, 2, 3):
            make_segment(tmp_path, segment, 4, [block(segment, segment, 0)])
        note = tmp_path / "state" / OWED
        found = scan([tmp_path])
        assert found.store is not None
        note_owed(note, found.store, {(1, 0), (2, WHOLE), (9, WHOLE)})
        note_owed(note, b"another store...", {(3, 0)})
        return note, found

    def test_erases_what_it_sees_and_forgets_it(self, tmp_path: Path) -> None:
        note, found = self.prepared(tmp_path)
        store = (found.store or b"").hex()
        places, unfit = carry_out(note, found)
        assert ((1, 0) in places, unfit, found.next_segment) == (True, [], 10)
        assert sorted(found.segments) == [1, 3]
        assert not path_of(tmp_path, 2).exists()
        assert self.headers(found) == {3}, "another store's note is not ours, and the control"
        assert read_owed(note).stores[store] == {(9, WHOLE)}

    def test_leaves_out_of_this_life_what_it_cannot_erase(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        note, found = self.prepared(tmp_path)

        def refused(*_: object) -> None:
            raise OSError(errno.EIO, "the drive refuses")

        monkeypatch.setattr(index_owed, "erase_headers", refused)
        _, unfit = carry_out(note, found)
        assert unfit == [1]
        assert read_owed(note).stores[(found.store or b"").hex()] == {(1, 0), (9, WHOLE)}, "and tries again"

    def test_uses_nothing_of_which_the_note_still_says_that_it_is_owed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Or what is written there in this life would be erased by the next one."""
        note, found = self.prepared(tmp_path)

        def refused(*_: object) -> None:
            raise OSError(errno.EROFS, "the folder of state is read-only")

        monkeypatch.setattr(index_owed, "write_owed", refused)
        _, unfit = carry_out(note, found)
        assert (unfit, sorted(found.segments), found.next_segment) == ([1], [1, 3], 10)

    def headers(self, found: Scan) -> set[int]:
        """Segments of which the first slot has a header."""
        return {
            number
            for number, segment in found.segments.items()
            if any(segment.path.read_bytes()[segment.header_offset(0) :][:HEADER_BYTES])
        }
