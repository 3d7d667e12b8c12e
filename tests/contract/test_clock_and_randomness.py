"""What the store relies on in a clock and in randomness: the host's and the fakes keep to it alike."""

import time

import pytest

from kvstore.ports import Clock, Randomness
from kvstored.daemon import HostClock, HostRandomness
from tests.fakes import FakeClock, FakeRandomness

clocks = pytest.mark.parametrize("clock", [HostClock(), FakeClock()], ids=["host", "fake"])
sources = pytest.mark.parametrize("source", [HostRandomness(), FakeRandomness(3)], ids=["host", "fake"])


@clocks
def test_the_clock_is_a_whole_number_of_nanoseconds_that_fits_the_wire(clock: Clock) -> None:
    now_ns = clock.now_ns()
    assert isinstance(now_ns, int)
    assert 0 < now_ns < 1 << 63


@clocks
def test_the_clock_never_goes_back(clock: Clock) -> None:
    readings = []
    for _ in range(1000):
        readings.append(clock.now_ns())
        if isinstance(clock, FakeClock):
            clock.advance(1)
    assert readings == sorted(readings)
    assert readings[-1] > readings[0]


def test_the_host_clock_is_the_one_that_clients_read() -> None:
    before_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    now_ns = HostClock().now_ns()
    assert before_ns <= now_ns <= time.clock_gettime_ns(time.CLOCK_MONOTONIC)


@sources
def test_words_have_64_bits_that_all_vary(source: Randomness) -> None:
    words = [source.word() for _ in range(256)]
    assert all(0 <= word < 1 << 64 for word in words)
    assert len(set(words)) == len(words)
    ones, zeros = 0, 0
    for word in words:
        ones, zeros = ones | word, zeros | ~word
    assert ones == (1 << 64) - 1
    assert zeros & ((1 << 64) - 1) == (1 << 64) - 1


def test_fake_randomness_repeats_itself_from_its_seed_and_the_hosts_does_not() -> None:
    assert [FakeRandomness(5).word() for _ in range(3)] == [FakeRandomness(5).word()] * 3
    assert FakeRandomness(5).word() != FakeRandomness(6).word()
    assert HostRandomness().word() != HostRandomness().word()
