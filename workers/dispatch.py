"""The doorbell: tells idle workers of a queue that there may be work. Losing a ring loses nothing."""

import logging

from kombu.exceptions import OperationalError

from workers.app import RING_TASK, app

logger = logging.getLogger(__name__)
_RING_EXPIRES_S = 30.0


def ring(queue: str) -> None:
    """Wake a worker of `queue`. A broker that is away is only logged: the beat rings again."""
    try:
        app.send_task(RING_TASK, args=(queue,), queue=queue, expires=_RING_EXPIRES_S, retry=False)
    except OperationalError as error:
        logger.warning("the broker cannot be reached, so the beat will ring %s: %s", queue, error)
