"""What never goes into a support bundle, whatever part it was found in.

Blocks, tokens of the control socket, salts, keys and what clients call themselves do not help anybody who reads a
bundle. Fields that hold them are left out where they are known (`bundle.py`); here goes what they look like in text.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Final

from kvctl.render import Json

LEFT_OUT: Final = "<left out>"
SHOWN_DIGITS: Final = 12  # of a digest, enough to tell two apart; of a key it says nothing

_HEX: Final = re.compile(r"(?<![0-9A-Za-z])([0-9a-fA-F]{24,})(?![0-9A-Za-z])")
# Forty letters without a break, great and small and digits among them: base64 of something that is nobody's business.
_BASE64: Final = re.compile(
    r"(?<![A-Za-z0-9_+=-])(?=[A-Za-z_+=-]*[0-9])(?=[a-z0-9_+=-]*[A-Z])(?=[A-Z0-9_+=-]*[a-z])[A-Za-z0-9_+=-]{32,}"
)
_NAMED: Final = re.compile(r"""\b(name|program|run|workflow|tool)=('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\S+)""")
_ASSIGNED: Final = re.compile(r"(?i)\b([a-z_.-]*(?:token|secret|password|passphrase|salt|api_?key))\b(\s*[=:]\s*)(\S+)")
_IDS: Final = re.compile(r"[\[(] *[0-9]+(?: *, *[0-9]+){3,} *[\])]")  # on one line: token ids, as a prompt is logged
_SECRET_SETTING: Final = re.compile(r"(?i)(?:^|[._])(?:token|secret|password|passphrase|salt|key)$")


def scrubbed(text: str) -> str:
    """Text from a log or an answer, without what looks like a secret, a key or a client's own words."""
    text = _HEX.sub(lambda found: f"{found[1][:SHOWN_DIGITS]}...", text)
    text = _BASE64.sub(LEFT_OUT, text)
    text = _IDS.sub(LEFT_OUT, text)
    text = _NAMED.sub(lambda found: f"{found[1]}={LEFT_OUT}", text)
    return _ASSIGNED.sub(lambda found: f"{found[1]}{found[2]}{LEFT_OUT}", text)


def without(body: Json, fields: frozenset[str]) -> Json:
    """A JSON value whose objects lack these fields, at any depth."""
    if isinstance(body, str):
        return body
    if isinstance(body, Mapping):
        return {name: LEFT_OUT if name in fields else without(value, fields) for name, value in body.items()}
    if isinstance(body, Sequence):
        return [without(one, fields) for one in body]
    return body


def setting_value(name: str, value: str) -> str:
    """A setting's value as a bundle has it. Paths are told: where a secret lies is none."""
    return LEFT_OUT if _SECRET_SETTING.search(name) and not value.startswith("/") else value
