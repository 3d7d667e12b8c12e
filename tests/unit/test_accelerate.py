"""`accelerate` in the integrations: the same bytes, compiled while the engine starts, refused where it cannot be."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from kvclient import codecs, codecs_auto
from kvclient.codecs import Codec, Speed, codec_of
from kvclient.codecs_moving import decoded
from kvclient.copying import bytes_at
from kvclient.integrations import sglang_settings, vllm_settings
from kvclient.integrations.codec_choice import codec_for
from kvkernels.encodings import Encoding, bits_of
from kvproto.errors import UsageError

COMPILED = codecs.ACCELERATORS["numba"]
ROW = 64
BLOCK_BYTES = 2 * 32 * ROW
EVERY = [
    (encoding, dtype)
    for encoding in Encoding
    for dtype in ("bfloat16", "float16")
    if dtype == "bfloat16" or not encoding.is_lossless
]
PARSERS: list[Callable[[dict[str, Any]], Any]] = [vllm_settings.Settings.parse, sglang_settings.Settings.parse]
parsers = pytest.mark.parametrize("parse", PARSERS, ids=["vLLM", "SGLang"])


def made(encoding: str, dtype: str = "bfloat16", accelerate: str = "") -> Codec:
    """As an integration has it."""
    codec = codec_for(
        encoding, lossy=True, dtype=f"torch.{dtype}", block_bytes=BLOCK_BYTES, row=ROW, accelerate=accelerate
    )
    assert codec is not None
    return codec


def block(dtype: str, seed: int = 0) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    values = np.random.default_rng(seed).standard_normal(BLOCK_BYTES // 2, dtype=np.float32)
    return bits_of(values, half=dtype == "float16").view(np.uint8)


# -- the same bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("encoding", "dtype"), EVERY)
def test_engines_with_and_without_it_share_their_blocks(encoding: Encoding, dtype: str) -> None:
    plain, compiled = made(encoding, dtype), made(encoding, dtype, "numba")
    assert plain.text == compiled.text, "one namespace"
    stored = [np.full(plain.stored_bytes, fill, np.uint8) for fill in (1, 2, 3)]
    assert plain.encode(block(dtype), stored[0])
    assert compiled.encode(block(dtype), stored[1])
    assert compiled.encode(block(dtype, seed=1), stored[2])
    assert np.array_equal(stored[0], stored[1])
    assert not np.array_equal(stored[0], stored[2]), "the control: another block differs"
    back = [np.full(BLOCK_BYTES, fill, np.uint8) for fill in (1, 2)]
    assert plain.decode(stored[1], back[0])
    assert compiled.decode(stored[0], back[1])
    assert np.array_equal(back[0], back[1])
    assert np.array_equal(back[0], block(dtype)) == encoding.is_lossless


# -- compiled while the engine starts ----------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The compiled encodings as a process has them that has used none yet."""
    before = sys.modules.get(COMPILED)
    monkeypatch.delitem(sys.modules, COMPILED, raising=False)
    yield importlib.import_module(COMPILED)
    if before is not None:
        package, _, name = COMPILED.rpartition(".")
        setattr(sys.modules[package], name, before)


def versions(module: ModuleType) -> dict[str, int]:
    """For how many types of arguments each function has been compiled, or loaded."""
    rows = [
        (f"{name}.{field}", each) for name in ("_BF16", "_HALF") for field, each in vars(module)[name]._asdict().items()
    ]
    plain = [(name, each) for name, each in vars(module).items() if hasattr(each, "signatures")]
    return {name: len(each.signatures) for name, each in (*rows, *plain)}


def use(codec: Codec) -> None:
    """As `store`, `copy_to` and views of a lease do it."""
    memory = np.zeros(2 * BLOCK_BYTES + codec.stored_bytes + 64, np.uint8)
    memory[:BLOCK_BYTES] = block("float16" if codec.half else "bfloat16")
    start = memory.ctypes.data
    stored = (-(start + 2 * BLOCK_BYTES)) % 64 + 2 * BLOCK_BYTES  # as slots lie
    assert codec.encode(bytes_at(start, BLOCK_BYTES), bytes_at(start + stored, codec.stored_bytes))
    assert codec.decode(bytes_at(start + stored, codec.stored_bytes), bytes_at(start + BLOCK_BYTES, BLOCK_BYTES))
    assert decoded(codec, [(_At(start), stored)])  # type: ignore[list-item]


class _At:
    """Of a mapping, what is looked at."""

    def __init__(self, address: int) -> None:
        self.address = address


@pytest.mark.parametrize(("encoding", "dtype"), EVERY)
def test_nothing_is_compiled_once_the_engine_has_started(fresh: ModuleType, encoding: Encoding, dtype: str) -> None:
    codec = made(encoding, dtype, "numba")
    after_start = versions(fresh)
    assert sum(after_start.values())
    use(codec)
    assert versions(fresh) == after_start


def test_without_warming_up_the_first_block_would_have_it_compiled(fresh: ModuleType) -> None:
    """The control of the one before."""
    cold = codec_of(
        "int8", dtype="bfloat16", block_bytes=BLOCK_BYTES, block_shape=(32, ROW), lossy=True, accelerate="numba"
    )
    assert cold is not None
    assert not sum(versions(fresh).values())
    use(cold)
    assert versions(fresh)["_BF16.encode_int8"] == versions(fresh)["_BF16.decode_int8"] == 1


def test_by_numpy_nothing_is_imported_and_nothing_done_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, COMPILED, raising=False)
    monkeypatch.setattr(Codec, "encode", None)
    made("int8")
    assert COMPILED not in sys.modules


# -- what users say ----------------------------------------------------------------------------------------------------


@parsers
def test_it_is_left_out_or_named_beside_a_codec(parse: Callable[[dict[str, Any]], Any]) -> None:
    assert parse({"codec": "bf16-fixed"}).accelerate == parse({}).accelerate == ""
    for codec in ("bf16-fixed", "auto"):
        assert parse({"codec": codec, "accelerate": "numba"}).accelerate == "numba"


def test_compiled_loads_before_the_forward_of_vllm_may_be_larger() -> None:
    sizes = [
        vllm_settings.Settings.parse(given).at_once_bytes
        for given in ({}, {"codec": "bf16-fixed"}, {"codec": "bf16-fixed", "accelerate": "numba"})
    ]
    assert sizes == [32 << 20, 4 << 20, 8 << 20]


@parsers
@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"codec": "bf16-fixed", "accelerate": True}, "must be a string, not True"),
        ({"codec": "bf16-fixed", "accelerate": "cuda"}, '"accelerate" is "numba" or nothing, not \'cuda\''),
        ({"accelerate": "numba"}, '"accelerate" is for codecs: raw blocks are only copied'),
        ({"codec": "int8", "accelerate": "numba"}, 'changes values: say "lossy": true'),
    ],
)
def test_impossible_ones_stop_the_start(
    parse: Callable[[dict[str, Any]], Any], given: dict[str, Any], why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        parse(given)


@parsers
def test_where_numba_is_not_installed_the_start_says_so(
    parse: Callable[[dict[str, Any]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    for codec in ("bf16-fixed", "auto"):
        with pytest.raises(UsageError, match='"accelerate" wants numba, which is not installed where the engine runs'):
            parse({"codec": codec, "accelerate": "numba"})
    assert parse({"codec": "bf16-fixed"}).codec == "bf16-fixed", "the control: without it nothing is missing"


@parsers
def test_looking_for_numba_imports_nothing_of_it(
    parse: Callable[[dict[str, Any]], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Settings are parsed before vLLM's kernels are in place, and it ends if it finds numba then."""
    (tmp_path / "numba.py").write_text("raise AssertionError('imported')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "numba"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    parse({"codec": "bf16-fixed", "accelerate": "numba"})
    assert "numba" not in sys.modules
    with pytest.raises(AssertionError, match="imported"):
        importlib.import_module("numba")


def test_what_numba_cannot_do_at_the_start_is_a_refusal_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As it says where it may write nowhere; and where it is broken."""
    monkeypatch.syspath_prepend(tmp_path)
    for number, (raised, says) in enumerate(
        (("RuntimeError('cannot cache function')", "cannot cache"), ("ImportError('needs NumPy 2')", "needs NumPy"))
    ):
        (tmp_path / f"accelerator_{number}.py").write_text(f"raise {raised}")
        monkeypatch.setitem(codecs.ACCELERATORS, "numba", f"accelerator_{number}")
        with pytest.raises(UsageError, match=f"accelerate='numba': {says}"):
            made("int8", accelerate="numba")
    made("int8")


# -- auto --------------------------------------------------------------------------------------------------------------


def test_auto_measures_what_was_asked_for_and_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def speeds(encodings: tuple[Encoding, ...], _block: int, _row: int, accelerate: str) -> tuple[Speed, ...]:
        asked.append(accelerate)
        pays = 1e15 if accelerate else 1.0
        return tuple(Speed(each.value, 2.0, pays, pays) for each in encodings)

    monkeypatch.setattr(codecs_auto, "speeds", speeds)
    named = {"lossy": False, "dtype": "bfloat16", "block_bytes": BLOCK_BYTES, "row": ROW}
    found = codec_for("auto", accelerate="numba", **named)  # type: ignore[arg-type]
    assert found is not None
    assert found._compiled
    assert codec_for("auto", **named) is None  # type: ignore[arg-type]
    assert asked == ["numba", ""]


def test_where_auto_finds_nothing_that_pays_blocks_are_raw_and_nothing_is_refused() -> None:
    assert codec_for("auto", lossy=True, dtype="float32", block_bytes=BLOCK_BYTES, row=ROW, accelerate="numba") is None
