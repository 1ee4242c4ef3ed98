"""Why a job failed, as data: the cause, the last lines of the log, and what to ask for instead (G8)."""

from pathlib import Path
from typing import Any

import pytest

from api.diagnosis import diagnose
from db import jobs, recovery, tasks
from db.failures import Failure
from db.models import Job
from workers.train import finish

JOBS = "/v1/fine_tuning/jobs"
on_both = pytest.mark.parametrize("database", ["sqlite", "postgres"], indirect=True)
PATH = "method.supervised.hyperparameters"
RESOLVED = {"n_epochs": 3, "batch_size": 8, "micro_batch_size": 8, "learning_rate": 2e-4, "dtype": "float16"}


@pytest.fixture
def job(client, world) -> str:
    body = {"model": world.base_model(), "training_file": world.file()}
    return client.post(JOBS, json=body).json()["id"]


def end(world, job_id: str, exit_: dict[str, Any] | None, *, resolved=RESOLVED, log: str = "") -> None:
    """One attempt, and what its worker makes of it."""
    world.skip_delays()
    lease = world.start(job_id, resolved=resolved)
    run_dir = Path(world.settings.runs_dir) / job_id / str(lease.token)
    run_dir.mkdir(parents=True)
    (run_dir / "log.txt").write_text(log)
    with tasks.fenced(world.database, lease) as session:
        finish(session, lease, exit_=exit_, draining=False)


def exit_of(reason: str, **more: Any) -> dict[str, Any]:
    return {"reason": reason, "message": f"ended: {reason}", **more}


def diagnosis_of(client, job_id: str) -> dict[str, Any]:
    return client.get(f"{JOBS}/{job_id}").json()["diagnosis"]


@on_both
def test_a_job_that_has_not_failed_has_none(client, world, job):
    assert diagnosis_of(client, job) is None
    end(world, job, exit_of("error"))
    assert client.get(f"{JOBS}/{job}").json()["status"] == "queued"
    assert diagnosis_of(client, job) is None
    client.post(f"{JOBS}/{job}/cancel")
    assert diagnosis_of(client, job) is None


@on_both
def test_too_little_memory_suggests_half_of_a_pass_and_the_same_batch(client, world, job):
    end(world, job, exit_of("cuda_oom"), log="".join(f"line {n}\n" for n in range(1, 61)))
    assert client.get(f"{JOBS}/{job}").json()["error"] == {
        "code": "cuda_out_of_memory",
        "message": "ended: cuda_oom",
        "param": None,
    }
    assert diagnosis_of(client, job) == {
        "code": "cuda_oom",
        "message": "ended: cuda_oom",
        "retryable": False,
        "attempts": 1,
        "file": None,
        "line": None,
        "suggestion": {
            "text": "Pass 4 rows at once instead of 8, and let more passes make the same batch.",
            "changes": {f"{PATH}.micro_batch_size": 4, f"{PATH}.batch_size": 8},
        },
        "log_tail": [f"line {n}" for n in range(11, 61)],
    }
    assert client.get(JOBS).json()["data"][0]["diagnosis"] is None  # lists stay short


def test_a_pass_of_one_row_can_only_be_made_cheaper(client, world, job):
    end(world, job, exit_of("cpu_oom"), resolved=RESOLVED | {"micro_batch_size": 1})
    found = diagnosis_of(client, job)
    assert found["code"] == "cpu_oom"
    assert found["suggestion"]["changes"] == {f"{PATH}.gradient_checkpointing": True}
    assert client.get(f"{JOBS}/{job}").json()["error"]["code"] == "out_of_memory"


def test_a_loss_that_is_no_number_suggests_to_learn_more_slowly(client, world, job):
    end(world, job, exit_of("nan_loss"))
    found = diagnosis_of(client, job)
    assert (found["code"], found["retryable"]) == ("nan_loss", False)
    assert found["suggestion"]["changes"] == {f"{PATH}.learning_rate": 1e-4, f"{PATH}.dtype": "bfloat16"}


def test_what_is_suggested_can_be_asked_for(client, world, job):
    end(world, job, exit_of("cuda_oom"))
    changes = diagnosis_of(client, job)["suggestion"]["changes"]
    hyperparameters = {path.removeprefix(f"{PATH}."): value for path, value in changes.items()}
    body = {"model": "org/base", "training_file": world.file(), "hyperparameters": hyperparameters}
    assert client.post(JOBS, json=body).status_code == 200


@pytest.mark.parametrize(
    ("exit_", "code", "attempts", "advice", "changes"),
    [
        (exit_of("cuda_oom"), "cuda_oom", 1, "4 rows at once", {"micro_batch_size": 4, "batch_size": 8}),
        (exit_of("nan_loss"), "nan_loss", 1, "more slowly", {"learning_rate": 1e-4, "dtype": "bfloat16"}),
        (exit_of("nccl_timeout"), "nccl_timeout", 3, "use one process", {"resources.nproc_per_node": 1}),
        (exit_of("bad_data", line=17), "bad_row", 1, "Mend line 17", {}),
        (exit_of("disk_full"), "disk_full", 1, "Free space", {"save_total_limit": 1}),
        (exit_of("bad_checkpoint"), "bad_checkpoint", 1, "Submit the job anew", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_cause_comes_with_what_to_do_and_the_end_of_the_log(
    client, world, exit_, code, attempts, advice, changes
):
    body = {"model": world.base_model(), "training_file": world.file(), "resources": {"nproc_per_node": 2}}
    job = client.post(JOBS, json=body).json()["id"]
    for attempt in range(1, attempts + 1):
        log = "".join(f"{attempt}: line {n}\n" for n in range(1, 61))
        end(world, job, exit_, resolved=RESOLVED | {"save_total_limit": 3}, log=log)
    found = diagnosis_of(client, job)
    assert (found["code"], found["attempts"]) == (code, attempts)
    assert found["log_tail"] == [f"{attempts}: line {n}" for n in range(11, 61)]
    assert advice in found["suggestion"]["text"]
    paths = {name if "." in name else f"{PATH}.{name}": value for name, value in changes.items()}
    assert found["suggestion"]["changes"] == paths
    for path, value in paths.items():
        put(body, path, value)
    assert client.post(JOBS, json=body).status_code == 200


def put(body: dict[str, Any], path: str, value: Any) -> None:
    """Ask for `value` at `path` in the body of a job."""
    *folders, name = path.split(".")
    for folder in folders:
        body = body.setdefault(folder, {"type": "supervised"} if folder == "method" else {})
    body[name] = value


@pytest.mark.parametrize(
    ("code", "job", "changes"),
    [
        ("disk_full", {"resolved": {"save_total_limit": 1}}, {}),
        ("nccl_timeout", {"resources": {"nproc_per_node": 1, "nnodes": 1}}, {}),
        ("nccl_timeout", {"resources": {"nproc_per_node": 4, "nnodes": 2}}, {"resources.nnodes": 1}),
    ],
)
def test_nothing_is_suggested_that_the_job_has_already(tmp_path, code, job, changes):
    failed = Job(id="ftjob-1", method="supervised", error={"code": code, "message": "m"}, **job)
    found = diagnose(failed, Failure(attempts=1, kind="train", outcome="failed"), runs_dir=tmp_path)
    assert found is not None
    assert found.suggestion is not None
    assert found.suggestion.text
    assert found.suggestion.changes == changes


def test_the_logs_of_a_gangs_other_nodes_follow_that_of_the_first(client, world, job):
    run_dir = Path(world.settings.runs_dir) / job / "1"
    end(world, job, exit_of("cpu_oom"), log="the first\n")
    for rank in (10, 2, 1):
        (run_dir / f"log-{rank}.txt").write_text("".join(f"{rank}: line {n}\n" for n in range(1, 31)))
    (run_dir / "log-old.txt").write_text("not a rank's\n")
    of_others = [
        line
        for rank in (1, 2, 10)
        for line in (f"log-{rank}.txt:", *(f"{rank}: line {n}" for n in range(21, 31)))
    ]
    assert diagnosis_of(client, job)["log_tail"] == ["the first", *of_others]


def test_a_row_at_fault_is_named(client, world, job):
    end(world, job, exit_of("bad_data", line=17))
    found = diagnosis_of(client, job)
    training_file = client.get(f"{JOBS}/{job}").json()["training_file"]
    assert (found["code"], found["file"], found["line"]) == ("bad_row", training_file, 17)
    assert f"line 17 of {training_file}" in found["suggestion"]["text"]


@on_both
def test_so_is_one_that_the_check_of_the_file_found(client, world):
    model, file = world.base_model(), world.file(checked=False)
    job = client.post(JOBS, json={"model": model, "training_file": file}).json()["id"]
    errors = [{"line": 5, "code": "not_json", "message": "not JSON"}]
    world.check_file(file, error="Line 5: not JSON", report={"rows": 9, "errors": errors})
    found = diagnosis_of(client, job)
    assert (found["code"], found["file"], found["line"], found["attempts"]) == ("bad_row", file, 5, 0)
    assert found["log_tail"] == []


def test_data_that_no_row_is_to_blame_for(client, world, job):
    end(world, job, exit_of("bad_data", line=None))
    found = diagnosis_of(client, job)
    assert (found["code"], found["file"], found["line"]) == ("bad_data", None, None)


@pytest.mark.parametrize(
    ("exit_", "code", "retryable"),
    [
        (exit_of("nccl_timeout"), "nccl_timeout", True),
        (exit_of("error"), "trainer_error", False),
        (exit_of("killed", signal="SIGSEGV"), "trainer_killed", True),
        (None, "trainer_killed", True),
    ],
    ids=["nccl_timeout", "error", "killed", "silent"],
)
def test_what_is_not_the_users_fault_gets_three_attempts(client, world, job, exit_, code, retryable):
    for attempt in (1, 2, 3):
        assert client.get(f"{JOBS}/{job}").json()["status"] == "queued"
        end(world, job, exit_, log=f"attempt {attempt}\n")
    found = diagnosis_of(client, job)
    assert client.get(f"{JOBS}/{job}").json()["error"]["code"] == "too_many_attempts"
    assert (found["code"], found["retryable"], found["attempts"]) == (code, retryable, 3)
    assert found["log_tail"] == ["attempt 3"]


@on_both
def test_a_worker_that_is_lost_three_times(client, world, job):
    for _ in range(3):
        world.skip_delays()
        lease = world.start(job)
        assert recovery.abandon(world.database, lease.attempt_id)
        with world.database.write() as session:
            tasks.release_devices(session, lease.attempt_id)
    found = diagnosis_of(client, job)
    assert (found["code"], found["retryable"], found["attempts"]) == ("worker_lost", True, 3)


def test_a_merge_that_is_refused_shows_its_own_log(client, world, job):
    lease = world.start(job)
    with tasks.fenced(world.database, lease) as session:
        jobs.finish_training(session, lease, exit_={})
    run_dir = Path(world.settings.runs_dir) / job / str(lease.token)
    run_dir.mkdir(parents=True)
    (run_dir / "log.txt").write_text("trained\n")
    (run_dir / "merge.log").write_text("merging\n")
    merge = world.claim("cpu")
    error = {"code": "merge_is_identity", "message": "Nothing was learnt.", "param": None}
    with tasks.fenced(world.database, merge) as session:
        jobs.fail(session, merge, error=error)
    found = diagnosis_of(client, job)
    assert (found["code"], found["attempts"], found["log_tail"]) == ("merge_is_identity", 1, ["merging"])
    assert found["suggestion"] is None
