"""How busy a GPU is, as the driver tells it and the service passes it on."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from db import measures, nodes
from db.migrate import upgrade
from db.nodes import Device, Facts
from db.session import Database
from tests.stack import wait_for
from workers import gpus

pytestmark = pytest.mark.gpu
HELD_BYTES = 4 << 30


@pytest.fixture
def work() -> Iterator[None]:
    """Keeps the first GPU busy, with `HELD_BYTES` of its memory."""
    over = threading.Event()
    side = 8192

    def multiply() -> None:
        held = torch.ones(HELD_BYTES, dtype=torch.uint8, device="cuda:0")
        factor = torch.randn(side, side, device="cuda:0")
        while not over.is_set():
            for _ in range(20):
                factor @ factor
            torch.cuda.synchronize()
        del held, factor
        torch.cuda.empty_cache()

    thread = threading.Thread(target=multiply)
    thread.start()
    yield
    over.set()
    thread.join()


def test_an_idle_gpu_says_so() -> None:
    use = gpus.read_uses()["cuda:0"]
    assert 0 <= use.memory_used_bytes < gpus.list_gpus()[0].memory_bytes
    assert 0 <= use.utilization <= 1


def test_work_shows(work: None, tmp_path: Path) -> None:  # noqa: ARG001
    idle = {gpu.id for gpu in gpus.list_gpus()} - {"cuda:0"}
    wait_for(lambda: gpus.read_uses()["cuda:0"].utilization > 0.5, within_s=60, what="a busy GPU")
    uses = gpus.read_uses()
    assert HELD_BYTES <= uses["cuda:0"].memory_used_bytes
    assert all(uses[other].memory_used_bytes < HELD_BYTES for other in idle)

    database = Database(f"sqlite:///{tmp_path / 'residency.db'}")
    upgrade(database)
    device = Device("cuda:0", kind=gpus.list_gpus()[0].kind)
    facts = Facts("here", address="", devices=(device,), slots=1, free_bytes=1, uses=uses)
    with database.write() as session:
        nodes.report(session, facts, every_s=0, trains=True)
    with database.read() as session:
        told = {measure.name: values for measure, values in measures.read_all(session)}
    assert told["device_memory_used_bytes"][("here", "cuda:0")] == uses["cuda:0"].memory_used_bytes
    database.dispose()
