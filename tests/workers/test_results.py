"""The result files of a job: OpenAI's columns, a line a step, and its evaluation, once training is over."""

import csv
import io

import pytest

from db import blobs, events, jobs, tasks
from db.models import File
from db.settings import DatabaseSettings
from tests.db.world import World
from workers.train import finish, run_dir_of

EXIT = {"reason": "done", "message": "", "step": 3, "trained_tokens": 5, "metrics": {}}


@pytest.fixture(autouse=True)
def home(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESIDENCY_HOME", str(world.home))


def report(world: World, job_id: str, *records: dict[str, float | None]) -> None:
    with world.database.write() as session:
        job = jobs.get(session, job_id, org_id=world.org_id)
        for record in records:
            events.add(session, job, "Step", type_="metrics", data=dict(record))


def read(file: File) -> str:
    return blobs.path_of(DatabaseSettings().blobs_dir, file.org_id, file.sha256).read_text()


def test_metrics_of_every_step_and_the_evaluation_become_files(world: World) -> None:
    job = world.add_job()
    lease = world.take()
    report(
        world,
        job.id,
        {"step": 0, "valid_loss": 3.0, "valid_mean_token_accuracy": 0.1},
        {"step": 1, "train_loss": 2.5, "train_mean_token_accuracy": 0.2, "grad_norm": 1.0},
        {"step": 2, "train_loss": 9.0},
        {"step": 2, "train_loss": 2.0, "train_mean_token_accuracy": None},  # again, after an interruption
        {"step": 2, "valid_loss": 2.2},
        {"step": 10, "train_loss": None},  # not a finite number
    )
    assert world.job(job.id).result_files is None
    evaluation = '{"steps": [{"step": 0, "valid_loss": 3.0}]}'
    output = run_dir_of(job.id, lease.token) / "output"
    output.mkdir(parents=True)
    (output / "evaluation.json").write_text(evaluation)
    with tasks.fenced(world.database, lease) as session:
        finish(session, lease, exit_=EXIT, draining=False)

    named = world.job(job.id).result_files
    assert named is not None
    with world.database.read() as session:
        file, other = (session.get_one(File, file_id) for file_id in named)
    assert (other.purpose, other.filename, read(other)) == (
        "fine-tune-results",
        "evaluation.json",
        evaluation,
    )
    assert (file.purpose, file.status, file.filename) == (
        "fine-tune-results",
        "processed",
        "step_metrics.csv",
    )
    text = read(file)
    assert text.splitlines()[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert [list(row.values()) for row in csv.DictReader(io.StringIO(text))] == [
        ["0", "", "", "3.0", "0.1"],
        ["1", "2.5", "0.2", "", ""],
        ["2", "2.0", "", "2.2", ""],
        ["10", "", "", "", ""],
    ]


def test_a_failed_job_has_none(world: World) -> None:
    job = world.add_job()
    lease = world.take()
    with tasks.fenced(world.database, lease) as session:
        finish(session, lease, exit_=EXIT | {"reason": "nan_loss"}, draining=False)
    assert world.job(job.id).result_files is None
