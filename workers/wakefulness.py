"""Whether the machine has slept: at wake-up every lease looks expired, though its owner goes on as well."""

import multiprocessing
import time
from collections.abc import Callable
from math import inf


class Wakefulness:
    """Compares the wall clock, which goes on in a sleep, with a clock that stands still meanwhile.

    A wall clock that was set forward looks the same, and has the same effect on leases. What was seen is
    shared with the processes that are forked: each of a worker's may answer but once.
    """

    def __init__(
        self, *, wall: Callable[[], float] = time.time, awake: Callable[[], float] = time.monotonic
    ) -> None:
        """Both clocks in seconds."""
        self._wall, self._awake = wall, awake
        # Without a lock: a process that is killed would keep it.
        self._looked_at = multiprocessing.RawArray("d", [wall(), awake()])
        self._woke_at = multiprocessing.RawValue("d", -inf)

    def has_lasted(self, ttl_s: float) -> bool:
        """Whether, as far as this process saw, owners had `ttl_s` since the last sleep to renew their leases.

        A lease that was renewed a moment before has most of its time left, one that is due for it less: what
        counts as a sleep is half of `ttl_s`.
        """
        wall, awake = self._wall(), self._awake()
        slept_s = (wall - self._looked_at[0]) - (awake - self._looked_at[1])
        if slept_s > ttl_s / 2:
            self._woke_at.value = awake  # before the look that others compare with
        self._looked_at[:] = [wall, awake]
        return awake - self._woke_at.value >= ttl_s
