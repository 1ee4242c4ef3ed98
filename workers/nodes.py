"""What this machine reports of itself."""

import shutil
import socket

from db import nodes
from db.nodes import Device, Facts
from db.session import Database
from db.settings import DatabaseSettings
from workers import gpus
from workers.settings import WorkerSettings


def report(database: Database, settings: WorkerSettings) -> Facts:
    """Enter this node, or refresh what is known of it."""
    facts = describe(settings)
    with database.write() as session:
        nodes.report(session, facts, every_s=settings.heartbeat_s)
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
    )


def _describe_device(name: str) -> Device:
    for gpu in gpus.list_gpus():
        if gpu.id == name:
            return Device(name, kind=gpu.kind, memory_bytes=gpu.memory_bytes, driver=gpu.driver)
    return Device(name, kind="cpu" if name.startswith("slot:") else "gpu")


def address_of(settings: WorkerSettings) -> str:
    """Where other nodes reach this one."""
    if settings.node_address:
        return settings.node_address
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:  # a host without a name that anybody knows
        return "127.0.0.1"
