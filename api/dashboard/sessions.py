"""Who is logged in: the key of each session, in the memory of this process and nowhere else.

A browser holds a signed cookie with the name of its session. All logins end with the process, so that no file
of the dashboard is worth stealing.
"""

import secrets
import time
from dataclasses import dataclass, field

from starlette.requests import Request

IDLE_S = 12 * 3600.0
_NAME = "login"
_MOST = 10_000


@dataclass
class _Login:
    key: str
    used_at: float


@dataclass
class Sessions:
    """The keys of those who are logged in."""

    _logins: dict[str, _Login] = field(default_factory=dict)

    def open(self, request: Request, key: str) -> None:
        """Log the browser of this request in, under a name that nobody has seen before."""
        self.close(request)
        self._forget_idle()
        name = secrets.token_urlsafe(32)
        self._logins[name] = _Login(key, time.monotonic())
        request.session[_NAME] = name

    def key_of(self, request: Request) -> str | None:
        """The key that this browser logged in with, if it did and was seen within `IDLE_S`."""
        login = self._logins.get(request.session.get(_NAME, ""))
        now = time.monotonic()
        if login is None or now - login.used_at > IDLE_S:
            return None
        login.used_at = now
        return login.key

    def close(self, request: Request) -> None:
        """Log this browser out."""
        self._logins.pop(request.session.get(_NAME, ""), None)

    def _forget_idle(self) -> None:
        earliest = time.monotonic() - IDLE_S
        self._logins = {name: login for name, login in self._logins.items() if login.used_at > earliest}
        while len(self._logins) >= _MOST:
            del self._logins[min(self._logins, key=lambda name: self._logins[name].used_at)]


sessions = Sessions()
