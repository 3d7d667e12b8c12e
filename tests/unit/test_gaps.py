"""Learned gaps against the plain list of what was observed."""

import struct

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.hints.gaps import EDGES_NS, SAMPLES_MAX, SAMPLES_MIN, UNKNOWN_NS, Gaps, deadline_ns
from kvstore.hints.limits import HOUR_S, NAME_CHARS, SECOND_NS, TOOLS
from kvstore.hints.refusal import Refusal, Refused

MS = 10**6
HOUR_NS = HOUR_S * SECOND_NS
WIDTH = 2 ** (1 / 8)

# Gaps of one tool, from the short to the endless: enough for a row of its own, too few to be halved.
SAMPLES = st.lists(st.integers(0, 2 * HOUR_NS) | st.integers(0, 20 * SECOND_NS), min_size=100, max_size=300)
BENEFIT = st.integers(0, HOUR_NS) | st.integers(0, 30 * SECOND_NS)


def learned(gaps_ns: list[int], tool: str = "tool") -> Gaps:
    gaps = Gaps()
    for gap_ns in gaps_ns:
        gaps.observed(tool, gap_ns)
    return gaps


def gain(samples: list[int], tau_ns: int, benefit_ns: int) -> float:
    """P(tau) * benefit - tau."""
    return sum(gap <= tau_ns for gap in samples) / len(samples) * benefit_ns - tau_ns


def best(samples: list[int], benefit_ns: int) -> int:
    """Continuum's tau* by trying every observed gap up to an hour, and 0."""
    return max([0, *sorted(g for g in samples if g <= HOUR_NS)], key=lambda tau: gain(samples, tau, benefit_ns))


# -- tau* -----------------------------------------------------------------------------------------------------------


@settings(derandomize=True, database=None, deadline=None, max_examples=15)
@given(bins=st.lists(st.integers(0, len(EDGES_NS)), min_size=100, max_size=200), benefit_ns=BENEFIT)
def test_of_gaps_on_the_edges_of_bins_tau_is_what_trying_all_gives(bins: list[int], benefit_ns: int) -> None:
    samples = [(*EDGES_NS, 2 * HOUR_NS)[at] for at in bins]
    tau_ns = learned(samples).worth_keeping_ns("tool", 0, benefit_ns)
    wanted = gain(samples, best(samples, benefit_ns), benefit_ns)
    if tau_ns:
        assert gain(samples, tau_ns, benefit_ns) == pytest.approx(wanted, abs=1)
    assert wanted == pytest.approx(max(gain(samples, tau_ns, benefit_ns) if tau_ns else 0, 0), abs=1)


@settings(derandomize=True, database=None, deadline=None, max_examples=15)
@given(samples=SAMPLES, benefit_ns=BENEFIT)
def test_of_any_gaps_tau_loses_no_more_than_the_width_of_a_bin(samples: list[int], benefit_ns: int) -> None:
    tau_ns = learned(samples).worth_keeping_ns("tool", 0, benefit_ns)
    tried_ns = best(samples, benefit_ns)
    found = gain(samples, tau_ns, benefit_ns) if tau_ns else 0.0
    assert found >= gain(samples, tried_ns, benefit_ns) - (WIDTH - 1) * tried_ns - MS
    assert found >= 0, "it is never dearer than letting go"


def test_a_tool_that_is_mostly_fast_is_waited_for_only_as_long_as_the_fast_calls_take() -> None:
    gaps = learned([SECOND_NS] * 90 + [600 * SECOND_NS] * 10)
    assert SECOND_NS <= gaps.worth_keeping_ns("tool", 0, 5 * SECOND_NS) <= WIDTH * SECOND_NS
    slow = learned([SECOND_NS] * 10 + [600 * SECOND_NS] * 90)
    assert slow.worth_keeping_ns("tool", 0, 5 * SECOND_NS) == 0
    assert slow.worth_keeping_ns("tool", 0, 1000 * SECOND_NS) >= 600 * SECOND_NS, "it would be dear to come back"


def test_queueing_counts_as_far_as_the_turns_left_can_be_foreseen() -> None:
    gaps = learned([10 * SECOND_NS] * 100)
    assert gaps.worth_keeping_ns("tool", 60 * SECOND_NS, 0) == 0, "nothing is known of turns"
    for _ in range(20):
        gaps.ended(8)
    assert gaps.eta() == pytest.approx(1)
    assert gaps.worth_keeping_ns("tool", 60 * SECOND_NS, 0) >= 10 * SECOND_NS


def test_what_lasts_longer_than_an_hour_is_never_kept_for() -> None:
    gaps = learned([HOUR_NS + 1] * 150)
    assert gaps.worth_keeping_ns("tool", 0, 1000 * HOUR_NS) == 0
    assert gaps.likely_ns("tool") is None
    assert learned([HOUR_NS] * 150).worth_keeping_ns("tool", 0, 1000 * HOUR_NS) == HOUR_NS


# -- what there is to go by -----------------------------------------------------------------------------------------


def test_under_a_hundred_samples_of_a_tool_all_tools_count_and_under_a_hundred_of_all_two_seconds() -> None:
    gaps = learned([SECOND_NS] * (SAMPLES_MIN - 1))
    assert gaps.worth_keeping_ns("tool", 0, HOUR_NS) == UNKNOWN_NS == 2 * SECOND_NS
    assert gaps.likely_ns("tool") is None
    gaps.observed("other", SECOND_NS)
    assert SECOND_NS <= gaps.worth_keeping_ns("tool", 0, HOUR_NS) < WIDTH * SECOND_NS
    assert gaps.worth_keeping_ns("never seen", 0, HOUR_NS) == gaps.worth_keeping_ns("tool", 0, HOUR_NS)
    for _ in range(SAMPLES_MIN):
        gaps.observed("slow", 100 * SECOND_NS)
    assert gaps.worth_keeping_ns("slow", 0, HOUR_NS) >= 100 * SECOND_NS
    assert gaps.worth_keeping_ns("slow", 0, HOUR_NS) == gaps.worth_keeping_ns("tool", 0, HOUR_NS), "still of all"
    gaps.observed("tool", SECOND_NS)
    assert gaps.worth_keeping_ns("tool", 0, HOUR_NS) < WIDTH * SECOND_NS, "its own by now"


def test_half_of_the_calls_end_within_the_likely_gap() -> None:
    gaps = learned([SECOND_NS] * 60 + [50 * SECOND_NS] * 40)
    assert SECOND_NS <= (gaps.likely_ns("tool") or 0) < WIDTH * SECOND_NS
    other = learned([SECOND_NS] * 40 + [50 * SECOND_NS] * 60)
    assert 50 * SECOND_NS <= (other.likely_ns("tool") or 0) < WIDTH * 50 * SECOND_NS


def test_a_tool_that_has_changed_is_known_by_its_new_gaps() -> None:
    gaps = learned([100 * SECOND_NS] * SAMPLES_MAX)
    before_ns = gaps.worth_keeping_ns("tool", 0, HOUR_NS)
    for _ in range(3 * SAMPLES_MAX):
        gaps.observed("tool", SECOND_NS)
    assert before_ns >= 100 * SECOND_NS
    assert gaps.worth_keeping_ns("tool", 0, 100 * SECOND_NS) < WIDTH * SECOND_NS
    assert SAMPLES_MAX / 2 <= gaps.samples("tool") < SAMPLES_MAX


def test_an_estimate_is_trusted_fourfold_between_a_minute_and_an_hour() -> None:
    assert deadline_ns(100 * SECOND_NS) == 400 * SECOND_NS
    assert deadline_ns(1) == deadline_ns(15 * SECOND_NS) == 60 * SECOND_NS < deadline_ns(16 * SECOND_NS)
    assert deadline_ns(10**18) == deadline_ns(900 * SECOND_NS) == HOUR_NS > deadline_ns(899 * SECOND_NS)


# -- turns ----------------------------------------------------------------------------------------------------------


@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(programs=st.lists(st.integers(1, 30), min_size=10, max_size=20))
def test_eta_is_the_correlation_of_turns_with_turns_left(programs: list[int]) -> None:
    gaps = Gaps()
    for turns in programs:
        gaps.ended(turns)
    pairs = [(k, turns - k) for turns in programs for k in range(1, turns + 1)]
    assert gaps.eta() == pytest.approx(max(-correlation(pairs), 0), abs=0.03), "a few programs fade by a percent or two"


def correlation(pairs: list[tuple[int, int]]) -> float:
    n = len(pairs)
    a, b = sum(x for x, _ in pairs) / n, sum(y for _, y in pairs) / n
    spread = sum((x - a) ** 2 for x, _ in pairs) * sum((y - b) ** 2 for _, y in pairs)
    return sum((x - a) * (y - b) for x, y in pairs) / spread**0.5 if spread else 0.0


def test_programs_of_one_length_are_foreseeable_and_those_of_all_lengths_are_not() -> None:
    same, mixed = Gaps(), Gaps()
    for number in range(100):
        same.ended(12)
        mixed.ended(1 + (number * 37) % 60 if number % 10 else 600)
    assert same.eta() == pytest.approx(1)
    assert mixed.eta() < 0.6
    few = Gaps()
    for _ in range(9):
        few.ended(12)
    assert few.eta() == 0
    few.ended(12)
    assert few.eta() == pytest.approx(1)


# -- limits ---------------------------------------------------------------------------------------------------------


def test_of_too_many_tools_the_least_used_are_forgotten() -> None:
    gaps = learned([SECOND_NS] * 200, "used")
    for number in range(4 * TOOLS):
        gaps.observed(f"once {number}", 100 * SECOND_NS)
    assert len(gaps.tools()) == TOOLS
    assert gaps.samples("used") == 200
    assert gaps.samples("once 0") == 0
    assert gaps.samples(f"once {4 * TOOLS - 1}") == 1


def test_a_tool_that_was_used_much_but_long_ago_is_forgotten_at_last() -> None:
    gaps = learned([SECOND_NS] * 50, "old")
    number = 0
    while "old" in gaps.tools():
        gaps.observed(f"once {number}", SECOND_NS)
        number += 1
    assert 10 * TOOLS < number < 100 * TOOLS


# -- the next life --------------------------------------------------------------------------------------------------


def taught() -> Gaps:
    gaps = learned([SECOND_NS * (1 + n % 7) for n in range(300)], "grep")
    for n in range(150):
        gaps.observed("wörld", 20 * SECOND_NS + n)
        gaps.ended(1 + n % 9)
    return gaps


def test_the_next_life_knows_what_this_one_has_learned() -> None:
    gaps = taught()
    again = Gaps.from_bytes(gaps.to_bytes())
    assert isinstance(again, Gaps)
    for tool in ("grep", "wörld", "unknown"):
        assert again.worth_keeping_ns(tool, MS, 9 * SECOND_NS) == gaps.worth_keeping_ns(tool, MS, 9 * SECOND_NS)
        assert again.samples(tool) == gaps.samples(tool)
    assert again.eta() == gaps.eta() > 0
    assert again.to_bytes() == Gaps.from_bytes(again.to_bytes()).to_bytes()  # type: ignore[union-attr]
    assert again.to_bytes() != Gaps().to_bytes()


def test_a_full_house_of_long_names_survives_too() -> None:
    gaps = Gaps()
    for number in range(TOOLS + 5):
        gaps.observed(f"{number:03}".ljust(NAME_CHARS, "\N{GREEK SMALL LETTER ALPHA}"), SECOND_NS)
    again = Gaps.from_bytes(gaps.to_bytes())
    assert isinstance(again, Gaps)
    assert set(again.tools()) == set(gaps.tools())


def test_what_is_damaged_or_of_another_version_is_refused() -> None:
    written = taught().to_bytes()
    assert isinstance(Gaps.from_bytes(written), Gaps)
    refused = Refused(Refusal.DAMAGED)
    for at in (0, 5, 40, len(written) // 2, len(written) - 1):
        assert Gaps.from_bytes(written[:at] + bytes([written[at] ^ 1]) + written[at + 1 :]) == refused
    for length in (0, 7, 8, 60, len(written) - 1):
        assert Gaps.from_bytes(written[:length]) == refused
    assert Gaps.from_bytes(signed(b"KVGP\2" + written[5:-8])) == refused


@settings(derandomize=True, database=None, deadline=None, max_examples=40)
@given(at=st.integers(0, 3000), patch=st.binary(min_size=1, max_size=8), cut=st.integers(0, 20))
def test_bytes_that_are_wrong_under_a_right_checksum_do_no_harm(at: int, patch: bytes, cut: int) -> None:
    body = bytearray(taught().to_bytes()[:-8])
    body[at : at + len(patch)] = patch
    again = Gaps.from_bytes(signed(bytes(body[: len(body) - cut])))
    if isinstance(again, Gaps):
        again.worth_keeping_ns("grep", SECOND_NS, SECOND_NS)
        again.observed("grep", SECOND_NS)


def signed(body: bytes) -> bytes:
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


def test_what_was_learned_is_known_to_be_in_the_next_life_too() -> None:
    gaps, ended = Gaps(), Gaps()
    assert not gaps.known
    gaps.observed("grep", SECOND_NS)
    ended.ended(3)
    for one in (gaps, ended):
        heir = Gaps.from_bytes(one.to_bytes())
        assert isinstance(heir, Gaps)
        assert (one.known, heir.known, heir.lessons) == (True, True, 0)
    blank = Gaps.from_bytes(Gaps().to_bytes())
    assert isinstance(blank, Gaps)
    assert not blank.known
