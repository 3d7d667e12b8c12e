"""Frames of mode daemon: what is built is parsed as it was, and nothing else is."""

import pytest

from kvproto import device_frames, frames
from kvproto.device_frames import (
    NO_END,
    UNTIL_NS_MAX,
    Attach,
    Fate,
    Loaded,
    Opens,
    Piece,
    SharedHandle,
    State,
)
from kvproto.errors import LimitError, ProtocolError
from kvproto.frames import Head, Verb
from tests.raw import key

ATTACH = Attach(
    bytes(range(16)),
    [SharedHandle(1 << 20, Opens.IPC, b"text\0with zeros"), SharedHandle(4096, Opens.DESCRIPTOR)],
    [Piece(0, 16, 4096), Piece(1, 0, 0), Piece(0, (1 << 64) - 16, 1 << 40)],
    4096,
    77,
)
KEYS = b"".join(map(key, range(3)))


def parsed(frame: bytes) -> tuple[bytes, Head]:
    return frame, frames.parse_head(frame, len(frame))


def test_every_frame_comes_back_as_it_was() -> None:
    assert device_frames.parse_attach(*parsed(device_frames.build_attach(1, ATTACH, [5]))) == ATTACH
    frame = device_frames.build_load(1, 2, 3, [4, 5, 6], KEYS, wait_ns=7, groups=8, releases=[9])
    load = device_frames.parse_load(*parsed(frame))
    assert load[:5] == (2, 3, 7, 8, (4, 5, 6))
    assert frame[load.keys_at :] == KEYS
    assert load.keys_at % 8 == 0
    for parent in (None, key(9)):
        frame = device_frames.build_save(1, 2, 3, [4, 5, 6], KEYS, parent=parent, recompute_us=10)
        save = device_frames.parse_save(*parsed(frame))
        assert (save[:5], save.until_ms) == ((2, 3, 10, parent, (4, 5, 6)), 0)
        assert frame[save.keys_at :] == KEYS
    loaded = Loaded(1 << 63, 1024, 256, State.CANCELLED)
    assert device_frames.parse_loaded(*parsed(device_frames.build_loaded(loaded))) == loaded
    fates = [*Fate]
    assert device_frames.parse_saved(*parsed(device_frames.build_saved(5, fates))) == (5, fates)
    moving = device_frames.build_transfer(Verb.MOVING, 1, 6)
    assert device_frames.parse_transfer(*parsed(moving)) == 6


@pytest.mark.parametrize("now_ns", [0, 10**9, (1 << 32) * 10**6 - 1, (1 << 32) * 10**6, 10**18])
def test_until_when_a_save_is_good_comes_back_to_the_millisecond_and_never_later(now_ns: int) -> None:
    for away_ns in (0, 1, 10**6, 5 * 10**9, UNTIL_NS_MAX):
        for until_ns in (now_ns - away_ns, now_ns + away_ns):
            frame = device_frames.build_save(1, 2, 3, [4], KEYS[:32], parent=None, until_ns=until_ns)
            said_ns = device_frames.deadline_of(device_frames.parse_save(*parsed(frame)), now_ns)
            assert until_ns - 2 * 10**6 < said_ns <= until_ns
    for frame in (
        device_frames.build_save(1, 2, 3, [4], KEYS[:32], parent=None),
        device_frames.build_save(1, 2, 3, [4], KEYS[:32], parent=None, until_ns=NO_END),
    ):
        assert device_frames.deadline_of(device_frames.parse_save(*parsed(frame)), now_ns) == NO_END


@pytest.mark.parametrize("cut", [1, 8, 24, 32, 63, 80])
def test_a_body_that_is_cut_short_is_an_error(cut: int) -> None:
    whole = (
        device_frames.build_attach(1, ATTACH),
        device_frames.build_load(1, 2, 3, [4, 5, 6], KEYS, wait_ns=7, groups=8),
        device_frames.build_save(1, 2, 3, [4, 5, 6], KEYS, parent=None),
    )
    parse = (device_frames.parse_attach, device_frames.parse_load, device_frames.parse_save)
    for frame, parser in zip(whole, parse, strict=True):
        head = frames.parse_head(frame, len(frame))
        body = frame[16 : len(frame) - cut]
        shorter = frames.build(Verb(head.verb), 1, body, count=head.count)
        with pytest.raises(ProtocolError):
            parser(*parsed(shorter))


def test_numbers_that_are_none_are_errors() -> None:
    handle = device_frames.HANDLE_ITEM.pack(4096, 9, 0, b"")
    head = device_frames.ATTACH_HEAD.pack(bytes(16), 1, 0, 1, 0, 16)
    with pytest.raises(ProtocolError, match="kind 9"):
        device_frames.parse_attach(*parsed(frames.build(Verb.ATTACH, 1, head + handle)))
    item = device_frames.HANDLE_ITEM.pack(4096, 1, 65, b"")
    with pytest.raises(ProtocolError, match="text of 65"):
        device_frames.parse_attach(*parsed(frames.build(Verb.ATTACH, 1, head + item)))
    for body in (
        device_frames.LOADED_BODY.pack(1, 1025, 0, 0),
        device_frames.LOADED_BODY.pack(1, 1, 257, 0),
        device_frames.LOADED_BODY.pack(1, 1, 1, 4),
    ):
        with pytest.raises(ProtocolError):
            device_frames.parse_loaded(*parsed(frames.build(Verb.LOADED, 0, body)))
    with pytest.raises(ProtocolError):
        device_frames.parse_saved(*parsed(device_frames.build_saved(1, [11])))
    for wait_ns, groups in ((1 << 60, 1), (0, 0), (0, 257)):
        frame = device_frames.build_load(1, 2, 3, [4], key(1), wait_ns=wait_ns, groups=groups)
        with pytest.raises(LimitError):
            device_frames.parse_load(*parsed(frame))
    with pytest.raises(LimitError, match="do not fit"):
        device_frames.build_attach(1, ATTACH._replace(pieces=[Piece(0, 0, 16)] * 3000))
