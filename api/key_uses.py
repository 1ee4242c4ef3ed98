"""When keys were last used: noted behind the requests, so that none waits for the write."""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor

from sqlalchemy.exc import OperationalError

from db import keys
from db.session import Database

logger = logging.getLogger(__name__)
NOTED_EVERY_S = 60.0


class KeyUses:
    """Notes uses of keys in a thread of its own, each key at most once a minute."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._tried_at: dict[str, float] = {}  # by a clock of this process; only of keys that are valid
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="key-uses")

    def note(self, key_id: str) -> None:
        """A valid key was shown. What goes wrong with the note is logged, and tried again in a minute."""
        now = time.monotonic()
        if now - self._tried_at.get(key_id, -NOTED_EVERY_S) < NOTED_EVERY_S:
            return
        self._tried_at[key_id] = now
        self._thread.submit(self._write, key_id).add_done_callback(_report)

    def close(self) -> None:
        """Write what is being written, and nothing more."""
        self._thread.shutdown(cancel_futures=True)

    def _write(self, key_id: str) -> None:
        with self._database.write() as session:
            keys.note_use(session, key_id, every_s=NOTED_EVERY_S)


def _report(done: Future[None]) -> None:
    error = None if done.cancelled() else done.exception()
    if isinstance(error, OperationalError):  # the database is busy or away
        logger.info("the use of a key was not noted: %s", error.orig)
    elif error is not None:
        logger.error("the use of a key could not be noted", exc_info=error)
