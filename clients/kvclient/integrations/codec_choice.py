"""What users of an integration say of codecs, and what follows for the blocks of an engine.

Blocks then lie encoded in the store, and the engine has them as ever. Values that share a scale (`int8`, `fp8`) are
those that lie side by side in the engine's memory, as many as a head has: whatever its kernels make of them, they are
the same ones each time.

Whatever is compiled is compiled here, while the engine starts: seconds the first time, which no step of it waits for.
Only here is numba imported, too, with the engine's memory in place: vLLM on CPU ends if it finds numba before that.
"""

from dataclasses import replace
from importlib.util import find_spec

from kvclient.codecs import ACCELERATORS, NAMES, RAW, Codec, codec_of
from kvclient.codecs_auto import AUTO, resolved
from kvkernels.encodings import Encoding
from kvproto.errors import UsageError
from kvproto.identity import NamespaceIdentity


def codec_trouble(codec: str, *, lossy: bool, accelerate: str = "") -> str:
    """Why this is no codec to be had, whatever the engine; or nothing. Looks for numba, and imports nothing."""
    if codec not in (*NAMES, AUTO):
        return f'"codec" is one of {", ".join((*NAMES, AUTO))}, not {codec!r:.60}'
    if accelerate not in ACCELERATORS:
        return f'"accelerate" is "numba" or nothing, not {accelerate!r:.60}'
    if accelerate and codec == RAW:
        return '"accelerate" is for codecs: raw blocks are only copied'
    if accelerate and find_spec(accelerate) is None:  # each is called what its package is
        return (
            f'"accelerate" wants {accelerate}, which is not installed where the engine runs: install it or leave it out'
        )
    if codec in (RAW, AUTO) or Encoding(codec).is_lossless or lossy:
        return ""
    return f'codec {codec} changes values: say "lossy": true if that is wanted'


def codec_for(
    codec: str, *, lossy: bool, dtype: object, block_bytes: int, row: int, accelerate: str = ""
) -> Codec | None:
    """The codec of an engine's blocks, ready to be used; None for raw ones.

    `dtype`: of a value; `row`: how many of them a head has. Raises UsageError for blocks that it does not take, and for
    an `accelerate` that cannot be had.
    """
    named, fits = str(dtype).removeprefix("torch."), row > 0 and not block_bytes % (2 * row)
    shape = (block_bytes // 2 // row, row) if fits else None
    if codec == AUTO:
        codec = resolved(
            dtype=named, block_bytes=block_bytes, block_shape=shape, lossy=lossy, accelerate=accelerate,
            link_bytes_per_s=None,
        )  # fmt: skip
        accelerate = "" if codec == RAW else accelerate
    if codec in (Encoding.INT8, Encoding.FP8) and shape is None:
        raise UsageError(f"codec {codec}: blocks of {block_bytes} bytes are no whole heads of {row} values")
    made = codec_of(codec, dtype=named, block_bytes=block_bytes, block_shape=shape, lossy=lossy, accelerate=accelerate)
    if made is not None:
        made.warm_up()
    return made


def encoded(identity: NamespaceIdentity, codec: Codec | None) -> NamespaceIdentity:
    """That of the same blocks as they lie in the store."""
    if codec is None:
        return identity
    return replace(identity, block_bytes=codec.stored_bytes, codec=codec.text)
