"""What an index child has found at start, out of the memory that it sends. Any thread."""

import json
import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kvproto.ids import NamespaceDigest
from kvstore.tier.format import RECORD
from kvstore.tier.orders import Found
from kvstored.index_wire import Message

__all__ = ["Loaded", "NameFound", "parse_loaded"]


@dataclass(frozen=True, slots=True)
class NameFound:
    """A namespace of the index."""

    number: int
    tenant: str
    digest: NamespaceDigest
    canonical: bytes  # empty if only headers were left, and it is too long for them


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was on disk. If the index is lost: segments, all of them closed, and numbers that no file has."""

    store: bytes  # 16 bytes; none if it is not known: then nothing can be written either
    segments: list[Found]  # in order of their numbers
    directories: dict[int, Path]  # of each segment
    key_ids: dict[int, bytes]  # of each segment; empty: not encrypted
    names: list[NameFound]
    next_generation: int
    next_segment: int
    foreign: list[Path]  # files in `segments/` that are not ours: left alone
    unreadable: list[str]  # directories and files, with the reason
    rebuilt: str  # why the index was made anew; empty if it was not
    dropped: int  # records or headers that were of no use
    closed: frozenset[int] = frozenset()  # segments that could not be read: nobody knows what lies there
    # Segments that the index knows and no directory has while one is absent, or cannot be looked into. With their
    # tenants; empty: nobody knows.
    unseen: dict[int, str] = field(default_factory=dict)
    looked: frozenset[Path] = frozenset()  # directories of which all could be read: in others there may be more
    unread: list[Path] = field(default_factory=list)  # files in `segments/` that could not be read in this life
    aside: tuple[Path, ...] = ()  # files of this store whose number another one has, where they lie now


def parse_loaded(message: Message) -> tuple[Loaded, str]:
    """What a LOADED brings, and why there is no index file in spite of it. Closes its descriptor.

    Raises OSError.
    """
    with_json = message.first + message.second
    try:
        memory = mmap.mmap(message.fd, with_json, prot=mmap.PROT_READ)
    finally:
        os.close(message.fd)
    head = json.loads(memory[message.first : with_json])
    segments = [
        Found(
            each["segment"], each["slot_bytes"], each["slots"], each["tenant"],
            np.frombuffer(memory, RECORD, each["slots"], each["offset"]),
        )
        for each in head["segments"]
    ]  # fmt: skip
    names = [
        NameFound(
            each["number"], each["tenant"], NamespaceDigest(bytes.fromhex(each["digest"])),
            bytes.fromhex(each["canonical"]),
        )
        for each in head["names"]
    ]  # fmt: skip
    loaded = Loaded(
        store=bytes.fromhex(head["store"]),
        segments=segments,
        directories={each["segment"]: Path(each["directory"]) for each in head["segments"]},
        key_ids={each["segment"]: bytes.fromhex(each["key"]) for each in head["segments"]},
        names=names,
        next_generation=head["highest_generation"] + 1,
        next_segment=head["next_segment"],
        foreign=[Path(path) for path in head["foreign"]],
        unreadable=head["unreadable"],
        rebuilt=head["rebuilt"],
        dropped=head["dropped"],
        closed=frozenset(head["closed"]),
        unseen=dict(head["unseen"]),
        looked=frozenset(map(Path, head["looked"])),
        unread=[Path(path) for path in head["unread"]],
        aside=tuple(map(Path, head["aside"])),
    )
    return loaded, head["unwritten"]
