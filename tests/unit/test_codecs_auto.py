"""`codec="auto"`: raw where the link is faster than any codec, the fastest that the caller may have where it is not."""

import pytest

from kvclient import codecs, codecs_auto
from kvclient.codecs import Speed, pays
from kvclient.codecs_auto import memory_bytes_per_s, resolved
from kvkernels.encodings import Encoding
from kvproto.errors import UsageError

GB = 1e9
BLOCK = 65536
SPEEDS = {
    Encoding.BF16_FIXED: Speed("bf16-fixed", 1.29, 0.6 * GB, 1.2 * GB),
    Encoding.INT8: Speed("int8", 1.94, 1.5 * GB, 2.0 * GB),
    Encoding.FP8: Speed("fp8", 1.94, 1.0 * GB, 1.5 * GB),
    Encoding.INT4_G64: Speed("int4-g64", 3.56, 1.0 * GB, 1.8 * GB),
}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Encoding, ...]]:
    """Which codecs were measured; they are as fast as `SPEEDS` says."""
    asked: list[tuple[Encoding, ...]] = []

    def speeds(encodings: tuple[Encoding, ...], _block: int, _row: int, _accelerate: str) -> tuple[Speed, ...]:
        asked.append(encodings)
        return tuple(SPEEDS[encoding] for encoding in encodings)

    monkeypatch.setattr(codecs_auto, "speeds", speeds)
    return asked


def auto(
    link: float | None, *, lossy: bool = False, dtype: str = "bfloat16", shape: tuple[int, ...] | None = (512, 64)
) -> str:
    return resolved(
        dtype=dtype, block_bytes=BLOCK, block_shape=shape, lossy=lossy, accelerate="", link_bytes_per_s=link
    )


def test_raw_where_the_link_is_faster_than_the_codec(measured: list[tuple[Encoding, ...]]) -> None:
    slow, fast = 0.05 * GB, 10 * GB
    assert (auto(fast), auto(fast, lossy=True)) == ("raw", "raw")
    assert (auto(slow), auto(slow, lossy=True)) == ("bf16-fixed", "int4-g64")
    one = SPEEDS[Encoding.BF16_FIXED]
    assert pays(slow, one.ratio, one.encode_bytes_per_s)
    assert not pays(fast, one.ratio, one.encode_bytes_per_s)
    assert measured[0] == (Encoding.BF16_FIXED,), "what may not be chosen is not measured"


def test_only_codecs_that_take_such_blocks_are_looked_at(measured: list[tuple[Encoding, ...]]) -> None:
    assert auto(1.0, dtype="float16") == "raw"
    assert auto(1.0, dtype="float32", lossy=True) == "raw"
    assert not measured
    assert auto(1.0, dtype="float16", lossy=True) == "int4-g64"
    assert [*measured[-1]] == [Encoding.INT8, Encoding.FP8, Encoding.INT4_G64]
    assert auto(1.0, shape=None, lossy=True) == "int4-g64"
    assert [*measured[-1]] == [Encoding.INT4_G64, Encoding.BF16_FIXED]


@pytest.mark.parametrize("link", [0, -1.0, float("nan")])
def test_impossible_links_are_refused(link: float) -> None:
    with pytest.raises(UsageError, match="above 0"):
        auto(link)


def test_large_blocks_of_odd_heads_are_measured_in_whole_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def noted(size: int, _row: int, **_: object) -> tuple[()]:
        measured.append(size)
        return ()

    monkeypatch.setattr(codecs_auto, "measure", noted)
    for heads, row in ((64_000, 80), (1 << 14, 128), (64, 100_000)):
        resolved(
            dtype="bfloat16", block_bytes=2 * heads * row, block_shape=(heads, row), lossy=True, accelerate="",
            link_bytes_per_s=1.0,
        )  # fmt: skip
        assert measured[-1] % (2 * row) == measured[-1] % 128 == 0
    assert measured[1] == codecs_auto.MEASURED_BYTES


def test_without_a_link_memory_is_measured_and_both_only_once() -> None:
    assert auto(None) in ("raw", "bf16-fixed")
    assert memory_bytes_per_s(BLOCK) == memory_bytes_per_s(BLOCK) > 0
    hits = codecs_auto.speeds.cache_info().hits
    auto(None)
    assert codecs_auto.speeds.cache_info().hits == hits + 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_accelerator_that_is_not_there_is_told(
    measured: list[tuple[Encoding, ...]], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    def auto_by(accelerate: str) -> str:
        return resolved(
            dtype=dtype, block_bytes=BLOCK, block_shape=None, lossy=False, accelerate=accelerate, link_bytes_per_s=1.0
        )

    with pytest.raises(UsageError, match="accelerate"):
        auto_by("bogus")
    monkeypatch.setitem(codecs.ACCELERATORS, "numba", "kvkernels.no_such_module")
    with pytest.raises(UsageError, match="numba"):
        auto_by("numba")
    assert not measured
    assert auto_by("") == ("bf16-fixed" if dtype == "bfloat16" else "raw")
