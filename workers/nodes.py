"""What this machine reports of itself."""

import logging
import shutil

from db import nodes, quarantine
from db.nodes import Device, Facts
from db.session import Database
from db.settings import DatabaseSettings
from workers import gpus, processes
from workers.addresses import address_of
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)


def report(database: Database, settings: WorkerSettings, *, trains: bool) -> Facts:
    """Enter this node, or refresh what is known of it; a worker that trains says so."""
    facts = describe(settings)
    with database.write() as session:
        nodes.report(session, facts, every_s=settings.heartbeat_s, trains=trains)
    return facts


def describe(settings: WorkerSettings) -> Facts:
    """The machine as it is now."""
    names, _ = settings.devices()
    home = DatabaseSettings().home_dir
    home.mkdir(parents=True, exist_ok=True)
    return Facts(
        name=settings.node,
        address=address_of(settings),
        devices=tuple(_describe_device(name) for name in names),
        slots=len(names),
        free_bytes=shutil.disk_usage(home).free,
        uses=gpus.read_uses(),
    )


def keep_from_strangers(database: Database, node: str, devices: list[str]) -> None:
    """Quarantine the GPUs that processes of somebody else use, and lift it once they are gone."""
    if not gpus.list_gpus():
        return
    strangers = gpus.find_strangers(processes.is_ours(database.url))
    with database.write() as session:
        for device in quarantine.busy_by_others(session, node) - strangers.keys():
            quarantine.lift(session, node, device=device)
        for device in strangers.keys() & set(devices):
            if quarantine.put(session, node, device, reason=strangers[device]):
                logger.error("%s is quarantined: %s", device, strangers[device])


def _describe_device(name: str) -> Device:
    for gpu in gpus.list_gpus():
        if gpu.id == name:
            return Device(name, kind=gpu.kind, memory_bytes=gpu.memory_bytes, driver=gpu.driver)
    return Device(name, kind="cpu" if name.startswith("slot:") else "gpu")
