"""What settings are written in: sizes, durations, counts, switches, words and paths; and the TOML file around them.

Every parser takes text and raises ValueError with a reason fit for an operator. A `Kind` bundles what one
sort of setting needs, so that the file, the environment and the flags are all read by the same parser.
"""

import contextlib
import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, TypeVar

from kvproto.limits import MIB
from kvproto.sizes import format_bytes, parse_bytes, parse_seconds, quoted

T = TypeVar("T")
Number = TypeVar("Number", int, float)

SWITCH_WORDS: Final = {
    "true": True, "yes": True, "on": True, "1": True,
    "false": False, "no": False, "off": False, "0": False,
}  # fmt: skip

NO_FOLDERS: Final = "none"
NO_FILE: Final = "none"

# Far above any sensible file, and small enough that a wrong path (a device, a log) costs nothing.
FILE_BYTES: Final = MIB

_COUNT: Final = re.compile(r"[0-9]{1,9}")
_SYNTAX_ERROR: Final = re.compile(r"(.*) \(at (?:line ([0-9]+), column [0-9]+|end of document)\)", re.DOTALL)
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
_TOML_TYPES: Final = {
    dict: "a table", list: "an array", bool: "a boolean",
    int: "an integer", float: "a float", str: "a string",
}  # fmt: skip


class ConfigError(Exception):
    """The configuration cannot be used. Reads `PLACE: reason`.

    PLACE is `FILE:LINE`, `environment NAME`, `flag --NAME` or `default of KEY`.
    """


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """One sort of value: how to read it, how to show it, and what an operator may write.

    `toml_types` are the TOML types taken besides text; `expects` finishes the sentence "must be ...". `bare` is what a
    flag without a value means; None where it needs one.
    """

    parse: Callable[[str], T]
    show: Callable[[T], str]
    toml_types: tuple[type, ...]
    expects: str
    range: str
    bare: str | None = None


def format_seconds(duration_s: float) -> str:
    """The duration in seconds: 30.0 is "30s", 0.5 is "0.5s"."""
    return f"{int(duration_s) if duration_s.is_integer() else duration_s}s"


def size_kind(low_bytes: int, high_bytes: int, *, multiple_bytes: int = 1) -> Kind[int]:
    """Sizes from `low_bytes` to `high_bytes`, whole multiples of `multiple_bytes`."""

    def parse(text: str) -> int:
        size_bytes = _within(parse_bytes(text), low_bytes, high_bytes, format_bytes)
        if size_bytes % multiple_bytes:
            raise ValueError(f"{quoted(text)} is not a multiple of {format_bytes(multiple_bytes)}")
        return size_bytes

    bounds = f"{format_bytes(low_bytes)} to {format_bytes(high_bytes)}"
    whole = f", a multiple of {format_bytes(multiple_bytes)}" if multiple_bytes > 1 else ""
    expects = 'a size such as "1GiB", or a whole number of bytes'
    return Kind(parse, format_bytes, (str, int), expects, bounds + whole)


def duration_kind(low_s: float, high_s: float) -> Kind[float]:
    """Durations from `low_s` to `high_s` seconds."""

    def parse(text: str) -> float:
        return _within(parse_seconds(text), low_s, high_s, format_seconds)

    bounds = f"{format_seconds(low_s)} to {format_seconds(high_s)}"
    return Kind(parse, format_seconds, (str,), 'a duration such as "30s"', bounds)


def count_kind(low: int, high: int) -> Kind[int]:
    """Whole numbers from `low` to `high`."""

    def parse(text: str) -> int:
        if _COUNT.fullmatch(text.strip()) is None:
            raise ValueError(f"{quoted(text)} is not a whole number")
        return _within(int(text), low, high, str)

    return Kind(parse, str, (int,), "a whole number", f"{low} to {high}")


def switch_kind() -> Kind[bool]:
    """On or off: true or false in TOML; also yes, no, on, off, 1 and 0 elsewhere."""

    def parse(text: str) -> bool:
        value = SWITCH_WORDS.get(text.strip().lower())
        if value is None:
            raise ValueError(f"{quoted(text)} is neither true nor false")
        return value

    return Kind(parse, lambda value: str(value).lower(), (bool,), "true or false", "true or false", bare="true")


def word_kind(*words: str) -> Kind[str]:
    """One of a few words."""

    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"{quoted(text)} is not one of {', '.join(words)}")
        return text

    return Kind(parse, str, (str,), f"one of {', '.join(words)}", ", ".join(words))


def folder_kind(path_bytes_max: int) -> Kind[Path]:
    """Absolute paths of at most `path_bytes_max` bytes."""

    def parse(text: str) -> Path:
        # Relative to what? A unit file, a shell and a file's author would each answer differently.
        if not text.startswith("/") or not text.isprintable():
            raise ValueError(f"{quoted(text)} is not an absolute path")
        if len(os.fsencode(text)) > path_bytes_max:
            raise ValueError(f"{quoted(text)} is longer than {path_bytes_max} bytes")
        return Path(text)

    return Kind(parse, str, (str,), "an absolute path", f"absolute, at most {path_bytes_max} bytes")


def folders_kind(path_bytes_max: int, count_max: int) -> Kind[tuple[Path, ...]]:
    """Up to `count_max` different absolute paths: a list in TOML, elsewhere with `:` between them; or "none"."""
    folder = folder_kind(path_bytes_max)

    def parse(text: str) -> tuple[Path, ...]:
        if text in ("", NO_FOLDERS):
            return ()
        # Both "/a/" and "/b/../a" are "/a"; what links make of it is for those who look at the file system.
        paths = tuple(Path(os.path.normpath(folder.parse(part))) for part in text.split(os.pathsep))
        if len(paths) > count_max:
            raise ValueError(f"{len(paths)} are more than {count_max}")
        for number, path in enumerate(paths):
            if path in paths[:number]:
                raise ValueError(f"{quoted(str(path))} is listed twice")
        return paths

    def show(paths: tuple[Path, ...]) -> str:
        return os.pathsep.join(map(str, paths)) or NO_FOLDERS

    bounds = f'at most {count_max}, absolute, "{os.pathsep}" between them, or {NO_FOLDERS}'
    return Kind(parse, show, (list,), 'a list of absolute paths, such as ["/mnt/nvme0/kv"]', bounds)


def file_kind(path_bytes_max: int) -> Kind[str]:
    """The absolute path of a file, as text; or "none"."""
    folder = folder_kind(path_bytes_max)

    def parse(text: str) -> str:
        return NO_FILE if text in ("", NO_FILE) else str(folder.parse(text))

    return Kind(parse, str, (str,), "the absolute path of a file", f"absolute, or {NO_FILE}")


def _within(value: Number, low: Number, high: Number, show: Callable[[Number], str]) -> Number:
    if not low <= value <= high:
        raise ValueError(f"{show(value)} is out of range; from {show(low)} to {show(high)}")
    return value


@dataclass(frozen=True, slots=True)
class TomlFile:
    """One parsed TOML file that can say on which line a key stands."""

    path: Path
    document: Mapping[str, object]
    lines: Mapping[tuple[str, ...], int]

    @classmethod
    def read(cls, path: Path) -> "TomlFile":
        """Read and parse. Raises ConfigError."""
        try:
            with path.open("rb") as stream:
                raw = stream.read(FILE_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        if len(raw) > FILE_BYTES:
            raise ConfigError(f"{path}:1: is larger than {format_bytes(FILE_BYTES)}")
        try:
            source = raw.decode()
            return cls(path, tomllib.loads(source), key_lines(source))
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            raise ConfigError(f"{path}:{line}: is not UTF-8") from error
        except (ValueError, RecursionError) as error:  # besides syntax: an endless number, bottomless nesting
            match = _SYNTAX_ERROR.fullmatch(str(error))
            line = int((match and match[2]) or source.count("\n") + 1) if match else 1
            raise ConfigError(f"{path}:{line}: {match[1] if match else error}") from error

    def place(self, *keys: str) -> str:
        """`FILE:LINE` of a key; of what it stands in where the key itself is not found."""
        nearest = (self.lines[keys[:end]] for end in range(len(keys), 0, -1) if keys[:end] in self.lines)
        return f"{self.path}:{next(nearest, 1)}"

    def error(self, keys: tuple[str, ...], reason: str) -> ConfigError:
        """The error to raise about a key."""
        return ConfigError(f"{self.place(*keys)}: {reason}")

    def table(self, *keys: str) -> Mapping[str, object]:
        """The table at `keys`, empty where there is none. Raises ConfigError for anything else."""
        found: object = self.document
        for key in keys:
            found = found.get(key, {}) if isinstance(found, dict) else found
        if not isinstance(found, dict):
            raise self.error(keys, f"must be a section, [{dotted(*keys)}], not {toml_type_name(found)}")
        return found


def dotted(*keys: str) -> str:
    """A key as TOML writes it: `tenants."team.a".uids`."""
    return ".".join(key if _BARE_KEY.fullmatch(key) else json.dumps(key) for key in keys)


def toml_type_name(value: object) -> str:
    """What TOML calls the type of a parsed value, with its article."""
    return _TOML_TYPES.get(type(value), "a date or time")


def key_lines(source: str) -> dict[tuple[str, ...], int]:
    """The line, from 1, on which each section and key of a TOML text first stands; tomllib does not say.

    `source` has passed tomllib, so this only finds its way and checks nothing. Where it gets lost all the
    same (a newer TOML than it knows), it answers what it found so far: a line number is no reason to fail.
    """
    scan = _KeyScan(source)
    with contextlib.suppress(_LostError, RecursionError):
        scan.document()
    return scan.lines


class _LostError(Exception):
    """The scan met what it does not know."""


class _KeyScan:
    """Walks a TOML text once. Each method begins at `at` and leaves it behind what it read."""

    BLANK: Final = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
    KEY_PART: Final = re.compile(r"""[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'""")
    # Up to two quotes may stand right before the three that close a multi-line string.
    STRING: Final = re.compile(
        r"""\"{3}(?:[^\\]|\\.)*?\"{3,5}|'{3}.*?'{3,5}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'""", re.DOTALL
    )
    BARE: Final = re.compile(r"[^,\]}#\r\n]+")

    def __init__(self, source: str) -> None:
        self.source = source
        self.at = 0
        self.line = 1
        self.line_at = 0  # `line` is the line of this position
        self.lines: dict[tuple[str, ...], int] = {}

    def document(self) -> None:
        """Headers and pairs to the end of the text."""
        table: tuple[str, ...] = ()
        while not self.take_end():
            if self.take("["):
                several = self.take("[")
                table = self.key(())
                self.need("]]" if several else "]")
            else:
                self.pair(table)

    def pair(self, table: tuple[str, ...]) -> None:
        """`key = value` inside `table`."""
        path = self.key(table)
        self.need("=")
        self.value(path)

    def value(self, path: tuple[str, ...]) -> None:
        """Any value; the keys of inline tables are found under `path`."""
        if self.take("["):
            while not self.take("]"):
                if not self.take(","):
                    self.value(path)
        elif self.take("{"):
            while not self.take("}"):
                if not self.take(","):
                    self.pair(path)
        else:
            self.match(self.STRING if self.source.startswith(('"', "'"), self.at) else self.BARE)

    def key(self, table: tuple[str, ...]) -> tuple[str, ...]:
        """A dotted key; notes the line of each of its parts."""
        path = table
        while path == table or self.take("."):
            self.take_blank()
            self.line += self.source.count("\n", self.line_at, self.at)
            self.line_at = self.at
            part = self.match(self.KEY_PART)
            path = (*path, str(tomllib.loads(f"key = {part}")["key"]) if part[0] in "\"'" else part)
            self.lines.setdefault(path, self.line)
        return path

    def take(self, mark: str) -> bool:
        """Step over `mark`, and blanks before it, if it comes next."""
        self.take_blank()
        if not self.source.startswith(mark, self.at):
            return False
        self.at += len(mark)
        return True

    def take_blank(self) -> None:
        """Step over spaces, line ends and comments."""
        self.match(self.BLANK)

    def take_end(self) -> bool:
        """Whether nothing but blanks is left."""
        self.take_blank()
        return self.at == len(self.source)

    def need(self, mark: str) -> None:
        """Step over `mark`, which must come next."""
        if not self.take(mark):
            raise _LostError

    def match(self, pattern: re.Pattern[str]) -> str:
        """Step over what `pattern` matches here and return it."""
        found = pattern.match(self.source, self.at)
        if found is None:
            raise _LostError
        self.at = found.end()
        return found[0]
