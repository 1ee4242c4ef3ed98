"""The doorbell: tells an idle worker of a queue that there may be work. Losing a ring loses nothing."""

import logging

from kombu.entity import Queue
from kombu.exceptions import OperationalError

from workers.app import RING_TASK, app

logger = logging.getLogger(__name__)
_RING_EXPIRES_S = 30.0


def ring(queue: str, *, to: Queue | None = None, expires_s: float = _RING_EXPIRES_S) -> None:
    """Wake a worker of `queue`, or the one that listens to `to`. A broker that is away is only logged."""
    try:
        app.send_task(RING_TASK, args=(queue,), queue=to or queue, expires=expires_s, retry=False)
    except OperationalError as error:
        logger.warning("the broker cannot be reached; workers of %s will look around later: %s", queue, error)
