"""What settings must fit together with: each other, and this machine. All trouble is a ConfigError that blames one."""

import os
from pathlib import Path
from typing import Final

from kvproto import limits
from kvproto.sizes import format_bytes
from kvstored.config_chooser import Chooser
from kvstored.config_values import Config
from kvstored.drive_asking import ask_each
from kvstored.host_limits import Limit
from kvstored.http_address import OFF, address_of
from kvstored.remote_address import MOONCAKE, missing_package
from kvstored.secret_files import SecretFileError
from kvstored.settings import (
    ARENA,
    CONTROL_CERTIFICATE,
    CONTROL_CLIENT_CA,
    CONTROL_KEY,
    CONTROL_LISTEN,
    DISK,
    DISK_KEY_FILE,
    DISK_SEGMENT,
    DISK_SIZE,
    DRAM,
    METRICS_LISTEN,
    NUMBERS,
    REMOTE,
    REMOTE_ENDPOINT,
    REMOTE_SIZE,
    RUNTIME_DIR,
    SEGMENTS_LEAST,
    Basis,
    numbers_needed,
)
from kvstored.units import NO_FILE, ConfigError

# What the daemon itself has in its runtime directory, under names that others look for.
OWN_NAMES: Final = ("hot.sock", "control.sock", "tenants.sock", "token.sock", "keep.sock", "events", "lock")


def check_config(config: Config, chooser: Chooser) -> None:
    """All but memory (`check_dram`), events and quotas. Raises ConfigError."""
    _check_directories(config, chooser)
    _check_disk(config, chooser)
    _check_keys(config, chooser)
    _check_control(config, chooser)
    _check_metrics(config, chooser)
    _check_remote(config, chooser)


def check_dram(arena_bytes: int, basis: Basis, chooser: Chooser, memory: Limit) -> None:
    """Size, arena and machine against each other; blames the setting that is easier to have got wrong."""
    dram_bytes = basis.dram_bytes
    size, arena = format_bytes(dram_bytes), format_bytes(arena_bytes)
    if dram_bytes > memory.limit_bytes:
        most = format_bytes(memory.limit_bytes - memory.limit_bytes % limits.MIB)
        raise ConfigError(f"{chooser.places[DRAM.name]}: {size} is more than {memory.whose}, {most}")
    if arena_bytes > dram_bytes:
        guilty = ARENA if any(given.setting is ARENA for given in chooser.given) else DRAM
        place = chooser.places[guilty.name]
        raise ConfigError(f"{place}: a {DRAM.toml} of {size} does not hold one {ARENA.toml} of {arena}")
    if dram_bytes > arena_bytes * limits.ARENAS:
        least = format_bytes(limits.arena_bytes_for(dram_bytes))
        reason = f"{size} makes more than {limits.ARENAS} arenas of {arena}; take {least}"
        raise ConfigError(f"{chooser.places[ARENA.name]}: {reason}")


def _check_directories(config: Config, chooser: Chooser) -> None:
    """Each must have its files to itself; links and `..` hide nothing here."""
    place = chooser.places[DISK.name]
    answers = ask_each(config.disk_directories, os.path.realpath)
    real = {path: Path(one.result()) if one.done() else path.absolute() for path, one in answers.items()}
    for number, path in enumerate(config.disk_directories):
        if real[path] == Path(os.path.realpath(config.runtime_dir)):
            raise ConfigError(f"{place}: {path} is {RUNTIME_DIR.toml}, which has files of its own; take another folder")
        for other in config.disk_directories[:number]:
            if real[path] == real[other]:
                raise ConfigError(f"{place}: {path} and {other} are one folder")
            for inner, outer in ((path, other), (other, path)):
                if real[inner].is_relative_to(real[outer]):
                    raise ConfigError(f"{place}: {inner} lies inside {outer}; take folders beside each other")


def _check_disk(config: Config, chooser: Chooser) -> None:
    """Size, segment and what they must fit together with; blames the setting that is easier to have got wrong."""
    named = {given.setting.name for given in chooser.given}
    size_place, segment_place = chooser.places[DISK_SIZE.name], chooser.places[DISK_SEGMENT.name]
    disk_bytes, segment_bytes = config.disk_bytes, config.segment_bytes
    size, segment = format_bytes(disk_bytes), format_bytes(segment_bytes)
    if not config.disk_directories:
        if disk_bytes and DISK.name not in named:
            raise ConfigError(f"{size_place}: {size} of disk, and no {DISK.toml}: name a folder on each drive")
        return
    if not disk_bytes:
        place = size_place if DISK_SIZE.name in named else chooser.places[DISK.name]
        reason = f"needs {DISK_SIZE.toml} ({DISK_SIZE.flag}), the bytes that all directories may take together"
        raise ConfigError(f"{place}: {DISK.toml} {reason}")
    if disk_bytes < SEGMENTS_LEAST * segment_bytes:
        place = segment_place if DISK_SEGMENT.name in named else size_place
        reason = f"a {DISK_SIZE.toml} of {size} does not hold {SEGMENTS_LEAST} segments of {segment}"
        raise ConfigError(f"{place}: {reason}")
    place = segment_place if DISK_SEGMENT.name in named else size_place
    if disk_bytes // segment_bytes > limits.SEGMENTS:
        least = format_bytes(limits.segment_bytes_for(disk_bytes))
        reason = f"{size} makes more than {limits.SEGMENTS} segments of {segment}; take {least}"
        raise ConfigError(f"{place}: {reason}")
    if numbers_needed(config.dram_bytes, config.arena_bytes, disk_bytes, segment_bytes) >= NUMBERS:
        reason = f"{size} in segments of {segment} beside arenas of {format_bytes(config.arena_bytes)}"
        raise ConfigError(f"{place}: {reason} has more slots than 32 bits can number; take larger ones, or less disk")


def _check_keys(config: Config, chooser: Chooser) -> None:
    """Trouble with a key is told before anything starts; it is read again when the disk opens."""
    place = chooser.places[DISK_KEY_FILE.name]
    if config.disk_key_file != NO_FILE and not config.disk_directories:
        raise ConfigError(f"{place}: a key, and no {DISK.toml} to encrypt")
    try:
        config.disk_keys()
    except SecretFileError as error:
        raise ConfigError(f"{place}: {error}") from None


def _check_control(config: Config, chooser: Chooser) -> None:
    """All three files for an address, none without."""
    place = chooser.places[CONTROL_LISTEN.name]
    for setting in (CONTROL_CERTIFICATE, CONTROL_KEY, CONTROL_CLIENT_CA):
        there = getattr(config, setting.name) != NO_FILE
        if there and config.control_listen == OFF:
            raise ConfigError(f"{chooser.places[setting.name]}: is of no use without {CONTROL_LISTEN.toml}")
        if not there and config.control_listen != OFF:
            reason = f"whoever can connect to {config.control_listen} is nobody known without {setting.toml}"
            raise ConfigError(f"{place}: {reason}; only mutual TLS is spoken there")
    files = config.control_tls()
    try:
        if files is not None:
            files.checked()
    except SecretFileError as error:
        raise ConfigError(f"{place}: {error}") from None


def _check_metrics(config: Config, chooser: Chooser) -> None:
    """Whoever listens last has the name."""
    address = address_of(config.metrics_listen)
    if not isinstance(address, Path):
        return
    runtime_dir = Path(os.path.realpath(config.runtime_dir))
    real = Path(os.path.realpath(address.parent)) / address.name
    if real.is_relative_to(runtime_dir) and real.relative_to(runtime_dir).parts[:1] in {(name,) for name in OWN_NAMES}:
        place = chooser.places[METRICS_LISTEN.name]
        raise ConfigError(f"{place}: {address} is the daemon's own; take another name, such as metrics.sock")


def _check_remote(config: Config, chooser: Chooser) -> None:
    """What it needs is no part of what a daemon needs otherwise."""
    address = config.remote_address()
    if address is None:
        for setting in (REMOTE_ENDPOINT, REMOTE_SIZE):
            if any(given.setting is setting for given in chooser.given):
                raise ConfigError(f"{chooser.places[setting.name]}: is of no use without {REMOTE.toml}")
        return
    place = chooser.places[REMOTE.name]
    if missing := missing_package(address):
        how = "its package, or remote.python" if address.scheme == MOONCAKE else "pip install 'kvstored[remote]'"
        raise ConfigError(f"{place}: {missing} is missing: {how}")
    if not config.remote_bytes:
        reason = f"needs {REMOTE_SIZE.toml} ({REMOTE_SIZE.flag}), the bytes that this host may keep there"
        raise ConfigError(f"{place}: {REMOTE.toml} {reason}")
