"""Swaps of a GPU's pages: the tests that pass on the emulation, but for those that hold its streams up."""

from tests.integration.test_swapping import (  # noqa: F401  pytest collects them here
    daemon,
    test_a_cancelled_swap_ends_at_the_border_of_a_chunk,
    test_a_context_goes_out_in_chunks_and_comes_back_to_other_pages,
    test_a_ring_too_small_for_two_chunks_costs_time_and_no_block,
    test_clean_copies_are_not_written_twice,
    test_layers_can_be_waited_for_one_by_one,
    test_what_is_there_of_a_chain_comes_and_what_is_not_is_not_said_to,
    test_who_is_urgent_goes_first_at_the_border_of_a_chunk,
)
