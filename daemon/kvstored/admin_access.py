"""Who may do what on the control socket.

    root, the daemon's own user, members of control.admin_group     see everything, and act
    everybody else                                                  sees what its tenants have (control.tenants)

Who somebody is, the kernel says when they connect to `token.sock` (`admin_tokens.py`); from then on a token stands for
them, for a minute. Any thread.
"""

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from kvproto.control_token import TOKEN_TTL_S

TOKENS: Final = 4096  # at a time: 64 uids of 64 each
TOKENS_PER_UID: Final = 64  # the oldest gives way; 64 commands started within a minute, one after the other
_TOKEN_BYTES: Final = 32


class TooManyTokensError(Exception):
    """Others have all the tokens there are; some lapse every second."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody with a token: as the kernel knew them when they asked for it."""

    uid: int
    pid: int
    acts: bool
    tenants: tuple[str, ...]  # that their uid may be; `acts` sees all others' too
    who: str = ""  # the name in a certificate, instead of uid (-1) and pid

    def sees(self, tenant: str) -> bool:
        """May they know of this tenant?"""
        return self.acts or tenant in self.tenants


@dataclass(frozen=True, slots=True)
class _Issued:
    caller: Caller
    expires_s: float  # of the clock


class Access:
    """Tokens that were given out, and the rule."""

    def __init__(
        self, own_uid: int, admin_gid: int | None, tenants_of: Callable[[int], tuple[str, ...]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """`tenants_of(uid)`: names that a process of this user may take; `admin_gid`: whose members act."""
        self._own_uid = own_uid
        self._admin_gid = admin_gid
        self._tenants_of = tenants_of
        self._clock = clock
        self._lock = threading.Lock()
        self._issued: dict[str, _Issued] = {}  # in the order of their end

    def issue(self, uid: int, pid: int, groups: frozenset[int]) -> tuple[str, Caller]:
        """A token for a process of this user and these groups. Raises TooManyTokensError."""
        caller = Caller(uid, pid, self.may_act(uid, groups), self._tenants_of(uid))
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        with self._lock:
            self._forget_lapsed()
            mine = [name for name, one in self._issued.items() if one.caller.uid == uid]
            if len(mine) >= TOKENS_PER_UID:
                del self._issued[mine[0]]
            elif len(self._issued) >= TOKENS:
                self._make_way(caller)
            self._issued[token] = _Issued(caller, self._clock() + TOKEN_TTL_S)
        return token, caller

    def caller(self, token: str) -> Caller | None:
        """Whose token this is; None if it is nobody's, or not any more."""
        with self._lock:
            issued = self._issued.get(token)
        return issued.caller if issued is not None and self._clock() < issued.expires_s else None

    def may_act(self, uid: int, groups: frozenset[int]) -> bool:
        """The rule."""
        return uid in {0, self._own_uid} or (self._admin_gid is not None and self._admin_gid in groups)

    def _forget_lapsed(self) -> None:
        now_s = self._clock()
        for token, issued in list(self._issued.items()):
            if now_s < issued.expires_s:
                return
            del self._issued[token]

    def _make_way(self, caller: Caller) -> None:
        """Many users can never keep out who has to act. Raises TooManyTokensError."""
        others = next((name for name, one in self._issued.items() if not one.caller.acts), None)
        if others is None or not caller.acts:
            raise TooManyTokensError(f"{TOKENS} tokens are out already; try again in a minute")
        del self._issued[others]
