"""What `bench quality` measures: right errors, right distances, and captures that are read as they were written."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import quality
from bench.quality_capture import CaptureError, read_capture, write_capture
from kvclient.codecs import codec_of
from kvkernels.encodings import bits_of
from tests.values import as_bf16, as_half

ROW = 64


def tensor(seed: int = 0) -> Any:
    values = np.random.default_rng(seed).standard_normal((2, 32, ROW), dtype=np.float32)
    return as_bf16(values.ravel()).reshape(2, 32, ROW)


def test_errors_are_those_of_the_values() -> None:
    before = bits_of(np.array([3, 4] * 32, np.float32), half=False)
    after = bits_of(np.array([3, 4] * 31 + [3, -4], np.float32), half=False)
    found = quality.errors("x", before, after, half=False, row=2)
    rms = 12.5**0.5
    assert found["x_error_most"] == pytest.approx(8 / rms)
    assert found["x_error_mean"] == pytest.approx(8 / 64 / rms)
    assert found["x_cosine_least"] == pytest.approx(-7 / 25)
    assert found["x_cosine_mean"] == pytest.approx((31 - 7 / 25) / 32)
    same = quality.errors("x", before, before, half=False, row=2)
    assert same["x_error_most"] == 0
    assert same["x_cosine_least"] == pytest.approx(1)


def test_distances_of_tokens_are_zero_for_equal_logits_only() -> None:
    exact = np.array([[0.0, 0.0], [1.0, 3.0]])
    assert set(quality._moved("x", exact, exact + 5).values()) == {0.0, 1.0}
    moved = quality._moved("x", exact, np.array([[np.log(3), 0.0], [3.0, 1.0]]))
    first = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert moved["x_same_token_share"] == 0.5
    assert moved["x_logit_kl_most"] > first > 0
    assert moved["x_logit_kl_mean"] == pytest.approx((first + moved["x_logit_kl_most"]) / 2)


def test_blocks_go_through_a_codec_and_unfit_ones_are_counted() -> None:
    blocks = np.concatenate([tensor(), tensor(1)]).reshape(4, -1)
    blocks[2, 5] = 0x7F80
    codec = codec_of("int8", dtype="bfloat16", block_bytes=blocks[0].nbytes, block_shape=(32, ROW), lossy=True)
    assert codec is not None
    found, unfit = quality.through(codec, blocks)
    assert unfit == 1
    assert np.array_equal(found[2], blocks[2])
    assert not np.array_equal(found[0], blocks[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_capture_is_read_as_it_was_written_and_measured(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "kv.npz"
    bits = {"layer0.key": tensor(), "layer0.value": tensor(1), "1": tensor(2)[0]}
    if dtype == "float16":
        halves = np.random.default_rng(1).standard_normal(2 * 32 * ROW).astype(np.float32)
        bits = {"layer0.key": as_half(halves).reshape(2, 32, ROW)}
    write_capture(path, bits, dtype, "random")
    capture = read_capture(path)
    assert (capture.dtype, capture.label, [*capture.tensors]) == (dtype, "random", [*bits])
    assert all(np.array_equal(capture.tensors[name], bits[name]) for name in bits)
    found = quality.of_capture(capture)
    assert 0 < _number(found["int8_error_most"]) < _number(found["int4_g64_error_most"]) < 1
    assert 0.99 < _number(found["int4_g64_cosine_mean"]) < _number(found["int8_cosine_least"]) <= 1
    if dtype == "bfloat16":
        assert (found["bf16_fixed_error_most"], found["bf16_fixed_unfit_share"]) == (0.0, 0.0)
    else:
        assert "bf16_fixed_error_most" not in found


def _number(figure: object) -> float:
    assert isinstance(figure, float)
    return figure


def test_what_is_no_capture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kv.npz"
    for wrong in ({}, {"a": tensor().astype(np.int16)}, {"a": tensor()[0, 0]}, {"a": tensor()[:1, :1, :3]}):
        with pytest.raises(CaptureError):
            write_capture(path, wrong, "bfloat16", "")
    with pytest.raises(CaptureError, match="float32"):
        write_capture(path, {"a": tensor()}, "float32", "")
    for content in (b"", b"PK\x03\x04", b"no archive at all"):
        path.write_bytes(content)
        with pytest.raises(CaptureError, match="no capture"):
            read_capture(path)
    np.savez(path, kvstored_capture=np.int64(2))
    with pytest.raises(CaptureError, match="version 2"):
        read_capture(path)
    np.savez(path, kvstored_capture=np.int64(1), names=np.array([object()]), dtype=np.str_("bfloat16"))
    with pytest.raises(CaptureError, match="no capture"):
        read_capture(path)


@pytest.mark.long
def test_the_model_is_moved_by_what_is_lossy_alone(tmp_path: Path) -> None:
    path, record = tmp_path / "kv.npz", tmp_path / "quality.json"
    words = ["quality", "--quick", "--save-capture", str(path), "--json", str(record)]
    subprocess.run([sys.executable, "-m", "bench", *words], check=True, capture_output=True)
    found = json.loads(record.read_text())["results"]
    assert found["bf16_fixed_logit_kl_most"] == 0
    assert 0 < found["int8_logit_kl_mean"] < found["control_zeros_logit_kl_mean"]
    assert [*read_capture(path).tensors][:2] == ["layer0.key", "layer0.value"]


def test_a_capture_with_infinities_is_measured_without_their_rows(tmp_path: Path) -> None:
    """NaN is no JSON."""
    odd, empty = tensor(1), np.full((2, ROW), 0x7FC0, np.uint16)
    odd[0, 3, 5] = 0x7F80
    write_capture(tmp_path / "kv.npz", {"plain": tensor(), "odd": odd, "nan": empty}, "bfloat16", "x")
    found = quality.of_capture(read_capture(tmp_path / "kv.npz"))
    json.dumps(found, allow_nan=False)
    assert found["bf16_fixed_unfit_share"] == 0
    assert found["bf16_fixed_error_most"] == 0
    assert found["bf16_fixed_cosine_least"] == pytest.approx(1)
    assert found["int8_unfit_share"] == pytest.approx(2 / 3)
    before, after = odd.ravel(), odd.ravel().copy()
    after[0] ^= 0x8000
    assert quality.errors("x", before, after, half=False, row=ROW)["x_error_most"] > 0
