"""/v1/nodes: the machines that workers run on, and whether they take work."""

from typing import Annotated

from fastapi import APIRouter, Depends

from api.auth import AdminDep
from api.deps import DatabaseDep
from api.errors import ApiError
from api.node_schemas import DeviceObject, NodeList, NodeObject
from db import keys, nodes
from db.keys import Caller
from db.models import Node

router = APIRouter(prefix="/nodes", tags=["Nodes"])
Holders = dict[tuple[str, str], str]


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
        held = nodes.holders(session)
        return NodeList(data=[_node_object(node, held) for node in nodes.list_all(session)])


@router.post("/{name}/drain", summary="Drain node")
def drain_node(name: str, _caller: HostAdminDep, database: DatabaseDep) -> NodeObject:
    """Let a node take no more work. What runs there saves a checkpoint and waits for another node."""
    return _set_state(database, name, "draining")


@router.post("/{name}/undrain", summary="Undrain node")
def undrain_node(name: str, _caller: HostAdminDep, database: DatabaseDep) -> NodeObject:
    """Let a node take work again."""
    return _set_state(database, name, "active")


def _set_state(database: DatabaseDep, name: str, state: str) -> NodeObject:
    with database.write() as session:
        return _node_object(nodes.set_state(session, name, state), nodes.holders(session))


def _node_object(node: Node, held: Holders) -> NodeObject:
    return NodeObject.model_validate(
        {
            "name": node.name,
            "state": node.state,
            "address": node.address,
            "slots": node.slots,
            "free_bytes": node.free_bytes,
            "last_seen_at": int(node.last_seen_at),
            "devices": [_device_object(node.name, device, held) for device in node.devices],
        }
    )


def _device_object(node: str, device: dict[str, object], held: Holders) -> DeviceObject:
    holder = held.get((node, str(device["id"])))
    state = "leased" if holder else "free"
    return DeviceObject.model_validate(device | {"state": state, "held_by": holder})
