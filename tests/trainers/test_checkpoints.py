"""A checkpoint is complete or invisible; damage is found before anything is loaded."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.injections import DAMAGES, flip
from trainers.folders.checkpoints import (
    MANIFEST,
    Checkpoint,
    Corrupt,
    clear_leftovers,
    latest_valid,
    list_checkpoints,
    rotate,
    seal,
    stage,
    verify,
)

FILES = {
    "adapter_model.safetensors": b"weights" * 500,
    "optimizer.pt": b"moments" * 900,
    "sub/rng_state.pth": b"r",
}


def save(root: Path, step: int) -> Checkpoint:
    staged = stage(root, step=step)
    for name, data in FILES.items():
        (staged / name).parent.mkdir(exist_ok=True)
        (staged / name).write_bytes(data + str(step).encode())
    return seal(staged, step=step, attempt=1, world_size=1)


def test_a_sealed_checkpoint_is_verified_and_found(tmp_path: Path) -> None:
    sealed = save(tmp_path, 10)
    assert verify(sealed.path) == sealed
    assert latest_valid([tmp_path]) == (sealed, [])


def test_a_staged_one_is_invisible(tmp_path: Path) -> None:
    (stage(tmp_path, step=10) / "adapter_model.safetensors").write_bytes(b"half")
    assert latest_valid([tmp_path, tmp_path / "absent"]) == (None, [])
    clear_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_any_damage_to_any_file_falls_back_to_the_one_before(tmp_path: Path, name: str, damage) -> None:
    older, newer = save(tmp_path, 10), save(tmp_path, 20)
    damage(newer.path / name)
    found, corrupt = latest_valid([tmp_path])
    assert found == older
    assert [broken.path for broken in corrupt] == [newer.path]
    assert Path(name).name in corrupt[0].problem


def test_every_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    sealed = save(tmp_path, 10)
    manifest = sealed.path / MANIFEST
    body = json.loads(manifest.read_text())
    for name, value in (("attempt", 2), ("world_size", 2), ("step", 11)):
        manifest.write_text(json.dumps({**body, name: value}))
        assert isinstance(verify(sealed.path), Corrupt), name


def test_a_file_that_was_added_or_a_folder_renamed_is_damage(tmp_path: Path) -> None:
    sealed = save(tmp_path, 10)
    (sealed.path / "pytorch_model.bin").write_bytes(b"x")
    assert "pytorch_model.bin" in getattr(verify(sealed.path), "problem", "")
    (sealed.path / "pytorch_model.bin").unlink()
    assert isinstance(verify(sealed.path.rename(tmp_path / "step-99")), Corrupt)


def test_the_furthest_step_counts_then_the_newest_attempt(tmp_path: Path) -> None:
    new, old = tmp_path / "2", tmp_path / "1"
    save(old, 20)
    save(new, 10)
    assert getattr(latest_valid([new, old])[0], "path", None) == old / "step-20"
    save(new, 20)
    assert getattr(latest_valid([new, old])[0], "path", None) == new / "step-20"


def test_rotation_keeps_the_newest_by_number(tmp_path: Path) -> None:
    for step in (8, 9, 10, 100):
        save(tmp_path, step)
    rotate(tmp_path, keep=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [10, 100]
    assert len(list(tmp_path.iterdir())) == 2


def test_sealing_again_replaces_what_was_there(tmp_path: Path) -> None:
    first = save(tmp_path, 10)
    flip(first.path / "optimizer.pt")
    assert latest_valid([tmp_path])[0] is None
    assert latest_valid([tmp_path])[0] != save(tmp_path, 10)
    assert isinstance(verify(first.path), Checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["step-10"]


WRITER = """
import sys
from pathlib import Path
from trainers.folders.checkpoints import rotate, seal, stage
root = Path(sys.argv[1])
for step in range(int(sys.argv[2]), 10**9):
    staged = stage(root, step=step)
    for name in ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json"):
        (staged / name).write_bytes(b"%d" % step * 20000)
    seal(staged, step=step, attempt=1, world_size=1)
    rotate(root, keep=3)
"""


@pytest.mark.long
@pytest.mark.faults(g=15)
def test_kill_9_at_a_hundred_moments_of_saving_leaves_a_valid_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    step, moments = 1, random.Random(5)
    for _ in range(100):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, str(step + 1)])
        deadline = time.monotonic() + 30
        while list_checkpoints(tmp_path)[-1][0] <= step and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.03))  # the moment itself is what is varied
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        found, corrupt = latest_valid([tmp_path])
        assert corrupt == []
        assert found is not None
        assert found.step > step
        step = found.step
