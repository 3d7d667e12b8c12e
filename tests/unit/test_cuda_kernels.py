"""The CUDA kernels: they compile, and run on a processor they give the bytes of the references.

`emulated.h` runs every thread of a block as a coroutine; whether a GPU orders memory as it does is for tests/gpu.
"""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

import kvkernels
from kvkernels import encodings
from kvkernels.aligned import aligned
from kvkernels.encodings import ESCAPES, TILE, Encoding, Values, encoded_bytes
from tests.unit.cuda_kit import Blocks, Engine, PagesOf, on_a_processor, run, tool
from tests.values import as_bf16, as_half, shapes_of_values

FOLDER = Path(kvkernels.__file__).parent / "cuda"
SOURCES = sorted(FOLDER.glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90")
ROW = 128
NAMES = {Encoding.INT8: "int8", Encoding.FP8: "fp8", Encoding.INT4_G64: "int4"}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_every_source_compiles(source: Path, tmp_path: Path) -> None:
    nvcc = tool("nvcc")
    for architecture in ARCHITECTURES:
        subprocess.run(
            [nvcc, "-std=c++17", f"-arch={architecture}", "--fmad=false", "-cubin", "-Werror", "all-warnings",
             "-o", tmp_path / "out", source], check=True,
        )  # fmt: skip
    broken = tmp_path / "broken.cu"
    broken.write_text(source.read_text() + "\n__global__ void oops() { nothing; }\n")
    done = subprocess.run(
        [nvcc, "-cubin", f"-I{FOLDER}", "-o", tmp_path / "out", broken], check=False, capture_output=True
    )
    assert done.returncode, "this would have passed anything"


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_a_compiler_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("CI", ci)
    assert Path(tool("sh")).exists()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(outcome, match="nvcc is not there"):
        tool("nvcc")


@pytest.fixture(scope="module")
def emulated() -> ctypes.CDLL:
    """The kernels, for a processor."""
    return on_a_processor()


@pytest.mark.parametrize(("pieces", "piece_bytes"), [(1, 16), (2, 4096), (3, 4112), (5, 12304), (64, 256)])
@pytest.mark.parametrize("ids", [[], [4], [8, 0, 3, 1]])
def test_blocks_go_out_of_pages_and_into_them(
    emulated: ctypes.CDLL, pieces: int, piece_bytes: int, ids: list[int]
) -> None:
    engine = Engine(pieces, piece_bytes, ids)
    whole = np.random.default_rng(3).integers(0, 256, (len(ids), pieces * piece_bytes), dtype=np.uint8)
    if ids:
        engine.put(whole)
    gathered = np.zeros((len(ids), pieces * piece_bytes + 64), np.uint8)
    run(emulated, "gather_blocks", engine, gathered, block=64)
    assert np.array_equal(gathered[:, :-64], whole)
    assert not gathered[:, -64:].any(), "written behind a block"
    if not ids:
        return
    gathered[:, 0] ^= 1
    assert not np.array_equal(gathered[:, :-64], whole)
    run(emulated, "scatter_blocks", engine, gathered, block=64)
    assert np.array_equal(engine.take(), gathered[:, :-64])
    assert (engine.outside == 0xEE).all(), "written outside its pages"


@pytest.mark.parametrize("name", ["gather_blocks", "scatter_blocks", "split_planes", "join_planes"])
def test_an_access_where_none_may_begin_is_found_out(emulated: ctypes.CDLL, name: str) -> None:
    """On a GPU it would end the context."""
    engine, blocks = Engine(1, 64, [0]), aligned(256).reshape(1, -1)
    run(emulated, name, engine, blocks)
    with pytest.raises(AssertionError, match="where none may begin"):
        run(emulated, name, engine, blocks[:, 8:])


def test_pages_may_lie_far_apart(emulated: ctypes.CDLL) -> None:
    """100,000 pages of 1 MiB: offsets of more than 32 bits."""
    whole = np.random.default_rng(4).integers(0, 256, (1, 4096), dtype=np.uint8)
    source = aligned(4096)
    source[:] = whole[0]
    base = (source.__array_interface__["data"][0] - 99_999 * (1 << 20)) % (1 << 64)
    tables = np.array([base], np.uint64), np.array([1 << 20], np.int64), np.array([99_999], np.int64)
    engine = Engine(1, 4096, [0])
    engine.pages = PagesOf(*(table.ctypes.data for table in tables), 4096, 1)
    gathered = np.zeros_like(whole)
    run(emulated, "gather_blocks", engine, gathered, block=64)
    assert np.array_equal(gathered, whole)


def blocks_of(values: Values, count: int) -> Blocks:
    """So many blocks of these values, each begun elsewhere."""
    return np.stack([np.roll(values, 1000 * number) for number in range(count)]).view(np.uint8)


def room_of(encoding: Encoding, values: int, count: int) -> Blocks:
    """For encoded blocks, with something behind each."""
    size = encoded_bytes(encoding, values, ROW if encoding is not Encoding.BF16_FIXED else 8)
    return np.full((count, (size + 79) // 16 * 16), 0xDD, np.uint8)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", shapes_of_values())
@pytest.mark.parametrize("encoding", NAMES)
def test_lossy_encodings_give_the_bytes_of_the_reference(
    emulated: ctypes.CDLL, encoding: Encoding, name: str, half: bool
) -> None:
    plain = shapes_of_values()[name]
    values = as_half(plain) if half else as_bf16(plain)
    pieces = 3  # of 2,944 values: 23 rows
    blocks = blocks_of(values, 2)
    engine = Engine(pieces, values.size * 2 // pieces, [5, 2])
    engine.put(blocks)
    stored, unfit = room_of(encoding, values.size, 2), np.zeros(2, np.uint32)
    row = () if encoding is Encoding.INT4_G64 else (ROW,)
    run(emulated, f"encode_{NAMES[encoding]}", engine, stored, *row, int(half), unfit)
    assert not unfit.any()
    size = encoded_bytes(encoding, values.size, ROW)
    wanted = np.zeros(size, np.uint8)
    for block, found in zip(blocks, stored, strict=True):
        assert encodings.encode(encoding, block.view(np.uint16), wanted, ROW, half=half)
        assert np.array_equal(found[:size], wanted)
        assert (found[size:] == 0xDD).all(), "written behind a block"
    engine.memory[:] = 0xEE
    run(emulated, f"decode_{NAMES[encoding]}", engine, stored, *row, int(half))
    back = np.zeros(values.size, np.uint16)
    for found, own in zip(engine.take(), stored, strict=True):
        encodings.decode(encoding, own[:size].copy(), back, ROW, half=half)
        assert np.array_equal(found.view(np.uint16), back)
    assert (engine.outside == 0xEE).all()


@pytest.mark.parametrize("odd", [0x7FC0, 0x7F80, 0xFF80])
@pytest.mark.parametrize("encoding", NAMES)
def test_blocks_that_are_not_finite_are_told(emulated: ctypes.CDLL, encoding: Encoding, odd: int) -> None:
    blocks = blocks_of(as_bf16(shapes_of_values()["normal"]), 3)
    blocks[1].view(np.uint16)[4321] = odd
    engine = Engine(1, blocks.shape[1], [0, 1, 2])
    engine.put(blocks)
    stored, unfit = room_of(encoding, blocks.shape[1] // 2, 3), np.zeros(3, np.uint32)
    row = () if encoding is Encoding.INT4_G64 else (ROW,)
    run(emulated, f"encode_{NAMES[encoding]}", engine, stored, *row, 0, unfit)
    assert unfit.tolist() == [0, 1, 0]


@pytest.mark.parametrize("count", [8, 4096, 2 * TILE + 640, 5 * TILE])
def test_bf16_fixed_gives_the_bytes_of_the_reference(emulated: ctypes.CDLL, count: int) -> None:
    values = np.resize(as_bf16(shapes_of_values()["channels of many scales"]), count)
    values[:: max(1, count // 9)] = 0x7F80  # an escape here and there
    blocks = blocks_of(values, 2)
    engine = Engine(1 if count < 16 else 4, values.size * 2 // (1 if count < 16 else 4), [3, 7])
    engine.put(blocks)
    stored, unfit = room_of(Encoding.BF16_FIXED, count, 2), np.zeros(2, np.uint32)
    run(emulated, "make_codebooks", engine, stored)
    run(emulated, "encode_fixed", engine, stored, unfit)
    assert not unfit.any()
    size = encoded_bytes(Encoding.BF16_FIXED, count, 8)
    wanted = np.zeros(size, np.uint8)
    for block, found in zip(blocks, stored, strict=True):
        assert encodings.encode(Encoding.BF16_FIXED, block.view(np.uint16), wanted, 8, half=False)
        assert np.array_equal(found[:size], wanted)
        assert (found[size:] == 0xDD).all(), "written behind a block"
    engine.memory[:] = 0xEE
    bad = np.zeros(2, np.uint32)
    run(emulated, "decode_fixed", engine, stored, bad)
    assert not bad.any()
    assert np.array_equal(engine.take(), blocks)
    assert (engine.outside == 0xEE).all()
    stored[1, 20] ^= 1
    run(emulated, "decode_fixed", engine, stored, bad)
    assert not np.array_equal(engine.take(), blocks), "this comparison finds nothing out"


def test_too_many_escapes_and_damaged_ones_are_told(emulated: ctypes.CDLL) -> None:
    values = np.resize(np.arange(100, 115, dtype=np.uint16) << 7, 2 * TILE)
    blocks = np.stack([values, values, values]).view(np.uint8)
    blocks[1].view(np.uint16)[TILE + 3 : TILE + 3 + ESCAPES] = 200 << 7
    blocks[2].view(np.uint16)[TILE + 3 : TILE + 4 + ESCAPES] = 200 << 7
    engine = Engine(1, blocks.shape[1], [0, 1, 2])
    engine.put(blocks)
    stored, unfit, bad = room_of(Encoding.BF16_FIXED, 2 * TILE, 3), np.zeros(3, np.uint32), np.zeros(3, np.uint32)
    run(emulated, "make_codebooks", engine, stored)
    run(emulated, "encode_fixed", engine, stored, unfit)
    assert unfit.tolist() == [0, 0, 1]
    size = encoded_bytes(Encoding.BF16_FIXED, 2 * TILE, 8)
    wanted = np.zeros(size, np.uint8)
    assert encodings.encode(Encoding.BF16_FIXED, blocks[1].view(np.uint16), wanted, 8, half=False)
    assert np.array_equal(stored[1, :size], wanted)
    tail = stored[:, size - 4 - 3 * ESCAPES : size]
    tail[0, :4].view(np.uint32)[0] = ESCAPES + 1
    tail[1, 4:6].view(np.uint16)[0] = TILE
    run(emulated, "decode_fixed", engine, stored, bad)
    assert bad.tolist()[:2] == [1, 1]
    assert (engine.outside == 0xEE).all()
