"""Keys of the disk tier: payloads of a segment are encrypted with AES-256-GCM, if a key file is configured.

    key file    key_file.py
    key id      the first 16 bytes of SHA-256 over "kvstored key id" and the key; in the segment's superblock
    block key   HKDF-SHA256 of the key, salted with the store's id: stores that share a key file share no key

Each write takes a random nonce of 96 bits, which is in the slot's header with the tag; erasing the header takes them
away. Calls are short pieces, because the cipher does not give up the GIL and the owner thread must not wait for it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kvkernels.aligned import Bytes
from kvstore.tier.format import KEY_ID_BYTES as FORMAT_KEY_ID_BYTES
from kvstore.tier.format import NONCE_BYTES
from kvstored.key_file import KEY_BYTES, KEY_ID_BYTES, KeyRing, key_id

PIECE_BYTES: Final = 64 * 1024  # 16 us
_PURPOSE: Final = b"kvstored blocks, version 2"


class BlockCipher:
    """One key of one store. Any thread."""

    def __init__(self, identity: bytes, key: bytes) -> None:
        self.id = identity
        self._key = key

    def encrypt(self, plain: Bytes, into: Bytes, bound_to: bytes) -> tuple[bytes, bytes]:
        """Fill `into`, as long as `plain`. Returns nonce and tag. `bound_to`: what must be the same to decrypt."""
        from cryptography.hazmat.primitives.ciphers import Cipher  # noqa: PLC0415  only where it is wanted
        from cryptography.hazmat.primitives.ciphers.algorithms import AES  # noqa: PLC0415
        from cryptography.hazmat.primitives.ciphers.modes import GCM  # noqa: PLC0415

        nonce = os.urandom(NONCE_BYTES)
        encryptor = Cipher(AES(self._key), GCM(nonce)).encryptor()
        encryptor.authenticate_additional_data(bound_to)
        for begin in range(0, plain.size, PIECE_BYTES):
            encryptor.update_into(plain[begin : begin + PIECE_BYTES].data, into[begin : begin + PIECE_BYTES].data)
        encryptor.finalize()
        return nonce, encryptor.tag

    def decrypt(self, stored: Bytes, into: Bytes, bound_to: bytes, nonce: bytes, tag: bytes) -> bool:
        """Fill `into`, as long as `stored`. False: it is not what was encrypted, and `into` is worth nothing."""
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415
        from cryptography.hazmat.primitives.ciphers import Cipher  # noqa: PLC0415
        from cryptography.hazmat.primitives.ciphers.algorithms import AES  # noqa: PLC0415
        from cryptography.hazmat.primitives.ciphers.modes import GCM  # noqa: PLC0415

        decryptor = Cipher(AES(self._key), GCM(nonce, tag)).decryptor()
        decryptor.authenticate_additional_data(bound_to)
        for begin in range(0, stored.size, PIECE_BYTES):
            decryptor.update_into(stored[begin : begin + PIECE_BYTES].data, into[begin : begin + PIECE_BYTES].data)
        try:
            decryptor.finalize()
        except InvalidTag:
            return False
        return True


@dataclass(frozen=True, slots=True)
class StoreKeys:
    """Keys of one store: for new segments, and all by their ids."""

    newest: BlockCipher
    by_id: Mapping[bytes, BlockCipher]


def keys_of_store(ring: KeyRing, store: bytes) -> StoreKeys:
    """Those that a key file stands for in this store."""
    ciphers = {key_id(key): BlockCipher(key_id(key), _derived(key, store)) for key in ring.keys}
    return StoreKeys(ciphers[key_id(ring.keys[0])], ciphers)


def _derived(key: bytes, store: bytes) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF  # noqa: PLC0415

    return HKDF(SHA256(), KEY_BYTES, store, _PURPOSE).derive(key)


assert KEY_ID_BYTES == FORMAT_KEY_ID_BYTES
