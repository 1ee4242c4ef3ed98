"""Whether the machine has slept: at wake-up every lease looks expired, though its owner goes on as well."""

import time
from collections.abc import Callable


class Wakefulness:
    """Compares the wall clock, which goes on in a sleep, with a clock that stands still meanwhile.

    A wall clock that was set forward looks the same, and has the same effect on leases.
    """

    def __init__(
        self, *, wall: Callable[[], float] = time.time, awake: Callable[[], float] = time.monotonic
    ) -> None:
        """Both clocks in seconds."""
        self._wall, self._awake = wall, awake
        self._looked_at = wall(), awake()
        self._woke_at: float | None = None

    def has_lasted(self, ttl_s: float) -> bool:
        """Whether, as far as this process saw, owners had `ttl_s` since the last sleep to renew their leases.

        A lease that was renewed a moment before has most of its time left, one that is due for it less: what
        counts as a sleep is half of `ttl_s`.
        """
        (wall, awake), before = (self._wall(), self._awake()), self._looked_at
        self._looked_at = wall, awake
        slept_s = (wall - before[0]) - (awake - before[1])
        if slept_s > ttl_s / 2:
            self._woke_at = awake
        return self._woke_at is None or awake - self._woke_at >= ttl_s
