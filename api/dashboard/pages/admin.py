"""Admin: who may speak for the organisation, the machines, and what takes up the disk."""

from typing import Any

from api.dashboard.admin_keys import Keys
from api.dashboard.admin_nodes import Nodes
from api.dashboard.admin_storage import Storage
from api.dashboard.client import Api, Refused
from api.dashboard.elements import empty, panel
from api.dashboard.frame import head, page
from api.dashboard.live import live

_KEYS_EVERY_S = 10.0
_NODES_EVERY_S = 4.0
_STORAGE_EVERY_S = 15.0


@page("/admin", title="Admin")
async def admin(api: Api) -> None:
    """Keys, machines and storage, for those whose key may see them."""
    with head("Admin"):
        pass
    keys = await _allowed(api, "/v1/keys", limit=1)
    if keys is None:
        with panel():
            empty(
                "This page is for admins",
                "The key you are logged in with is a user's: it trains and chats, and steers nothing else. "
                "Log out and come back with an admin key, or ask an admin for one.",
                links={"Overview": "/"},
            )
        return
    with panel("Keys", flush=True) as block:
        of_keys = Keys(api, block)
    of_keys.live = await live(of_keys.fetch, of_keys.show, every_s=_KEYS_EVERY_S)
    if await _allowed(api, "/v1/nodes") is None:
        with panel("Machines and storage"):
            empty(
                "Shown to admins of the host",
                "Machines and disk are shared by all organisations; your key is an admin's of one of them.",
            )
        return
    of_nodes = Nodes(api)
    of_nodes.live = await live(of_nodes.fetch, of_nodes.show, every_s=_NODES_EVERY_S)
    with panel("Storage"):
        storage = Storage(api)
    await live(storage.fetch, storage.show, every_s=_STORAGE_EVERY_S)


async def _allowed(api: Api, path: str, **params: Any) -> dict[str, Any] | None:
    """What is there; None if the key may not see it."""
    try:
        return await api.get(path, **params)
    except Refused as refused:
        if refused.status == 403:
            return None
        raise
