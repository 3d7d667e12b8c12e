"""The tier in a GPU's memory: the tests that pass on the emulation."""

# As they run there: behind the one that fills the tier copies may still be on their way.
# isort: off
from tests.integration.test_hbm_tier import (  # noqa: F401  pytest collects them here
    daemon,
    client,
    kv,
    test_what_is_loaded_twice_comes_from_there_the_third_time,
    test_a_prefetch_into_it_does_not_wait_for_a_second_load,
    test_what_was_stored_anew_under_a_key_is_never_the_old_copy,
    test_more_than_it_holds_is_still_right,
    test_a_tier_that_does_not_fit_is_said_and_the_daemon_serves,
    test_what_memory_has_evicted_comes_back_from_its_copy,
)
