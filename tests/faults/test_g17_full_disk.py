"""A full disk under a run is an error with a name; what was saved before stays whole (G17)."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults import meters, parts
from tests.faults.history import Witness
from tests.faults.injections import fill, may_mount, small_disk
from tests.stack import Stack
from tests.workers.test_recovery import submit, wait_for_checkpoint, wait_for_end
from trainers.folders.checkpoints import latest_valid

pytestmark = [
    pytest.mark.faults(g=17),
    pytest.mark.skipif(not may_mount(), reason="this process may not mount"),
    pytest.mark.timeout(3600),
]
DISK_BYTES = 64 << 20


@pytest.fixture
def disk(stack: Stack) -> Iterator[Path]:
    """A small file system under the runs."""
    runs_dir = stack.home / "runs"
    runs_dir.mkdir(exist_ok=True)
    with small_disk(runs_dir, DISK_BYTES):
        yield runs_dir


@parts.repeated(5)
def test_a_job_on_a_full_disk_fails_by_name_and_keeps_its_checkpoint(
    stack: Stack, disk: Path, chat_file: Path, judge: Callable[..., Witness]
) -> None:
    job_id = submit(stack, chat_file, save_steps=5)
    wait_for_checkpoint(stack, job_id)

    counted = meters.read(stack, "disk_full_total")
    ballast = fill(disk)

    ended = wait_for_end(stack, job_id)
    assert (ended["status"], ended["error"]["code"]) == ("failed", "disk_full"), ended["error"]
    meters.wait_until_shown(stack, "disk_full_total", counted + 1)
    checkpoints = disk / job_id / "1" / "checkpoints"
    found, corrupt = latest_valid([checkpoints])
    assert found is not None
    assert corrupt == []
    assert list(checkpoints.glob("*.tmp")) == []

    ballast.unlink()
    again = submit(stack, chat_file, max_steps=5)
    ended = wait_for_end(stack, again)
    assert ended["status"] == "succeeded", ended["error"]
    assert {held.token for held in judge(job_id, again).attempts} == {1}, "a full disk is tried once"
