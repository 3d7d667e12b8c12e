"""Mode daemon on a GPU: the tests that pass on the emulation, but for those of what only an emulation is refused."""

from tests.integration.test_attached import (  # noqa: F401  pytest collects them here
    client,
    daemon,
    kv,
    test_a_save_larger_than_the_ring_goes_slice_by_slice,
    test_blocks_that_lie_on_disk_alone_are_read_first,
    test_layers_come_group_by_group,
    test_other_modes_have_no_attached_memory,
    test_what_pages_held_is_stored_and_comes_back_to_other_pages,
    test_what_the_host_stored_is_loaded_as_far_as_it_goes,
    test_without_a_device_mode_daemon_becomes_copy_and_says_why,
)
