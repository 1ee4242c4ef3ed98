"""Why no machine that is there can take a task, however long it waits; nothing here changes one."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from db import disk, nodes, quarantine
from db.session import clock
from db.work_models import Node, Task

_GONE_AFTER_S = 300.0  # whoever is silent for longer is not counted on


@dataclass(frozen=True)
class _Able:
    """A node that trains: how many of a task's devices it has, and how many of them may be used."""

    node: Node
    n_devices: int
    n_usable: int
    needed: int


def find_obstacle(session: Session, task: Task) -> dict[str, Any] | None:
    """The one reason, with its figures, that keeps all nodes that live from `task`; None if some can take it.

    Whether their devices are held at this moment is not looked at. None too where no node lives.
    """
    able = _list_nodes(session, task)
    if not able:
        return None
    enough = [one for one in able if one.n_devices >= one.needed]
    if not enough:
        most = max(one.n_devices for one in able)
        return {"reason": "too_few_devices", "needed": task.devices_needed, "most": most}
    if len(enough) < task.nodes_needed:
        return {"reason": "too_few_nodes", "needed": task.nodes_needed, "there": len(enough)}
    working = [one for one in enough if one.node.state != "draining"]
    if len(working) < task.nodes_needed:
        drained = [one.node.name for one in enough if one.node.state == "draining"]
        return {"reason": "draining", "nodes": drained}
    usable = [one for one in working if one.n_usable >= one.needed]
    if len(usable) < task.nodes_needed:
        return {"reason": "quarantined", "devices": sum(one.n_devices - one.n_usable for one in working)}
    # A new checkpoint is whole before an old one goes.
    room = 2 * disk.estimate_checkpoints_bytes(session, [task.subject_id]).get(task.subject_id, 0)
    if sum(room <= one.node.free_bytes for one in usable) < task.nodes_needed:
        most = max(one.node.free_bytes for one in usable)
        return {"reason": "disk", "needed_bytes": room, "free_bytes": most}
    return None


def _list_nodes(session: Session, task: Task) -> list[_Able]:
    kept: dict[str, int] = {}
    for node, _ in quarantine.reasons(session):
        kept[node] = kept.get(node, 0) + 1
    since = clock(session) - _GONE_AFTER_S
    found = []
    for node in nodes.list_all(session):
        if node.trains_at is None or node.last_seen_at < since:
            continue
        count = len(node.devices) or node.slots
        needed = task.devices_needed if node.devices else min(task.devices_needed, 1)  # of slots always one
        found.append(_Able(node, count, count - kept.get(node.name, 0), needed))
    return found
