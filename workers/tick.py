"""Every worker rings itself again and again, whoever else is rung.

Redis hands a ring to the worker that has listened longest. All listen in turns of a second, so that of
rings at a steady pace one worker may hear each and the others none: a node that is never asked takes no
work, and counts as gone. With a queue of its own each worker hears every tick.
"""

from typing import Any

from celery import bootsteps
from celery.utils.nodenames import worker_direct
from celery.worker import state
from celery.worker.components import Pool, Timer

from workers import dispatch
from workers.app import QUEUES, settings


class Ticks(bootsteps.StartStopStep):
    """Ring when the worker starts and then once a tick, while one of its slots is free."""

    requires = (Timer, Pool)

    def start(self, parent: Any) -> None:
        """The timers of a worker wait until it hears."""
        self._first = parent.timer.call_after(0, self._ring, (parent,))
        self._again = parent.timer.call_repeatedly(settings.tick_s, self._ring, (parent,))

    def stop(self, parent: Any) -> None:  # noqa: ARG002 - the step's signature
        """Ring no more."""
        self._first.cancel()
        self._again.cancel()

    def _ring(self, worker: Any) -> None:
        if len(state.reserved_requests) >= worker.pool.num_processes:
            return  # it could not hear, and after its work it rings anyway
        for queue in worker.app.amqp.queues.consume_from.keys() & set(QUEUES):
            dispatch.ring(queue, to=worker_direct(worker.hostname), expires_s=settings.tick_s)
