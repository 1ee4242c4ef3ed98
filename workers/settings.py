"""How workers reach the broker, how long leases last, and what a node offers."""

import os
import socket
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from workers import gpus


class WorkerSettings(BaseSettings):
    """Read from `RESIDENCY_*`. Times in seconds."""

    model_config = SettingsConfigDict(env_prefix="RESIDENCY_")

    redis_url: str = "redis://127.0.0.1:6379/0"
    node: str = Field(default_factory=socket.gethostname)
    node_address: str = Field(default="", description="Where other nodes reach this one; its host's address.")
    slots: int = Field(default=1, ge=1, description="Training slots of a node without GPUs.")
    gpus: str = Field(
        default="auto", description="`auto`, `none`, or a comma-separated list of CUDA indices."
    )

    min_free_bytes: int = Field(
        default=1 << 30, ge=0, description="A node whose home has less free disk takes no training."
    )

    passing_s: float = Field(
        default=60.0, ge=0, description="How long jobs that fit may pass one that waits for more devices."
    )

    lease_ttl_s: float = 60.0
    heartbeat_s: float = 5.0
    tick_s: float = 5.0
    unkillable_s: float = Field(
        default=60.0, ge=0, description="After so long a device whose processes do not die is quarantined."
    )
    # A supervisor that cannot reach the database keeps training: the fence, not time, protects the data.
    database_patience_s: float = 900.0
    # After SIGTERM the trainer finishes its step and saves; then torchrun kills its ranks.
    stop_grace_s: float = 120.0

    # A preview that takes longer, of a huge file, must not keep checks and merges from their turn.
    preview_limit_s: float = 300.0
    engine_host: str = Field(
        default="127.0.0.1",
        description="Where engines listen, and the name under which the API reaches them.",
    )
    engine_start_s: float = 180.0
    engine_restarts: int = 3
    max_engines: int = Field(
        default=4, ge=1, description="Engines a node runs; idle automatic ones give way."
    )
    hub: bool = Field(default=False, description="Whether imports may download from a hub.")
    max_upload_bytes: int = Field(default=512 << 20, ge=1, description="Largest file that may be imported.")
    max_unpacked_bytes: int | None = Field(
        default=None, ge=1, description="What a compressed file may unpack to; eight times the largest file."
    )
    import_dirs: str = Field(default="", description="Folders, separated by `:`, that imports may read from.")

    def unpacked_limit_bytes(self) -> int:
        """What a compressed file may unpack to."""
        return self.max_unpacked_bytes or 8 * self.max_upload_bytes

    def devices(self) -> tuple[list[str], bool]:
        """The node's devices, and whether they are CPU slots rather than GPUs."""
        indices = self._gpu_indices()
        if indices:
            return [f"cuda:{index}" for index in indices], False
        return [f"slot:{index}" for index in range(self.slots)], True

    def may_import(self, source: Path) -> bool:
        """Whether `source`, all links resolved, lies under one of the allowed folders."""
        allowed = [Path(entry).resolve() for entry in self.import_dirs.split(os.pathsep) if entry]
        resolved = source.resolve()
        return any(resolved.is_relative_to(folder) for folder in allowed)

    def _gpu_indices(self) -> list[int]:
        if self.gpus == "none":
            return []
        if self.gpus != "auto":
            return [int(index) for index in self.gpus.split(",")]
        return [gpu.index for gpu in gpus.list_gpus()]
