"""How many bytes may move beside a forward pass: the budget of swaps, on a clock of its own."""

import math

from kvclient.swap_budget import BURST_S, STALE_S, Bandwidth, Budget

MIB = 1 << 20
RATE = 100 * MIB


def known(bytes_per_s: float) -> Budget:
    """A budget that has measured its link."""
    made = Budget(RATE)
    made.bandwidth.took(int(bytes_per_s), 1.0)
    return made


def test_a_tick_grants_what_hides_behind_the_forward_pass_and_no_more_than_the_limit() -> None:
    budget = known(1000 * MIB)
    assert budget.tick(0.01, 0.0) == 10 * MIB
    assert budget.left_bytes(0.0) == 10 * MIB
    assert budget.tick(0.01, 0.0, limit_bytes=4 * MIB) == 4 * MIB
    assert budget.left_bytes(0.0) == 4 * MIB
    assert budget.tick(0.01, 0.0, limit_bytes=40 * MIB) == 10 * MIB, "the limit is one, and no grant"


def test_before_anything_was_measured_the_rate_stands_for_the_link() -> None:
    assert Budget(RATE).tick(0.1, 0.0) == RATE / 10


def test_what_was_not_used_is_gone_and_what_went_beyond_is_paid_for() -> None:
    budget = known(1000 * MIB)
    budget.tick(0.01, 0.0)
    budget.tick(0.01, 0.02)
    assert budget.left_bytes(0.02) == 10 * MIB, "not 20"
    budget.take(16 * MIB, 0.02)
    assert budget.left_bytes(0.02) == -6 * MIB
    budget.tick(0.01, 0.03)
    assert budget.left_bytes(0.03) == 4 * MIB
    budget.take(500 * MIB, 0.03)  # somebody was waiting for it
    budget.tick(0.01, 0.04)
    assert budget.left_bytes(0.04) == 0, "and that stops the others for an iteration, not for fifty"
    budget.tick(0.01, 0.05)
    assert budget.left_bytes(0.05) == 10 * MIB


def test_what_did_not_move_after_all_is_given_back_and_no_more_than_was_granted() -> None:
    budget = known(1000 * MIB)
    budget.tick(0.1, 0.0)
    budget.take(8 * MIB, 0.0)
    budget.give_back(8 * MIB)
    assert budget.left_bytes(0.0) == 100 * MIB
    budget.give_back(8 * MIB)
    assert budget.left_bytes(0.0) == 100 * MIB


def test_what_is_given_back_in_the_next_iteration_is_no_second_grant() -> None:
    budget = known(1000 * MIB)
    budget.tick(0.001, 0.0)
    budget.take(1 * MIB, 0.0)
    budget.tick(0.001, 0.01)
    budget.give_back(1 * MIB)
    assert budget.left_bytes(0.01) == 1 * MIB
    budget.take(3 * MIB, 0.01)
    budget.give_back(1 * MIB)
    assert budget.left_bytes(0.01) == -1 * MIB, "the control: a debt becomes smaller"


def test_where_nothing_is_computed_there_is_no_limit_until_the_next_tick() -> None:
    budget = known(1000 * MIB)
    assert budget.tick(0.0, 0.0) == math.inf
    budget.take(1 << 40, 0.0)
    assert budget.left_bytes(0.0) == math.inf
    budget.take(1 << 40, 3600.0)
    assert budget.left_bytes(3600.0) == math.inf, "it need not be said again"
    assert budget.wait_s(3600.0) == 0.0
    budget.tick(0.01, 3600.01)
    assert budget.left_bytes(3600.01) == 10 * MIB
    assert budget.left_bytes(7200.0) == RATE * BURST_S, "who computes and ticks no more has a rate"


def test_where_nothing_is_computed_and_there_is_a_limit_the_rate_comes_behind_it() -> None:
    budget = known(1000 * MIB)
    assert budget.tick(0.0, 0.0, limit_bytes=4 * MIB) == 4 * MIB
    budget.take(5 * MIB, 0.0)
    assert budget.left_bytes(STALE_S - 0.01) == -1 * MIB
    assert math.isclose(budget.left_bytes(STALE_S + 0.02), -1 * MIB + 0.02 * RATE), "or it would stop for good"


def test_an_engine_that_does_not_tick_has_a_rate() -> None:
    budget = Budget(RATE)
    burst = RATE * BURST_S
    assert budget.left_bytes(5.0) == burst
    budget.take(int(2 * burst), 5.0)
    assert budget.left_bytes(5.0) == -burst
    assert math.isclose(budget.wait_s(5.0), BURST_S, rel_tol=1e-6)
    assert math.isclose(budget.left_bytes(5.0 + 1.5 * BURST_S), 0.5 * burst)
    assert budget.left_bytes(1e6) == burst, "time does not pile up"


def test_an_engine_that_ticks_no_more_has_a_rate_from_then_on() -> None:
    budget = known(1000 * MIB)
    budget.tick(0.001, 0.0)
    budget.take(2 * MIB, 0.0)
    assert budget.left_bytes(STALE_S - 0.01) == -1 * MIB
    assert math.isclose(budget.wait_s(0.0), STALE_S + (MIB + 1) / RATE)
    assert math.isclose(budget.left_bytes(STALE_S + 0.02), -1 * MIB + 0.02 * RATE)
    budget.tick(1.0, 10.0)
    budget.take(1001 * MIB, 10.0)
    assert budget.left_bytes(17.9) < 0, "a pass of a second is no silence yet after eight"


def test_the_bandwidth_follows_what_is_measured_and_small_copies_say_nothing() -> None:
    bandwidth = Bandwidth()
    bandwidth.took(1000, 1e-9)
    bandwidth.took(10 * MIB, 0.0)
    assert bandwidth.bytes_per_s == 0
    bandwidth.took(10 * MIB, 0.01)
    assert bandwidth.bytes_per_s == 1000 * MIB
    bandwidth.took(10 * MIB, 0.1)
    assert 100 * MIB < bandwidth.bytes_per_s < 1000 * MIB
    for _ in range(50):
        bandwidth.took(10 * MIB, 0.1)
    assert math.isclose(bandwidth.bytes_per_s, 100 * MIB, rel_tol=0.01)
