"""How a trainer is started: torchrun on one node, or on each node of a gang with one place to meet."""

import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from db.settings import DatabaseSettings
from workers import processes
from workers.addresses import interface_of
from workers.settings import WorkerSettings


def torchrun_alone(run_dir: Path, *, nproc: int) -> list[str]:
    """The command line of an attempt on one node."""
    return _torchrun(run_dir, "--standalone", f"--nproc_per_node={nproc}")


def torchrun_in_gang(
    run_dir: Path, *, nproc: int, nodes: int, rank: int, rendezvous: str, address: str
) -> list[str]:
    """The command line of one node's part; `rendezvous` is on the node of rank 0.

    c10d numbers the ranks as nodes join.
    """
    return _torchrun(
        run_dir,
        f"--nnodes={nodes}",
        f"--nproc_per_node={nproc}",
        f"--node_rank={rank}",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint={rendezvous}",
        f"--rdzv_id={run_dir.parent.name}-{run_dir.name}",
        f"--rdzv_conf=is_host={rank == 0}",
        f"--local_addr={address}",
    )


def environment(
    marker: str, devices: Sequence[str], *, nproc: int, settings: WorkerSettings, address: str | None = None
) -> dict[str, str]:
    """The environment of a trainer that may use `devices`; in a gang, under which address others reach it."""
    gpus = [device.removeprefix("cuda:") for device in devices if device.startswith("cuda:")]
    return processes.child_environment(
        marker,
        CUDA_DEVICE_ORDER="PCI_BUS_ID",  # as NVML counts
        CUDA_VISIBLE_DEVICES=",".join(gpus),
        OMP_NUM_THREADS=str(max(1, processes.n_cpus() // nproc)),
        TORCH_ELASTIC_SHUTDOWN_TIMEOUT=str(int(settings.stop_grace_s)),
        **_interface_for_gloo(address),
    )


def _interface_for_gloo(address: str | None) -> dict[str, str]:
    """Left alone, gloo tells the other nodes what the host's name means here: often a loopback address."""
    interface = interface_of(address) if address else None
    if interface is None or "GLOO_SOCKET_IFNAME" in os.environ:  # the operator's word counts
        return {}
    return {"GLOO_SOCKET_IFNAME": interface}


def spawn(argv: list[str], *, env: dict[str, str], run_dir: Path, log_path: Path) -> subprocess.Popen[bytes]:
    """Start a trainer, which writes into its run folder and into the prepared data that jobs share."""
    cache_dir = DatabaseSettings().cache_dir
    cache_dir.mkdir(parents=True, exist_ok=True)
    return processes.spawn(argv, env=env, cwd=run_dir, log_path=log_path, writable=[cache_dir])


def find_port(address: str) -> int:
    """A port that was free a moment ago."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def _torchrun(run_dir: Path, *options: str) -> list[str]:
    return processes.module_command(
        "torch.distributed.run", *options, "--max_restarts=0", "-m", "trainers.run", str(run_dir)
    )
