"""What each layer says: one TOML file, the environment (KVSTORED_*), the flags, each over the one before.

Each is checked even where a later one overrides it. All trouble is a `ConfigError` that says where it stands.
"""

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvproto import limits
from kvproto.sizes import quoted
from kvstore.quotas import USUAL, Quota
from kvstore.report import ConfigValue
from kvstored.quota_keys import QUOTA_KEYS, read_quota
from kvstored.settings import SETTINGS, AnySetting
from kvstored.units import ConfigError, TomlFile, dotted, toml_type_name

UID_MAX: Final = 2**32 - 2  # (uid_t)-1 means "no change" to chown and setresuid
UID_UNMAPPED: Final = 65534  # what the kernel shows for a uid that this user namespace does not map
ENV_PREFIX: Final = "KVSTORED_"
# Names with our prefix that are not settings: KVSTORED_CONFIG names the file and is read by the command line.
ENV_OF_OTHERS: Final = frozenset({"KVSTORED_CONFIG"})

INTEGER_MAX: Final = 2**63 - 1  # of TOML; Python reads longer ones, and fails to show the longest
TENANTS: Final = "tenants"  # the one section whose keys are not settings

_OWN_KEYS: Final = ("uids", "trusting")  # of a tenant, beside its quota's
_SECTIONS: Final = {setting.toml.split(".")[0] for setting in SETTINGS}
_TENANT_NAME: Final = re.compile(rf"[A-Za-z0-9._-]{{1,{limits.NAME_BYTES}}}")


@dataclass(frozen=True, slots=True)
class Given:
    """One value as one layer gave it: `origin` for `kvctl config`, `place` for an error."""

    setting: AnySetting
    text: str
    origin: str
    place: str


@dataclass(frozen=True, slots=True)
class TenantConfig:
    """One [tenants.NAME] table: the uids whose processes may belong to it, and what it may have."""

    name: str
    uids: tuple[int, ...]
    quota: Quota = USUAL
    trusting: bool = False  # may its engines write into its memory themselves (mode direct)?


@dataclass(frozen=True, slots=True)
class Layers:
    """Values in the order in which they count, the last one of a setting; and the tenants, which only the file has."""

    given: tuple[Given, ...]
    tenants: tuple[tuple[TenantConfig, tuple[ConfigValue, ...]], ...]


def read_layers(config_file: Path | None, environ: Mapping[str, str], flags: Mapping[str, str]) -> Layers:
    """All that anybody has said. Raises ConfigError at the first mistake."""
    file = TomlFile.read(config_file) if config_file is not None else None
    given = (*_from_file(file), *_from_environment(environ), *_from_flags(flags))
    return Layers(given, tuple(_tenants(file)))


def _from_file(file: TomlFile | None) -> Iterator[Given]:
    if file is None:
        return
    known = {setting.toml for setting in SETTINGS}
    leaves = {setting.toml.split(".")[1]: setting.toml for setting in reversed(SETTINGS)}  # of two alike, the first
    for section in file.document:
        if section == TENANTS:
            continue
        if section not in _SECTIONS:
            near = _nearest(section, leaves | {name: name for name in (*_SECTIONS, TENANTS)})
            raise file.error((section,), f"unknown section or key {dotted(section)}{near}")
        for key, value in file.table(section).items():
            if f"{section}.{key}" not in known:
                own = {toml.split(".")[1]: toml for toml in known if toml.startswith(f"{section}.")}
                near = _nearest(key, own) or _nearest(key, leaves)
                raise file.error((section, key), f"unknown key {dotted(section, key)}{near}")
            yield _from_key(file, section, key, value)


def _from_key(file: TomlFile, section: str, key: str, value: object) -> Given:
    toml = f"{section}.{key}"
    setting = next(setting for setting in SETTINGS if setting.toml == toml)
    place = file.place(section, key)
    if type(value) not in setting.kind.toml_types:  # not isinstance: true is an int to Python
        raise ConfigError(f"{place}: {toml}: must be {setting.kind.expects}, not {toml_type_name(value)}")
    if isinstance(value, int) and abs(value) > INTEGER_MAX:
        raise ConfigError(f"{place}: {toml}: is larger than any TOML integer")
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if isinstance(value, list):
        text = _joined(value, f"{place}: {toml}")
    return Given(setting, text, f"file {place}", f"{place}: {toml}")


def _joined(values: list[object], place: str) -> str:
    """A list as the environment would have it."""
    texts: list[str] = []
    for value in values:
        if not isinstance(value, str):
            raise ConfigError(f"{place}: a path is a string, not {toml_type_name(value)}")
        if os.pathsep in value or not value.startswith("/"):
            raise ConfigError(f"{place}: {quoted(value)} is not an absolute path without {os.pathsep!r}")
        texts.append(value)
    return os.pathsep.join(texts)


def _from_environment(environ: Mapping[str, str]) -> Iterator[Given]:
    known = {setting.env: setting for setting in SETTINGS}
    names = {env.removeprefix(ENV_PREFIX): env for env in known}
    for name in sorted(environ):
        if not name.startswith(ENV_PREFIX) or name in ENV_OF_OTHERS:
            continue
        place = f"environment {name}"
        if name not in known:
            raise ConfigError(f"{place}: unknown{_nearest(name.removeprefix(ENV_PREFIX), names)}")
        yield Given(known[name], environ[name], place, place)


def _from_flags(flags: Mapping[str, str]) -> Iterator[Given]:
    known = {setting.flag: setting for setting in SETTINGS}
    names = {flag.lstrip("-"): flag for flag in known}
    seen: set[str] = set()
    for name, text in flags.items():
        flag = "--" + name.lstrip("-").replace("_", "-")
        place = f"flag {flag}"
        if flag not in known:
            raise ConfigError(f"{place}: unknown{_nearest(flag.lstrip('-'), names)}")
        if flag in seen:
            raise ConfigError(f"{place}: given twice")
        seen.add(flag)
        yield Given(known[flag], text, place, place)


def _nearest(word: str, choices: Mapping[str, str]) -> str:
    """The end of an error message: what the operator may have meant, or nothing."""
    near = difflib.get_close_matches(word, choices, n=1)
    return f"; did you mean {choices[near[0]]}?" if near else ""


def _tenants(file: TomlFile | None) -> Iterator[tuple[TenantConfig, tuple[ConfigValue, ...]]]:
    if file is None:
        return
    for number, name in enumerate(file.table(TENANTS), start=1):
        keys = (TENANTS, name)
        if number > limits.TENANTS:
            raise file.error(keys, f"more than {limits.TENANTS} tenants")
        if _TENANT_NAME.fullmatch(name) is None:
            raise file.error(keys, f"{quoted(name)} is not a tenant name; 1 to 64 of A-Z a-z 0-9 . _ -")
        if name.startswith("uid-"):
            raise file.error(keys, f"{name}: names that start with uid- belong to uids that no tenant lists")
        table = file.table(*keys)
        for key in table:
            if key not in _OWN_KEYS and key not in QUOTA_KEYS:
                near = _nearest(key, {one: dotted(*keys, one) for one in (*_OWN_KEYS, *QUOTA_KEYS)})
                raise file.error((*keys, key), f"unknown key {dotted(*keys, key)}{near}")
        uids = _uids(file, name, table.get("uids"))
        origin = f"file {file.place(*keys, 'uids')}"
        reason = "processes of these uids may belong to this tenant"
        shown = ", ".join(map(str, uids))
        quota, values = read_quota(file, keys)
        listed = ConfigValue(dotted(*keys, "uids"), shown, origin, "uids", reason)
        trusting, said = _trusting(file, keys, table.get("trusting"))
        yield TenantConfig(name, uids, quota, trusting), (listed, *said, *values)


def _trusting(file: TomlFile, keys: tuple[str, ...], given: object) -> tuple[bool, tuple[ConfigValue, ...]]:
    """Whether a tenant's engines may write into its arenas."""
    if given is None:
        return False, ()
    keys = (*keys, "trusting")
    if not isinstance(given, bool):
        raise file.error(keys, f"{dotted(*keys)}: must be true or false, not {toml_type_name(given)}")
    reason = "its engines may write into its memory themselves (mode direct): each could harm what others stored"
    value = ConfigValue(dotted(*keys), str(given).lower(), f"file {file.place(*keys)}", "switch", reason)
    return given, (value,)


def _uids(file: TomlFile, name: str, listed: object) -> tuple[int, ...]:
    keys = (TENANTS, name, "uids")
    toml = dotted(*keys)
    if not isinstance(listed, list) or not listed:
        raise file.error(keys, f"{toml}: must be a list of at least one uid, such as [1000]")
    uids: list[int] = []
    for uid in listed:
        if type(uid) is not int:
            raise file.error(keys, f"{toml}: a uid is a whole number, not {toml_type_name(uid)}")
        if not 0 <= uid <= UID_MAX:
            raise file.error(keys, f"{toml}: a uid is from 0 to {UID_MAX}")
        if uid == UID_UNMAPPED:
            raise file.error(keys, f"{toml}: {uid} stands for every uid that is not mapped here")
        if uid in uids:
            raise file.error(keys, f"{toml}: {uid} is listed twice")
        uids.append(uid)
    return tuple(uids)
