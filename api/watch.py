"""Wakes whoever waits for news of a job or a preview: one look at the database a tick, however many wait."""

import asyncio
import logging
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Annotated

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.exc import SQLAlchemyError

from db import events, previews
from db.session import Database

logger = logging.getLogger(__name__)
_TICK_S = 0.5


@dataclass(frozen=True, eq=False)
class _Waiter:
    subject_id: str
    after_seq: int
    news: asyncio.Future[bool]


class Watch:
    """Who waits for which job or preview. Every change of a job leaves an event, so a newer one means news.

    A preview has one piece of news, its answer, which is number 1.

    Belongs to one event loop; only `stop` may be called from signal handlers, through the loop.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiters: set[_Waiter] = set()
        self._somebody = asyncio.Event()
        self.closed = False
        self._stopped_at: float | None = None

    @property
    def stopped_for_s(self) -> float:
        """How long ago the server was told to stop; 0 before."""
        return 0.0 if self._stopped_at is None else time.monotonic() - self._stopped_at

    @property
    def waiting(self) -> int:
        """How many wait at this moment."""
        return len(self._waiters)

    async def news(self, subject_id: str, *, after_seq: int, timeout_s: float) -> bool:
        """True as soon as there is news beyond `after_seq`; False after `timeout_s`, or once closed.

        The caller says what it has read, so that nothing is lost between its reading and its waiting.
        """
        if self.closed:
            return False
        waiter = _Waiter(subject_id, after_seq, asyncio.get_running_loop().create_future())
        self._waiters.add(waiter)
        self._somebody.set()
        try:
            async with asyncio.timeout(timeout_s):
                return await waiter.news
        except TimeoutError:
            return False
        finally:
            self._waiters.discard(waiter)

    def close(self) -> None:
        """Send everybody home, now and from now on."""
        self.closed = True
        self._wake(list(self._waiters), news=False)

    def stop(self) -> None:
        """The server was told to stop: send everybody home."""
        self._stopped_at = self._stopped_at or time.monotonic()
        self.close()

    async def poll(self) -> None:
        """Look for news while somebody waits for some; runs until it is cancelled."""
        try:
            while True:
                await self._somebody.wait()
                await asyncio.sleep(_TICK_S)
                await self._look()
        finally:
            self.close()  # whatever ended the looking, nobody may wait for it

    async def _look(self) -> None:
        watched = {waiter.subject_id for waiter in self._waiters}
        if not watched:
            self._somebody.clear()
            return
        try:
            latest = await run_in_threadpool(self._read_latest, watched)
        except SQLAlchemyError as error:
            logger.warning("cannot look for news: %s", error)
            return
        self._wake(
            [waiter for waiter in self._waiters if latest.get(waiter.subject_id, 0) > waiter.after_seq],
            news=True,
        )

    def _read_latest(self, subject_ids: set[str]) -> dict[str, int]:
        asked = {subject_id for subject_id in subject_ids if subject_id.startswith(previews.ID_PREFIX)}
        job_ids = subject_ids - asked
        with self._database.read() as session:
            latest = events.latest(session, job_ids) if job_ids else {}
            return latest | dict.fromkeys(previews.answered(session, asked) if asked else (), 1)

    def _wake(self, waiters: list[_Waiter], *, news: bool) -> None:
        for waiter in waiters:
            if not waiter.news.done():
                waiter.news.set_result(news)


@asynccontextmanager
async def watching(database: Database) -> AsyncIterator[Watch]:
    """A watch with its poller, for the life of the app."""
    watch = Watch(database)
    poller = asyncio.create_task(watch.poll())
    try:
        with _closed_by_signals(watch):
            yield watch
    finally:
        poller.cancel()
        await asyncio.wait([poller])


@contextmanager
def _closed_by_signals(watch: Watch) -> Iterator[None]:
    """Close the watch when the server is told to stop.

    The server lets the app know of the end only after all answers, and a stream has no end of its own.
    """
    loop = asyncio.get_running_loop()
    handlers = {}
    if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler):  # what is left to the system ends the process anyway
                handlers[number] = handler

    def close_and_pass_on(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(watch.stop)
        handlers[signal.Signals(number)](number, frame)

    for number in handlers:
        signal.signal(number, close_and_pass_on)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def get_watch(request: Request) -> Watch:
    """The watch of the app."""
    return request.app.state.watch


WatchDep = Annotated[Watch, Depends(get_watch)]
