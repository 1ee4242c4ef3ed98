"""Answers about the machines that workers run on. Times are Unix seconds."""

from typing import Literal

from pydantic import BaseModel, Field


class DeviceObject(BaseModel):
    """What takes one process: a GPU, or a slot of a machine that has none."""

    id: str
    kind: str = Field(description="The model of a GPU; `cpu` for a slot.")
    memory_bytes: int | None
    driver: str | None
    memory_used_bytes: int | None = Field(description="Of a GPU, some seconds ago at most.")
    utilization: float | None = Field(description="The part of the last moments in which it computed.")
    state: Literal["free", "leased", "quarantined"]
    reason: str | None = Field(description="Why it is quarantined.")
    held_by: str | None = Field(description="The job that holds it.")


class NodeObject(BaseModel):
    """A machine that workers reported."""

    object: Literal["node"] = "node"
    name: str
    state: Literal["active", "draining"]
    address: str
    slots: int = Field(description="Processes that may train on it side by side.")
    free_bytes: int = Field(description="Of the disk that holds the home of the service.")
    last_seen_at: int
    devices: list[DeviceObject]


class NodeList(BaseModel):
    """All nodes, by name."""

    object: Literal["list"] = "list"
    data: list[NodeObject]


class StorageObject(BaseModel):
    """What takes up the disk that holds the home of the service."""

    object: Literal["storage"] = "storage"
    measured_at: int = Field(description="Some seconds ago at most.")
    files_bytes: int = Field(description="Of uploaded and result files; equal ones of a tenant are one.")
    prepared_bytes: int = Field(description="Of training data as token ids.")
    models_bytes: int
    runs_bytes: int = Field(description="Of what trainings left: checkpoints, adapters, logs.")
    other_bytes: int = Field(description="Of all else in the home: an embedded database, logs, engines.")
    free_bytes: int
    total_bytes: int
