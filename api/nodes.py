"""/v1/nodes: the machines that workers run on, and whether they take work."""

from typing import Annotated

from fastapi import APIRouter, Depends
from sqlalchemy.orm import Session

from api.auth import AdminDep
from api.deps import DatabaseDep
from api.errors import ApiError
from api.schemas.nodes import DeviceObject, NodeList, NodeObject
from db import keys, nodes, quarantine
from db.keys import Caller
from db.work_models import Node

router = APIRouter(prefix="/nodes", tags=["Nodes"])
Devices = dict[tuple[str, str], str]


def require_host_admin(caller: AdminDep) -> Caller:
    """An admin of the host, not of a tenant. Raises ApiError (403)."""
    if caller.org_id != keys.DEFAULT_ORG_ID:
        message = "Nodes are of all organisations together."
        raise ApiError(403, "insufficient_permissions", message)
    return caller


HostAdminDep = Annotated[Caller, Depends(require_host_admin)]


@router.get("", summary="List nodes")
def list_nodes(_caller: HostAdminDep, database: DatabaseDep) -> NodeList:
    """Every machine that workers reported, with its devices and who holds them (admins of the host)."""
    with database.read() as session:
        return NodeList(data=_node_objects(session, nodes.list_all(session)))


@router.post("/{name}/drain", summary="Drain node")
def drain_node(name: str, _caller: HostAdminDep, database: DatabaseDep) -> NodeObject:
    """Let a node take no more work. What runs there saves a checkpoint and waits for another node."""
    return _set_state(database, name, "draining")


@router.post("/{name}/undrain", summary="Undrain node")
def undrain_node(name: str, _caller: HostAdminDep, database: DatabaseDep) -> NodeObject:
    """Let a node take work again."""
    return _set_state(database, name, "active")


@router.post("/{name}/devices/{device}/release", summary="Release device")
def release_device(name: str, device: str, _caller: HostAdminDep, database: DatabaseDep) -> NodeObject:
    """Vouch for a quarantined device: jobs may use it again."""
    with database.write() as session:
        quarantine.release(session, name, device)
        return _node_objects(session, [session.get_one(Node, name)])[0]


def _set_state(database: DatabaseDep, name: str, state: str) -> NodeObject:
    with database.write() as session:
        return _node_objects(session, [nodes.set_state(session, name, state)])[0]


def _node_objects(session: Session, rows: list[Node]) -> list[NodeObject]:
    held, kept = nodes.holders(session), quarantine.reasons(session)
    return [_node_object(node, held, kept) for node in rows]


def _node_object(node: Node, held: Devices, kept: Devices) -> NodeObject:
    return NodeObject.model_validate(
        {
            "name": node.name,
            "state": node.state,
            "address": node.address,
            "slots": node.slots,
            "free_bytes": node.free_bytes,
            "last_seen_at": int(node.last_seen_at),
            "devices": [_device_object(node, device, held, kept) for device in node.devices],
        }
    )


def _device_object(node: Node, device: dict[str, object], held: Devices, kept: Devices) -> DeviceObject:
    place = (node.name, str(device["id"]))
    use = (node.device_use or {}).get(place[1], {"memory_used_bytes": None, "utilization": None})
    state = "quarantined" if place in kept else "leased" if place in held else "free"
    seen = {"state": state, "reason": kept.get(place), "held_by": held.get(place)}
    return DeviceObject.model_validate(device | use | seen)
