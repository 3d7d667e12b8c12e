"""The file with the keys of the disk tier: lines of 64 hex digits, the first for new segments, the others to read with.

What is done with them: drive_keys.py.
"""

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from kvstored.secret_files import SecretFileError, read_secret

CIPHER: Final = "aes-256-gcm"  # what keys are for
KEY_BYTES: Final = 32
KEY_ID_BYTES: Final = 16
KEYS: Final = 16
_ID_PREFIX: Final = b"kvstored key id\0"


@dataclass(frozen=True, slots=True)
class KeyRing:
    """Keys as their file has them; not in logs or errors, by their ids alone."""

    keys: tuple[bytes, ...]

    def __repr__(self) -> str:
        return f"KeyRing({', '.join(key_id(key).hex()[:12] for key in self.keys)})"

    def ids(self) -> frozenset[bytes]:
        """Of keys that can be read with."""
        return frozenset(map(key_id, self.keys))


def key_id(key: bytes) -> bytes:
    """What a superblock says of a key. Tells nothing of one that is random."""
    return hashlib.sha256(_ID_PREFIX + key).digest()[:KEY_ID_BYTES]


def read_keys(path: Path) -> KeyRing:
    """Raises SecretFileError."""
    if find_spec("cryptography") is None:
        raise SecretFileError(
            f"{path} is of no use without the package cryptography: pip install 'kvstored[encryption]'"
        )
    lines = [line.strip() for line in read_secret(path).splitlines()]
    words = [line for line in lines if line and not line.startswith(b"#")]
    if not 1 <= len(words) <= KEYS:
        raise SecretFileError(f"{path} has {len(words)} keys, and needs 1 to {KEYS}: openssl rand -hex 32")
    keys = []
    for number, word in enumerate(words, start=1):
        try:
            key = bytes.fromhex(word.decode("ascii"))
        except ValueError:
            key = b""
        if len(key) != KEY_BYTES or not any(key):
            raise SecretFileError(
                f"{path}: key {number} is not {2 * KEY_BYTES} random hex digits: openssl rand -hex 32"
            )
        keys.append(key)
    if len(set(keys)) < len(keys):
        raise SecretFileError(f"{path} has a key twice")
    return KeyRing(tuple(keys))
