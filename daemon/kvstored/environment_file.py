"""The variables of a unit's `EnvironmentFile=`, read as systemd reads them (systemd.exec(5), parse_env_file).

    # a comment, and ; another
    NAME=a value \\
        that goes on
    NAME="in quotes, where \\" stands for one" 'and more of it'
"""

import re
from pathlib import Path
from typing import Final

from kvstored.units import FILE_BYTES, ConfigError

_BLANK: Final = re.compile(r"(?:\s+|[#;][^\r\n]*)*")
_NAME: Final = re.compile(r"([^=\r\n]*)(=?)")  # without a sign the line says nothing
_QUOTED: Final = re.compile(r"""[ \t]*(?:'(?P<single>[^']*)'|"(?P<double>(?:[^"\\]|\\.)*)")""", re.DOTALL)
_BARE: Final = re.compile(r"[ \t]*((?:[^\\\r\n]|\\.|\\$)*)", re.DOTALL)
_TAIL: Final = re.compile(r"(?<!\\)[ \t]+$")


def read_environment(path: Path) -> dict[str, str]:
    """Names and values, the last of a name. Raises ConfigError."""
    try:
        with path.open("rb") as stream:
            text = stream.read(FILE_BYTES + 1).decode()
    except OSError as error:
        raise ConfigError(f"{path}:1: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}:1: is not UTF-8") from error
    if len(text) > FILE_BYTES:
        raise ConfigError(f"{path}:1: is larger than {FILE_BYTES} bytes")
    found, at = {}, _end(_BLANK, text, 0)
    while at < len(text):
        name = _NAME.match(text, at)
        assert name is not None, "it may be empty"
        at = name.end()
        if name[2]:
            found[name[1].rstrip()], at = _value(path, text, at)
        at = _end(_BLANK, text, at)
    return found


def _value(path: Path, text: str, at: int) -> tuple[str, int]:
    """What is quoted, pieces joined, and what follows up to the end of the line; and where that is."""
    value = ""
    while match := _QUOTED.match(text, at):
        value += match["single"] if match["double"] is None else re.sub(r'\\(?:([\\"`$])|\n)', r"\1", match["double"])
        at = match.end()
    bare = _BARE.match(text, at)
    assert bare is not None, "it may be empty"
    if bare[1].startswith(("'", '"')):
        raise ConfigError(f"{path}:{text.count(chr(10), 0, bare.start(1)) + 1}: a quote is not closed")
    return value + re.sub(r"\\(?:\n|(.?))", r"\1", _TAIL.sub("", bare[1])), bare.end()


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return at if match is None else match.end()
