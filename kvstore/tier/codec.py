"""Whether a namespace's blocks are packed on their way to disk. Decided by what packing gains, measured, and by what
the host's processors have to spare: a codec that makes an engine wait gains nothing. Owner thread."""

from dataclasses import dataclass
from enum import StrEnum

from kvstore.ports import Workers
from kvstore.sessions import Namespace
from kvstore.tier.format import Codec

TRY_EVERY = 64  # a namespace that does not pack well is tried again after so many batches
GOOD_RATIO = 0.85
IDLE_SHARE = 0.3
SIXTEEN_BITS = ("bf16", "bfloat16", "torch.bfloat16", "f16", "fp16", "float16", "torch.float16", "half")


class Wish(StrEnum):
    """What the configuration asks for."""

    AUTO = "auto"
    RAW = "raw"
    BF16_PLANES_ZSTD = "bf16-planes+zstd"


@dataclass(slots=True)
class _Seen:
    ratio: float = 1.0  # stored over original bytes, averaged over the last ones
    tried: int = 0
    batches: int = 0


class Choice:
    """One for all namespaces."""

    def __init__(self, wish: Wish) -> None:
        self._wish = wish
        self._seen: dict[int, _Seen] = {}

    def codec_for(self, namespace: Namespace, workers: Workers) -> Codec:
        """The codec of the next batch."""
        if self._wish is Wish.RAW:
            return Codec.RAW
        if self._wish is Wish.BF16_PLANES_ZSTD:
            return Codec.BF16_PLANES_ZSTD
        if namespace.identity.dtype.lower() not in SIXTEEN_BITS:
            return Codec.RAW
        seen = self._seen.setdefault(namespace.number, _Seen())
        seen.batches += 1
        trying = seen.batches % TRY_EVERY == 1
        if (seen.ratio <= GOOD_RATIO or trying) and workers.idle_share() >= IDLE_SHARE:
            return Codec.BF16_PLANES_ZSTD
        return Codec.RAW

    def learn(self, namespace: Namespace, block_bytes: int, stored_bytes: int) -> None:
        """A block was packed, or was found not to pay (`stored_bytes` equal to its own)."""
        seen = self._seen.setdefault(namespace.number, _Seen())
        ratio = stored_bytes / block_bytes
        seen.ratio = ratio if not seen.tried else 0.9 * seen.ratio + 0.1 * ratio
        seen.tried += 1

    def ratio(self, namespace: Namespace) -> float | None:
        """Stored over original bytes; None if nobody has tried."""
        seen = self._seen.get(namespace.number)
        return seen.ratio if seen is not None and seen.tried else None
