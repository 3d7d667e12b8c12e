"""The second tier's blocks against a real daemon, without vLLM: which are there, and what comes back of them."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import kvclient
from kvclient.integrations import vllm_tier_chunks
from kvclient.integrations.vllm_tier_chunks import Chunk, Chunks, Group
from kvclient.results import Match, Tiers

ROW = 8192
TOKENS = 128
WHOLE, WINDOW = 0, 1  # groups


class Engine:
    """A first tier of 32 rows; row i of the original holds the bytes i + 1."""

    def __init__(self, client: kvclient.Client, name: str) -> None:
        spaces = [
            client.namespace(
                model=name, engine="none", layout=f"group {group}", dtype="int8", block_tokens=TOKENS, block_bytes=ROW
            )
            for group in (WHOLE, WINDOW)
        ]
        self.spaces = spaces
        self.rows: NDArray[np.int8] = np.repeat(np.arange(1, 33, dtype=np.int8)[:, None], ROW, axis=1)
        groups = {group: Group(spaces[group], spaces[group], TOKENS, group == WHOLE) for group in (WHOLE, WINDOW)}
        self.chunks = Chunks(groups, self.rows, disk_wait_s=5.0, patience_s=30.0)


@pytest.fixture
def engine(client: kvclient.Client, request: pytest.FixtureRequest) -> Engine:
    """With namespaces of its own."""
    name: str = request.node.name
    return Engine(client, name)


def chain(group: int, count: int) -> list[Chunk]:
    """The chunks of one prompt, in rows of their own."""
    keys = [hashlib.sha256(f"{group} {number}".encode()).digest() for number in range(count)]
    return [
        Chunk(key + bytes([group]), group, key, (number + 1) * TOKENS, keys[number - 1] if number else None,
              16 * group + number)
        for number, key in enumerate(keys)
    ]  # fmt: skip


def names(chunks: list[Chunk]) -> set[bytes]:
    return {chunk.name for chunk in chunks}


def settle(engine: Engine) -> None:
    for space in engine.spaces:
        space.flush(30.0)


def test_a_prefix_ends_at_its_first_hole_and_a_window_is_found_behind_one(engine: Engine) -> None:
    whole, window = chain(WHOLE, 6), chain(WINDOW, 6)
    assert engine.chunks.store([*whole[:4], window[0], *window[2:4]]) == 7
    settle(engine)
    assert engine.chunks.present(whole) == names(whole[:4])
    assert engine.chunks.present(window) == names([window[0], *window[2:4]])
    engine.chunks.store([*window[4:], whole[5]])
    settle(engine)
    found = engine.chunks.present(window[::-1] + whole)
    assert found == names([*whole[:4], window[0], *window[2:4]]), "behind the prefix's end nothing is of use"


def test_what_is_loaded_is_what_was_stored_and_what_is_missing_is_said(engine: Engine) -> None:
    whole, window = chain(WHOLE, 5), chain(WINDOW, 5)
    engine.chunks.store([*whole[:3], window[1], window[4]])
    settle(engine)
    original = engine.rows.copy()
    engine.rows[:] = 0
    good = engine.chunks.load(window[::-1] + whole)
    there = [*whole[:3], window[1], window[4]]
    assert good == names(there)
    for chunk in whole + window:
        same = np.array_equal(engine.rows[chunk.row], original[chunk.row])
        assert same is (chunk.name in good)
        assert not np.array_equal(engine.rows[chunk.row], original[chunk.row - 1]), "the control"


def test_a_chunk_whose_parent_is_not_there_is_stored_all_the_same(engine: Engine) -> None:
    whole = chain(WHOLE, 4)
    assert engine.chunks.store(whole[2:]) == 2
    settle(engine)
    assert engine.chunks.present(whole[2:]) == names(whole[2:])
    assert engine.chunks.present(whole) == set()


def test_a_chain_goes_from_its_end_and_a_window_by_itself(engine: Engine) -> None:
    whole, window = chain(WHOLE, 3), chain(WINDOW, 3)
    engine.chunks.store(whole + window)
    settle(engine)
    assert engine.spaces[WHOLE].delete([whole[0].key]) == 3, "what continues it goes too"
    assert engine.spaces[WINDOW].delete([window[0].key]) == 1
    assert engine.chunks.present(window) == names(window[1:])


def test_blocks_that_no_daemon_takes_are_not_there(client: kvclient.Client) -> None:
    space = client.namespace(model="odd", engine="none", layout="flat", dtype="int8", block_bytes=ROW)
    chunks = Chunks({0: Group(space, space, TOKENS, True)}, np.zeros((1, ROW), np.int8), disk_wait_s=1, patience_s=30)
    odd = replace(chain(WHOLE, 1)[0], key=b"short", row=0)
    assert (chunks.present([odd]), chunks.load([odd]), chunks.store([odd])) == (set(), set(), 0)


def test_without_a_daemon_nothing_is_there(tmp_path: object) -> None:
    with kvclient.connect(f"{tmp_path}/nowhere", timeout_s=0.01) as client:
        engine = Engine(client, "alone")
        whole = chain(WHOLE, 3)
        assert (engine.chunks.present(whole), engine.chunks.load(whole), engine.chunks.store(whole)) == (
            set(),
            set(),
            0,
        )


def test_a_job_waits_for_disk_as_long_as_one_request_may(monkeypatch: pytest.MonkeyPatch) -> None:
    now, waits = [1000.0], []

    class SlowDisk:
        """Has everything, and none of it comes in time."""

        def match(self, keys: list[bytes]) -> Match:
            return Match(len(keys), Tiers(disk=len(keys)), 0, None, None)

        @contextmanager
        def fetch(self, keys: list[bytes], wait_s: float, ttl_s: float) -> Iterator[SimpleNamespace]:
            def copy_to(_targets: object) -> bool:
                waits.append(wait_s)
                now[0] += min(wait_s, 0.5)
                return False

            assert ttl_s > 0
            yield SimpleNamespace(expected=len(keys), copy_to=copy_to, blocks=0, valid=lambda: True)

    monkeypatch.setattr(vllm_tier_chunks, "_clock", lambda: now[0])
    disk: Any = SlowDisk()
    groups = {number: Group(disk, disk, TOKENS, number == WHOLE) for number in (WHOLE, WINDOW)}
    chunks = Chunks(groups, np.zeros((32, ROW), np.int8), disk_wait_s=0.75, patience_s=0.02)
    assert chunks.load(chain(WHOLE, 12) + chain(WINDOW, 12)) == set()
    assert waits[:2] == [0.75, 0.25]
    assert not any(waits[2:])
    assert now[0] == 1000.75
