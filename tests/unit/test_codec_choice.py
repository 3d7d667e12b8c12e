"""What `disk.codec auto` makes of measured ratios and of how busy the host is, and a store that goes by it."""

from collections.abc import Sequence

import numpy as np
import pytest

from kvproto.errors import Grant
from kvproto.identity import NamespaceIdentity
from kvproto.limits import MIB, PAGE_BYTES
from kvstore.sessions import Namespace
from kvstore.tier.codec import GOOD_RATIO, IDLE_SHARE, SIXTEEN_BITS, TRY_EVERY, Choice, Wish
from kvstore.tier.demotion import Admission
from kvstore.tier.disk import DiskLimits
from kvstore.tier.format import Codec
from kvstore.tier.orders import Order, Pack
from tests.core import Client, Core, chain
from tests.drive import FakeDrive

BLOCK_BYTES = 4 * PAGE_BYTES
PACKED, RAW = Codec.BF16_PLANES_ZSTD, Codec.RAW
TOO_BUSY = IDLE_SHARE - 0.01


def namespace(dtype: str = "bf16", model: str = "m") -> Namespace:
    core = Core()
    client = core.client()
    if model != "m":  # another number
        client.open()
    return core.store.open(client.session, NamespaceIdentity(model, "e", "l", dtype, 16, BLOCK_BYTES))


def batches(choice: Choice, of: Namespace, drive: FakeDrive, count: int) -> list[Codec]:
    """What the next so many batches are told."""
    return [choice.codec_for(of, drive) for _ in range(count)]


def learn(choice: Choice, of: Namespace, ratio: float, times: int = 1) -> None:
    for _ in range(times):
        choice.learn(of, 1000, round(1000 * ratio))


# -- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.5, GOOD_RATIO])
def test_what_packs_well_is_packed_as_long_as_processors_are_idle(ratio: float) -> None:
    choice, mine, drive = Choice(Wish.AUTO), namespace(), FakeDrive(0)
    assert choice.ratio(mine) is None
    assert batches(choice, mine, drive, 1) == [PACKED], "nobody knows yet: it is tried"
    assert choice.ratio(mine) is None, "the try is not over"
    learn(choice, mine, ratio)
    assert choice.ratio(mine) == ratio
    assert set(batches(choice, mine, drive, 3 * TRY_EVERY)) == {PACKED}


def test_on_a_busy_host_nothing_is_packed_until_it_is_idle_again() -> None:
    choice, mine, drive = Choice(Wish.AUTO), namespace(), FakeDrive(0)
    batches(choice, mine, drive, 1)
    learn(choice, mine, 0.5)
    for idle, told in ((TOO_BUSY, RAW), (IDLE_SHARE, PACKED), (0.0, RAW), (1.0, PACKED)):
        drive.idle = idle
        assert set(batches(choice, mine, drive, 2 * TRY_EVERY)) == {told}, "tries do not need to wait for idle, either"


def test_what_packs_badly_is_raw_and_tried_again_now_and_then() -> None:
    choice, mine, drive = Choice(Wish.AUTO), namespace(), FakeDrive(0)
    told = []
    for _ in range(3 * TRY_EVERY):
        told.append(choice.codec_for(mine, drive))
        if told[-1] is PACKED:
            learn(choice, mine, GOOD_RATIO + 0.01)
    tries = [number for number, codec in enumerate(told) if codec is PACKED]
    assert tries == [0, TRY_EVERY, 2 * TRY_EVERY]


def test_a_host_that_is_busy_when_it_is_time_for_a_try_tries_the_next_time() -> None:
    choice, mine, drive = Choice(Wish.AUTO), namespace(), FakeDrive(0, idle=TOO_BUSY)
    assert batches(choice, mine, drive, 1) == [RAW]
    drive.idle = 1.0
    assert batches(choice, mine, drive, TRY_EVERY) == [RAW] * (TRY_EVERY - 1) + [PACKED]


def test_a_model_that_begins_to_pack_well_is_packed_and_one_that_ceases_to_is_not() -> None:
    """The ratio is an average: one block does not turn it."""
    choice, mine, drive = Choice(Wish.AUTO), namespace(), FakeDrive(0)
    batches(choice, mine, drive, 1)
    learn(choice, mine, 1.0)
    learn(choice, mine, 0.6)
    assert batches(choice, mine, drive, 1) == [RAW]
    learn(choice, mine, 0.6, times=10)
    assert batches(choice, mine, drive, 1) == [PACKED]
    learn(choice, mine, 1.0)
    assert batches(choice, mine, drive, 1) == [PACKED]
    learn(choice, mine, 1.0, times=10)
    assert batches(choice, mine, drive, 1) == [RAW]


def test_each_namespace_has_a_ratio_of_its_own() -> None:
    choice, good, bad, drive = Choice(Wish.AUTO), namespace(), namespace(model="other"), FakeDrive(0)
    assert good.number != bad.number
    for mine, ratio in ((good, 0.5), (bad, 1.0)):
        assert batches(choice, mine, drive, 1) == [PACKED]
        learn(choice, mine, ratio)
    assert batches(choice, good, drive, 1) == [PACKED]
    assert batches(choice, bad, drive, 1) == [RAW]


@pytest.mark.parametrize("dtype", ["uint8", "float32", "fp8_e4m3", "bf1"])
def test_other_than_sixteen_bits_is_never_tried(dtype: str) -> None:
    choice, mine, drive = Choice(Wish.AUTO), namespace(dtype), FakeDrive(0)
    assert set(batches(choice, mine, drive, 2 * TRY_EVERY)) == {RAW}


@pytest.mark.parametrize("dtype", [*SIXTEEN_BITS, "BFloat16"])
def test_sixteen_bits_are_tried_by_whatever_name(dtype: str) -> None:
    assert batches(Choice(Wish.AUTO), namespace(dtype), FakeDrive(0), 1) == [PACKED]


@pytest.mark.parametrize(("wish", "told"), [(Wish.RAW, RAW), (Wish.BF16_PLANES_ZSTD, PACKED)])
def test_what_an_operator_fixed_holds_whatever_is_measured(wish: Wish, told: Codec) -> None:
    for dtype in ("bf16", "uint8"):
        choice, mine = Choice(wish), namespace(dtype)
        for idle in (0.0, 1.0):
            for ratio in (0.5, 1.0):
                learn(choice, mine, ratio)
                assert set(batches(choice, mine, FakeDrive(0, idle=idle), 2 * TRY_EVERY)) == {told}


# -- a store that goes by it -----------------------------------------------------------------------------------------


def store_noise(client: Client, of: Namespace, keys: Sequence[bytes]) -> None:
    """Blocks that do not pack."""
    noise = np.random.default_rng(1)
    answers = client.reserve(of, keys)
    for answer in answers:
        assert answer.grant is Grant.GRANTED
        client.fill(of, answer, noise.bytes(BLOCK_BYTES))
    client.commit([answer.ticket for answer in answers])
    client.core.work_all()


def serving() -> tuple[Core, Client]:
    """A store with a disk that is written with codec auto."""
    limits = DiskLimits(32 * MIB, 4 * MIB, Admission.ALL, codec=Wish.AUTO, row_bytes=2 * PAGE_BYTES)
    core = Core(arenas=16, arena_bytes=64 * PAGE_BYTES, disk=limits)
    return core, core.client()


@pytest.mark.parametrize("idle", [1.0, TOO_BUSY], ids=["idle", "busy"])
def test_a_store_packs_what_packs_well_on_an_idle_host_only(idle: float) -> None:
    core, client = serving()
    core.drive.idle = idle
    mine = client.open(block_bytes=BLOCK_BYTES)
    for turn in range(3):
        assert client.put(mine, chain(4, turn)) == [Grant.GRANTED] * 4
        core.work_all()
    tally = core.store.disk.demotion.tally
    assert (tally.saved, tally.packed) == (12, 12 if idle == 1.0 else 0)
    told = {header.codec for header in core.drive.headers()}
    assert told == ({PACKED} if idle == 1.0 else {RAW})


def test_a_store_tries_noise_once_in_a_while_and_writes_it_raw() -> None:
    core, client = serving()
    mine = client.open(block_bytes=BLOCK_BYTES)
    store_noise(client, mine, chain(4, "noise"))
    assert core.store.disk.choice.ratio(mine) == 1.0, "it was tried"
    packs: list[Order] = []
    core.drive.fault = lambda order: packs.append(order) if isinstance(order, Pack) else None  # it fails none
    for turn in range(TRY_EVERY):
        store_noise(client, mine, chain(1, turn))
    assert 1 <= len(packs) <= 2, "more than one only where a block had to wait for a segment"
    tally = core.store.disk.demotion.tally
    assert (tally.saved, tally.packed) == (4 + TRY_EVERY, 0)
    assert {header.codec for header in core.drive.headers()} == {RAW}
