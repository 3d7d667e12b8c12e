"""What users of an integration say of codecs, `codec` and `lossy`, and what follows for the blocks of an engine.

Blocks then lie encoded in the store, and the engine has them as ever. Values that share a scale (`int8`, `fp8`) are
those that lie side by side in the engine's memory, as many as a head has: whatever its kernels make of them, they are
the same ones each time.
"""

from dataclasses import replace

from kvclient.codecs import NAMES, RAW, Codec, codec_of
from kvclient.codecs_auto import AUTO, resolved
from kvkernels.encodings import Encoding
from kvproto.errors import UsageError
from kvproto.identity import NamespaceIdentity


def codec_trouble(codec: str, *, lossy: bool) -> str:
    """Why this is no codec to be had, whatever the engine; or nothing."""
    if codec not in (*NAMES, AUTO):
        return f'"codec" is one of {", ".join((*NAMES, AUTO))}, not {codec!r:.60}'
    if codec in (RAW, AUTO) or Encoding(codec).is_lossless or lossy:
        return ""
    return f'codec {codec} changes values: say "lossy": true if that is wanted'


def codec_for(codec: str, *, lossy: bool, dtype: object, block_bytes: int, row: int) -> Codec | None:
    """The codec of an engine's blocks; None for raw ones. `dtype`: of a value; `row`: how many of them a head has.

    Raises UsageError for blocks that it does not take.
    """
    named, fits = str(dtype).removeprefix("torch."), row > 0 and not block_bytes % (2 * row)
    shape = (block_bytes // 2 // row, row) if fits else None
    if codec == AUTO:
        codec = resolved(
            dtype=named, block_bytes=block_bytes, block_shape=shape, lossy=lossy, accelerate="", link_bytes_per_s=None
        )
    if codec in (Encoding.INT8, Encoding.FP8) and shape is None:
        raise UsageError(f"codec {codec}: blocks of {block_bytes} bytes are no whole heads of {row} values")
    return codec_of(codec, dtype=named, block_bytes=block_bytes, block_shape=shape, lossy=lossy)


def encoded(identity: NamespaceIdentity, codec: Codec | None) -> NamespaceIdentity:
    """That of the same blocks as they lie in the store."""
    if codec is None:
        return identity
    return replace(identity, block_bytes=codec.stored_bytes, codec=codec.text)
