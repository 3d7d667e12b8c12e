"""Whole keys by their first digits: every block that begins so, of that namespace alone, however rows are cut."""

import pytest

from kvproto import control_pb2 as pb
from kvproto.limits import BEGINNINGS_PER_REQUEST, KEYS_PER_BEGINNING
from kvstore.insight import finding
from kvstore.insight.finding import BEGINNINGS_A_LOOK
from kvstore.insight.looking import Looking
from kvstore.sessions import Namespace
from kvstored.admin_find import find_keys, find_wish_of
from kvstored.admin_look import Asks
from tests.core import chain
from tests.unit.test_disk import put
from tests.unit.test_looking import begun


def found(ask: Asks, namespace: Namespace, *beginnings: str) -> list[tuple[list[bytes], bool]]:
    request = pb.FindKeysRequest(namespace_digest=namespace.digest.hex(), beginnings=beginnings)
    return [(sorted(one.keys), one.more) for one in find_keys(ask, find_wish_of(request)).found]


def alike(count: int, differ_at: int) -> list[bytes]:
    """Keys that are the same but for one byte."""
    return [bytes(differ_at) + bytes([1 + number]) + bytes(31 - differ_at) for number in range(count)]


def test_a_key_is_found_by_its_first_digits_whatever_slice_it_lies_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "SLICE_ROWS", 7)
    _core, client, namespace, ask = begun()
    keys = chain(25)
    put(client, namespace, keys)
    for digits in (8, 12, 16, 17, 33, 64):
        named = [key.hex()[:digits] for key in keys]
        assert found(ask, namespace, *named) == [([key], False) for key in keys]
    assert ask.questions > 6 * 4, "the owner did something else in between"
    assert found(ask, namespace, "00000000") == [([], False)]


@pytest.mark.parametrize(("differ_at", "digits"), [(4, 8), (7, 14), (8, 16), (12, 24), (31, 62)])
def test_keys_that_begin_alike_are_told_and_one_digit_more_tells_them_apart(differ_at: int, digits: int) -> None:
    _core, client, namespace, ask = begun()
    keys = alike(3, differ_at)
    put(client, namespace, keys)
    assert found(ask, namespace, "0" * digits) == [(sorted(keys), False)]
    assert found(ask, namespace, keys[1].hex()[: digits + 2]) == [([keys[1]], False)]


def test_of_many_that_begin_alike_a_few_are_listed() -> None:
    _core, client, namespace, ask = begun()
    put(client, namespace, alike(KEYS_PER_BEGINNING, 20))
    ((listed, more),) = found(ask, namespace, "00000000")
    assert (len(listed), more) == (KEYS_PER_BEGINNING, False)
    put(client, namespace, alike(KEYS_PER_BEGINNING + 5, 20))
    ((listed, more),) = found(ask, namespace, "00000000")
    assert (len(listed), more) == (KEYS_PER_BEGINNING, True)


def test_many_beginnings_of_many_keys_alike_do_not_hold_the_owner_up() -> None:
    core, client, namespace, ask = begun()
    put(client, namespace, alike(3 * KEYS_PER_BEGINNING, 20))
    wanted = ["0" * 40] * BEGINNINGS_PER_REQUEST
    assert len(found(ask, namespace, *wanted)) == BEGINNINGS_PER_REQUEST
    assert ask.questions == 1 + BEGINNINGS_PER_REQUEST // BEGINNINGS_A_LOOK
    looking = Looking(core.store)
    lists, _ = looking.keys_beginning(looking.begin(None, namespace.digest), 1, wanted)
    assert [len(keys) for keys in lists] == [KEYS_PER_BEGINNING + 1] * BEGINNINGS_A_LOOK, "nobody lists more of them"


def test_other_namespaces_and_dropped_blocks_are_not_found() -> None:
    core, client, namespace, ask = begun()
    other = client.open(model="other")
    put(client, namespace, chain(4))
    put(client, other, chain(4, "other"))
    theirs = chain(4, "other")[1]
    assert found(ask, namespace, theirs.hex()[:12]) == [([], False)]
    assert found(ask, other, theirs.hex()[:12]) == [([theirs], False)], "the control"
    gone = chain(4)[1:]
    client.delete(namespace, gone[:1])
    core.settle()
    assert found(ask, namespace, *(key.hex()[:12] for key in gone)) == [([], False)] * 3


def test_what_is_no_beginning_is_refused() -> None:
    _core, client, namespace, _ask = begun()
    put(client, namespace, chain(1))
    digest = namespace.digest.hex()
    for wrong in ([], ["abcdef0"], ["ABCDEF01"], ["abcdefgh"], ["a" * 65], ["ab" * 8] * (BEGINNINGS_PER_REQUEST + 1)):
        with pytest.raises(ValueError, match="beginning"):
            find_wish_of(pb.FindKeysRequest(namespace_digest=digest, beginnings=wrong))
