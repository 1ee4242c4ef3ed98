"""The Celery application. Its messages name no work, they only ring; the database owns the work."""

from celery import Celery
from celery.signals import setup_logging, worker_process_init

from db import logs
from db.session import Database
from db.settings import DatabaseSettings
from workers.settings import WorkerSettings

QUEUES = ("train", "cpu")
RING_TASK = "workers.ring"
UPKEEP_TASK = "workers.upkeep"
_UPKEEP_EVERY_S = 60.0
_CHILD_KIB = 500_000  # a child that has grown to this is replaced; they start at a fifth of it

settings = WorkerSettings()
app = Celery("residency", broker=settings.redis_url, include=["workers.ring", "workers.upkeep"])
app.conf.update(
    # A late ack makes Redis deliver the message again when its visibility timeout ends: a second run of an
    # hours-long task beside the first. The lease in the database is the only redelivery there is.
    task_acks_late=False,
    # A message prefetched behind a busy slot is redelivered elsewhere and then runs here too.
    worker_disable_prefetch=True,
    worker_prefetch_multiplier=1,
    # Work runs in processes of its own; what answers the rings may stay. A fresh child for every ring costs
    # a tenth of a second of CPU, and now and then its pool takes seconds to notice that the old one is gone.
    worker_max_memory_per_child=_CHILD_KIB,
    # Threads would break the parent-death signal, which follows the thread that forked.
    worker_pool="prefork",
    # Outcomes live in the database; a result backend would be a second, weaker copy.
    task_ignore_result=True,
    result_backend=None,
    # No pickle: a message must not be able to run code.
    accept_content=["json"],
    task_serializer="json",
    # The default gives up after 100 tries and leaves a deaf worker behind.
    broker_connection_max_retries=None,
    broker_connection_retry_on_startup=True,
    # Losing the broker must not touch work that runs: it needs only the database.
    worker_cancel_long_running_tasks_on_connection_loss=False,
    # A caller that rings while Redis is away must get on at once; workers look around by themselves. Without
    # `max_retries` one ring holds its thread for 6 s. Workers reconnect by the settings above, not by this.
    broker_transport_options={"socket_connect_timeout": 2.0, "socket_timeout": 5.0, "max_retries": 0},
    task_default_queue="cpu",
    worker_direct=True,  # each has a queue of its own too: see workers/tick.py
    task_create_missing_queues=True,
    worker_hijack_root_logger=False,
    worker_send_task_events=False,
    event_queue_expires=60,
    timezone="UTC",
    beat_schedule={
        "upkeep": {
            "task": UPKEEP_TASK,
            "schedule": _UPKEEP_EVERY_S,
            "options": {"queue": "cpu", "expires": _UPKEEP_EVERY_S},
        }
    },
)

_databases: list[Database] = []


@setup_logging.connect
def _log_as_all_do(*, loglevel: int, **_: object) -> None:
    logs.configure(loglevel)


def database() -> Database:
    """This process' database."""
    if not _databases:
        _databases.append(Database(DatabaseSettings().url))
    return _databases[0]


@worker_process_init.connect
def _after_fork(**_: object) -> None:
    # Connections made before the fork belong to the parent; sharing a socket corrupts both streams.
    for inherited in _databases:
        inherited.dispose(close=False)
    _databases.clear()
