"""Data that stays fresh while somebody looks: fetched now, then at an interval, shown in place."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from nicegui import ui

from api.dashboard.client import Refused, Trouble
from api.dashboard.elements import notice
from api.dashboard.sessions import sessions

Found = TypeVar("Found")


class Live:
    """One source of data on one page. Ends with the page; rests while its tab is hidden."""

    def __init__(self, refresh: Callable[[], Awaitable[None]], *, every_s: float) -> None:
        self._refresh = refresh
        self._client = ui.context.client
        self._seen = True
        self._busy = False
        self._timer = ui.timer(every_s, self._tick, immediate=False)
        ui.on("page_seen", self._hear)

    def stop(self) -> None:
        """Fetch no more: what is shown will not change again."""
        self._timer.cancel()

    async def refresh(self) -> None:
        """Fetch now, without waiting for the next turn; after a button was pressed, for example."""
        if self._busy:
            return
        self._busy = True
        try:
            if sessions.key_of(self._client.request) is None:
                _log_in_again()
                return
            await self._refresh()
            _tell(None)
        except Refused as refused:
            if refused.status == 401:
                sessions.close(self._client.request)
                _log_in_again()
            else:
                _tell(str(refused))
        except Trouble as trouble:
            _tell(f"{trouble} This page goes on trying.")
        finally:
            self._busy = False

    async def _tick(self) -> None:
        if self._seen:
            await self.refresh()

    async def _hear(self, event: object) -> None:
        self._seen = bool(getattr(event, "args", True))
        await self._tick()


async def live(
    fetch: Callable[[], Awaitable[Found]], show: Callable[[Found], None], *, every_s: float
) -> Live:
    """Fetch and show now; then every `every_s` seconds while the tab is visible.

    The first fetch may raise `Trouble`, which `page` shows. Later ones tell it once, over the page, until
    one works again.
    """
    slot = ui.context.slot

    async def refresh() -> None:
        found = await fetch()
        with slot:
            show(found)

    await refresh()
    return Live(refresh, every_s=every_s)


async def act(work: Awaitable[Found], *, done: str = "") -> Found | None:
    """Await what a button asked for. Tells `done`, or why it did not work, and then returns None."""
    try:
        found = await work
    except Trouble as trouble:
        ui.notify(str(trouble), type="negative", multi_line=True, close_button="Close", timeout=0)
        return None
    if done:
        ui.notify(done, type="positive")
    return found


def _tell(text: str | None) -> None:
    """Show what is wrong over the page, once however often it is said; None takes it away."""
    client = ui.context.client
    shown = client.storage.get("trouble")
    if shown and shown[0] == text:
        return
    if shown:
        shown[1].delete()
        del client.storage["trouble"]
    if text:
        with client.content:
            client.storage["trouble"] = (text, notice(text, kind="bad").classes("trouble"))


def _log_in_again() -> None:
    # The page that is asked for again knows where to send whoever is not logged in.
    ui.navigate.reload()
