"""What users say of the vLLM connector, and where its blocks lie."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from kvclient.integrations.model_files import weights_mark
from kvclient.integrations.vllm_layout import layout_of
from kvclient.integrations.vllm_settings import Settings, Wishes, version_trouble, wishes_of
from kvproto.errors import UsageError


def test_settings_are_taken_by_name_and_kind() -> None:
    assert Settings.parse({}) == Settings()
    given = {"runtime_dir": "/run/kv", "at_once_mib": 4, "store": False}
    assert Settings.parse(given) == Settings(runtime_dir="/run/kv", at_once_mib=4, store=False)


def test_where_steps_overlap_no_load_goes_before_the_forward_and_layerwise_says_that_it_does_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert Settings(tenant="a").where_steps_overlap() == Settings(tenant="a", at_once_mib=0.0)
    assert not caplog.records, "the control: nothing to say"
    assert Settings(layerwise=True).where_steps_overlap() == Settings(at_once_mib=0.0)
    assert '"layerwise" does nothing with asynchronous scheduling' in caplog.text


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"runtime": "/x"}, "has no 'runtime'"),
        ({"store": 1}, "'store' must be true or false"),
        ({"disk_wait_s": "5"}, "'disk_wait_s' must be a number"),
        ({"disk_wait_s": -1}, "'disk_wait_s' must be a number"),
        ({"disk_wait_s": 3601}, "'disk_wait_s' must be a number from 0 to 3600, not 3601"),
        ({"lookup_timeout_ms": 3600001}, "'lookup_timeout_ms' must be a number from 0 to 3600000"),
        ({"at_once_mib": True}, "'at_once_mib' must be a number"),
        ({"tenant": 5}, "'tenant' must be a string"),
        ({"codec": True}, "'codec' must be a string"),
        ({"codec": "zip"}, "\"codec\" is one of raw, int8, .*, auto, not 'zip'"),
        ({"codec": "int8"}, 'changes values: say "lossy": true'),
        ({"codec": "bf16-fixed", "layerwise": True}, "layer by layer, a codec whole blocks"),
    ],
)
def test_impossible_settings_stop_the_start(given: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        Settings.parse(given)


def test_a_codec_is_taken_and_encoded_loads_are_sooner_beside_the_forward() -> None:
    raw = Settings.parse({})
    for given in ({"codec": "bf16-fixed"}, {"codec": "int4-g64", "lossy": True}, {"codec": "auto"}):
        assert Settings.parse(given).at_once_bytes == raw.at_once_bytes // 8
    assert Settings.parse({"codec": "raw", "layerwise": True}).at_once_bytes == raw.at_once_bytes


def test_wishes_of_a_request_are_taken_one_by_one_and_never_fail_it(caplog: pytest.LogCaptureFixture) -> None:
    assert wishes_of(None) == wishes_of({}) == wishes_of({"other": {"load": False}}) == Wishes()
    good = {"load": False, "pin_ttl_s": 60, "retention": "1h", "program": "p", "tool": "t", "tool_expected_s": 2.5}
    assert wishes_of({"kvstored": {"priority": "low"}}) == Wishes(priority="low")
    assert wishes_of({"kvstored": good}) == Wishes(
        load=False, pin_ttl_s=60.0, retention="1h", program="p", tool="t", tool_expected_s=2.5
    )
    assert not caplog.records
    bad = {"load": "no", "pin_ttl_s": 0, "retention": "2h", "program": "", "tool": "x" * 200, "stor": True,
           "priority": 3}  # fmt: skip
    assert wishes_of({"kvstored": bad | {"store": False}}) == Wishes(store=False)
    assert len(caplog.records) == len(bad)
    assert wishes_of({"kvstored": "all"}) == Wishes()


@pytest.mark.parametrize(
    ("version", "taken"), [("0.32.0", True), ("0.33.1rc2", True), ("0.31.9", False), ("0.34.0", False), ("dev", False)]
)
def test_versions_outside_the_tested_ones_are_refused_unless_told_otherwise(version: str, taken: bool) -> None:
    assert (version_trouble(version, any_version=False) == "") is taken
    assert version_trouble(version, any_version=True) == ""


def test_layers_that_lie_next_to_each_other_are_one_piece() -> None:
    whole = torch.zeros((8, 3, 2, 16, 4))  # blocks, layers, heads, tokens, values
    layout = layout_of({f"layer {number}": whole[:, number] for number in range(3)}, 8)
    assert layout.lengths == (3 * 2 * 16 * 4 * 4,)
    assert layout.strides == layout.lengths
    apart = layout_of({f"layer {number}": torch.zeros((8, 2, 16, 4)) for number in range(3)}, 8)
    assert apart.lengths == (2 * 16 * 4 * 4,) * 3
    assert apart.block_bytes == layout.block_bytes
    assert apart.words == layout.words, "the same bytes in the same order"
    turned = layout_of({f"layer {number}": torch.zeros((8, 16, 2, 4)).transpose(1, 2) for number in range(3)}, 8)
    assert turned.words != layout.words, "other strides within a block"
    shared = torch.zeros((8, 2, 16, 4))
    twins = layout_of({"one": shared, "two": shared}, 8)
    assert len(twins.lengths) == 1
    assert twins.layers["one"] == twins.layers["two"]


def test_layers_lie_one_after_another_in_a_block_whichever_way_the_engine_keeps_them() -> None:
    whole = torch.zeros((8, 3, 2, 16, 4))
    together = layout_of({f"layer {number}": whole[:, number] for number in range(3)}, 8)
    apart = layout_of({f"layer {number}": torch.zeros((8, 2, 16, 4)) for number in range(3)}, 8)
    size = 2 * 16 * 4 * 4
    for layout, stride in ((together, 3 * size), (apart, size)):
        assert [(each.start, each.stride, each.length) for each in layout.layers.values()] == [
            (0, stride, size), (size, stride, size), (2 * size, stride, size)
        ]  # fmt: skip
    assert [each.base - whole.data_ptr() for each in together.layers.values()] == [0, size, 2 * size]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (dict, "no KV memory"),
        (lambda: {"l": torch.zeros((7, 2, 4))}, "does not begin with the 8 blocks"),
        (lambda: {"l": torch.zeros((8, 2, 8))[:, :, ::2]}, "does not lie in one piece"),
        (lambda: {"l": [torch.zeros(8)]}, "is no tensor"),
        (lambda: {"l": torch.zeros((8, 2), device="meta")}, "only memory of the CPU"),
    ],
)
def test_memory_that_cannot_be_copied_by_blocks_is_refused(make: Any, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        layout_of(make(), 8)


def test_blocks_that_the_engine_does_not_have_are_refused() -> None:
    layout = layout_of({"l": torch.zeros((8, 2, 4))}, 8)
    assert len(layout.scattered([0, 7])) == 2
    for block in (-1, 8):
        with pytest.raises(UsageError, match="of an engine that has 8"):
            layout.scattered([0, block])


def test_weights_are_told_apart_by_what_is_in_their_files(tmp_path: Path) -> None:
    assert weights_mark(tmp_path) == ""
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(100_000))
    first = weights_mark(tmp_path)
    assert first == weights_mark(tmp_path) != ""
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    changed = bytearray(100_000)
    changed[-1] = 1
    file.write_bytes(changed)
    os.utime(file, ns=times)
    second = weights_mark(tmp_path)
    assert second != first
    (tmp_path / "modeling.py").write_text("scale = 1")
    third = weights_mark(tmp_path)
    (tmp_path / "modeling.py").write_text("scale = 2")
    assert len({second, third, weights_mark(tmp_path)}) == 3, "the code of a model says what its weights mean"
