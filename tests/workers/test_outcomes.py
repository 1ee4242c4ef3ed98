"""What a trainer says, or fails to say, becomes the right next state of its job, and each event once."""

import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from db import tasks
from db.models import Checkpoint, Event
from tests.db.world import World
from workers.progress import EventCopier
from workers.train import finish

pytestmark = pytest.mark.faults(g=8, everyday=True)


def exit_of(reason: str) -> dict[str, Any]:
    return {"reason": reason, "message": f"ended: {reason}", "step": 3, "trained_tokens": 5, "metrics": {}}


@pytest.mark.parametrize(
    ("reason", "status", "code"),
    [
        ("done", "running", None),  # the merge comes next
        ("bad_data", "failed", "invalid_training_file"),
        ("nan_loss", "failed", "nan_loss"),
        ("cuda_oom", "failed", "cuda_out_of_memory"),
        ("cpu_oom", "failed", "out_of_memory"),
        ("disk_full", "failed", "disk_full"),
        ("bad_checkpoint", "failed", "bad_checkpoint"),  # the next attempt would choose the same
        ("nccl_timeout", "queued", None),
        ("killed", "queued", None),
        ("error", "queued", None),
        ("stopped", "queued", None),  # by somebody else's SIGTERM
        (None, "queued", None),  # killed
    ],
)
def test_reasons(world: World, reason: str | None, status: str, code: str | None) -> None:
    job = world.add_job()
    lease = world.take()
    with tasks.fenced(world.database, lease) as session:
        finish(session, lease, exit_=exit_of(reason) if reason else None, draining=False)
    after = world.job(job.id)
    assert (after.status, (after.error or {}).get("code")) == (status, code)


@pytest.mark.parametrize("reason", ["bad_data", "error"])
def test_last_words_that_no_database_takes_end_an_attempt_too(world: World, reason: str) -> None:
    job = world.add_job()
    lease = world.take()
    said = {"reason": reason, "message": "KeyError: 'a\0b \udc80'"}
    with tasks.fenced(world.database, lease) as session:
        finish(session, lease, exit_=said, draining=False)
    after = world.job(job.id)
    assert after.status == ("failed" if reason == "bad_data" else "queued")
    [attempt] = world.attempts(job.id)
    assert attempt.exit is not None
    assert attempt.exit["message"] == r"KeyError: 'a\0b \udc80'"


@pytest.mark.parametrize("reason", ["stopped", "done", None])
def test_a_cancelled_job_ends_cancelled_whatever_the_trainer_reached(
    world: World, reason: str | None
) -> None:
    job = world.add_job()
    lease = world.take()
    world.cancel(job.id)
    with tasks.fenced(world.database, lease) as session:
        finish(session, lease, exit_=exit_of(reason) if reason else None, draining=False)
    assert world.job(job.id).status == "cancelled"


def test_a_draining_worker_charges_nothing(world: World) -> None:
    job = world.add_job()
    for _ in range(5):  # more often than there are attempts
        lease = world.take()
        with tasks.fenced(world.database, lease) as session:
            finish(session, lease, exit_=exit_of("stopped"), draining=True)
        assert world.job(job.id).status == "queued"


def write_events(run_dir: Path, records: list[dict[str, Any]], *, cut_bytes: int = 0) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    (run_dir / "events.jsonl").write_text(text[: len(text) - cut_bytes])


def test_each_event_is_copied_once_and_half_a_line_waits(world: World, tmp_path: Path) -> None:
    job = world.add_job()
    lease = world.take()
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints" / "step-2").mkdir(parents=True)
    records: list[dict[str, Any]] = [
        {"ts": 1.0, "type": "phase", "phase": "training"},
        {
            "ts": 2.0,
            "type": "metrics",
            "step": 2,
            "total_steps": 4,
            "data": {"train_loss": 1.5, "step_time_s": 0.5, "tokens_per_s": 100.0},
        },
        {
            "ts": 3.0,
            "type": "checkpoint",
            "step": 2,
            "path": "checkpoints/step-2",
            "manifest_sha256": "a" * 64,
            "metrics": {"train_loss": 1.5},
        },
        {"ts": 4.0, "type": "message", "level": "warn", "message": "the last line", "data": {}},
    ]
    write_events(run_dir, records, cut_bytes=5)
    for _ in range(3):
        with tasks.fenced(world.database, lease) as session:
            EventCopier(run_dir).copy(session, lease)  # as a supervisor that knows nothing of earlier copies
    assert "the last line" not in messages(world, job.id)
    write_events(run_dir, records)
    for _ in range(2):
        with tasks.fenced(world.database, lease) as session:
            EventCopier(run_dir).copy(session, lease)

    copied = messages(world, job.id)
    assert [m for m in copied if m in ("Step 2/4: training loss=1.5000", "Checkpoint created at step 2")] == [
        "Step 2/4: training loss=1.5000",
        "Checkpoint created at step 2",
    ]
    assert copied.count("the last line") == 1
    after = world.job(job.id)
    assert after.phase == "training"
    assert after.progress is not None
    assert after.progress.pop("updated_at") > after.created_at
    assert after.progress == {
        "step": 2,
        "total_steps": 4,
        "percent": 50.0,
        "tokens_per_s": 100.0,
        "eta_seconds": 1.0,
    }
    with world.database.read() as session:
        assert [row.step for row in session.scalars(select(Checkpoint))] == [2]


def messages(world: World, job_id: str) -> list[str]:
    with world.database.read() as session:
        return list(session.scalars(select(Event.message).where(Event.job_id == job_id).order_by(Event.seq)))
