"""Fine-tuning jobs from submission to the end, as a client sees them."""

import base64
import json

import pytest
from sqlalchemy import func, select, update

from db import checkpoints, events, jobs, tasks
from db.models import Event, File, Job

JOBS = "/v1/fine_tuning/jobs"
on_both = pytest.mark.parametrize("database", ["sqlite", "postgres"], indirect=True)


@pytest.fixture
def body(world) -> dict:
    return {"model": world.base_model(), "training_file": world.file()}


def create(client, body, **more) -> dict:
    answer = client.post(JOBS, json=body | more)
    assert answer.status_code == 200, answer.text
    return answer.json()


@on_both
def test_a_new_job_has_every_key_of_the_reference(client, body):
    integrations = [{"type": "wandb", "wandb": {"project": "p", "name": None, "entity": None, "tags": ["a"]}}]
    job = create(
        client,
        body,
        suffix="v1",
        seed=42,
        metadata={"team": "x"},
        integrations=integrations,
        validation_file=body["training_file"],
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        resources={"nproc_per_node": 2},
    )
    hyperparameters = job.pop("hyperparameters")
    assert hyperparameters.items() >= {"n_epochs": 2, "batch_size": "auto"}.items()
    assert job.pop("method") == {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    assert job.pop("id").startswith("ftjob-")
    assert isinstance(job.pop("created_at"), int)
    assert job == {
        "object": "fine_tuning.job",
        "finished_at": None,
        "estimated_finish": None,
        "model": "org/base",
        "fine_tuned_model": None,
        "organization_id": "org-default",
        "status": "queued",
        "training_file": body["training_file"],
        "training_files": None,
        "validation_file": body["training_file"],
        "result_files": [],
        "trained_tokens": None,
        "seed": 42,
        "integrations": integrations,
        "metadata": {"team": "x"},
        "error": None,
        "user_provided_suffix": "v1",
        "usage_metrics": None,
        "shared_with_openai": False,
        "ignored": {},
        "pipeline_id": None,
        "stage": None,
        "phase": None,
        "progress": None,
        "resources": {"nproc_per_node": 2, "nnodes": 1},
        "queue_position": 0,
        "blocked_by": [{"reason": "worker"}],
        "expected_start_at": None,
        "diagnosis": None,
        "priority": 0,
        "on_oom": None,
        "retry_of": None,
    }


def test_older_spelling_and_generated_seed(client, body):
    job = create(client, body, hyperparameters={"n_epochs": 4}, validation_file=None, metadata=None)
    assert job["method"]["supervised"]["hyperparameters"]["n_epochs"] == 4
    assert 0 <= job["seed"] < 2**31
    assert (job["integrations"], job["metadata"]) == ([], None)
    assert create(client, body)["seed"] != job["seed"]


@pytest.mark.parametrize(
    ("more", "status", "code", "param"),
    [
        ({"model": "nobody/knows"}, 404, "model_not_found", "model"),
        ({"training_file": "file-unknown"}, 404, "not_found", "training_file"),
        ({"validation_file": "file-unknown"}, 404, "not_found", "validation_file"),
        ({"method": {"type": "dreaming"}}, 400, "unsupported_value", "method.type"),
        ({"hyperparameters": {"n_epochs": 51}}, 400, "invalid_value", "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epoch": 1}}, 400, "unknown_parameter", "hyperparameters.n_epoch"),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 0}}}},
            400,
            "invalid_value",
            "method.supervised.hyperparameters.batch_size",
        ),
        (
            {"validation_file": "file-unknown", "hyperparameters": {"validation_split_percentage": 5}},
            400,
            "invalid_value",
            "method.supervised.hyperparameters.validation_split_percentage",
        ),
        ({"suffix": ""}, 400, "invalid_value", "suffix"),
        ({"suffix": "s" * 65}, 400, "invalid_value", "suffix"),
        ({"suffix": "a\n"}, 400, "invalid_value", "suffix"),
        ({"seed": -1}, 400, "invalid_value", "seed"),
        ({"seed": 2**31}, 400, "invalid_value", "seed"),
        ({"metadata": {str(n): "x" for n in range(17)}}, 400, "invalid_value", "metadata"),
        ({"metadata": {"k": "v" * 513}}, 400, "invalid_value", "metadata.k"),
        ({"integrations": [{"type": "mlflow"}]}, 400, "invalid_value", "integrations.0.type"),
        ({"resources": {"gpus": 1}}, 400, "unknown_parameter", "resources.gpus"),
    ],
)
def test_refusals_name_the_parameter(client, body, more, status, code, param):
    answer = client.post(JOBS, json=body | more)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert client.get(JOBS).json()["data"] == []


def test_a_job_may_train_on_several_files(client, body, world):
    second = world.file()
    mixed = [{"file": body["training_file"], "weight": 3.0}, {"file": second, "weight": 1.0}]
    job = create(client, {"model": body["model"], "training_files": mixed})
    assert job["training_file"] == body["training_file"]
    assert job["training_files"] == [part | {"epochs": None} for part in mixed]
    assert client.get(f"{JOBS}/{job['id']}").json()["training_files"] == job["training_files"]
    listed = client.get(f"{JOBS}/{job['id']}/events").json()["data"]
    named = f"Validating training files: {body['training_file']}, {second}"
    assert named in [event["message"] for event in listed]
    # Both in one place, as the official client has to give the one.
    assert create(client, body | {"training_files": mixed})["training_files"] == job["training_files"]
    refused = client.delete(f"/v1/files/{second}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "file_in_use")
    alone = create(client, {"model": body["model"], "training_files": [{"file": second, "weight": 2}]})
    assert (alone["training_file"], alone["training_files"]) == (second, None)


@pytest.mark.parametrize(
    ("files", "more", "code", "param"),
    [
        (None, {}, "missing_required_parameter", "training_file"),
        ([], {}, "invalid_value", "training_files"),
        (["{0}", "file-unknown"], {}, "not_found", "training_files.1.file"),
        (["{0}", "{0}"], {}, "invalid_value", "training_files.1.file"),
        (["{1}", "{0}"], {"training_file": "{0}"}, "invalid_value", "training_file"),
        ([{"file": "{0}", "weight": 1}, "{1}"], {}, "invalid_value", "training_files.1"),
        ([{"file": "{0}", "weight": 0}, "{1}"], {}, "invalid_value", "training_files.0.weight"),
        ([{"file": "{0}", "weight": 1, "epochs": 1}], {}, "invalid_value", "training_files.0.epochs"),
        ([{"file": "{0}", "wieght": 1}], {}, "unknown_parameter", "training_files.0.wieght"),
    ],
)
def test_refusals_of_several_files_name_the_one(client, body, world, files, more, code, param):
    ids = [body["training_file"], world.file()]

    def fill(text):
        return text.format(*ids) if isinstance(text, str) else text

    asked = {name: fill(value) for name, value in more.items()}
    if files is not None:
        parts = [{"file": one} if isinstance(one, str) else one for one in files]
        asked["training_files"] = [part | {"file": fill(part["file"])} for part in parts]
    answer = client.post(JOBS, json={"model": body["model"]} | asked)
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param), error


def test_seed_and_processes_may_stand_among_the_hyperparameters(client, body):
    method = {"type": "supervised", "supervised": {"hyperparameters": {"seed": 5, "nproc_per_node": 2}}}
    job = create(client, body, method=method)
    assert (job["seed"], job["resources"]["nproc_per_node"]) == (5, 2)
    assert not {"seed", "nproc_per_node"} & job["hyperparameters"].keys()
    for other, param in (
        ({"seed": 6}, "seed"),
        ({"resources": {"nproc_per_node": 1}}, "resources.nproc_per_node"),
    ):
        refused = client.post(JOBS, json=body | {"method": method} | other)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_words_for_an_unknown_model(client, body):
    message = client.post(JOBS, json=body | {"model": "m"}).json()["error"]["message"]
    assert message == "The model `m` does not exist or you do not have access to it."


def test_files_that_cannot_be_trained_on(client, world, body):
    batch, bad = world.file(purpose="batch"), world.file(checked=False)
    world.check_file(bad, error="Line 1: nonsense")
    for file_id, code in ((batch, "invalid_file_purpose"), (bad, "invalid_training_file")):
        answer = client.post(JOBS, json=body | {"training_file": file_id})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, code, "training_file")
        assert answer.headers["x-should-retry"] == "false"


def test_a_file_with_rows_of_another_kind(client, world, body):
    pairs, unchecked = world.file(kind="preference"), world.file(checked=False)
    error = client.post(JOBS, json=body | {"training_file": pairs}).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_training_file", "training_file")
    assert error["message"] == "the file has preference rows, but supervised learns from conversation rows"
    assert create(client, body, training_file=pairs, method={"type": "dpo"})["status"] == "queued"

    job = create(client, body, validation_file=unchecked)
    world.check_file(unchecked, kind="document")
    failed = client.get(f"{JOBS}/{job['id']}").json()
    assert (failed["status"], failed["error"]["param"]) == ("failed", "validation_file")


@on_both
def test_the_road_of_a_job(client, world, body):
    body["training_file"] = world.file(checked=False)
    job = create(client, body, suffix="v1")
    path = f"{JOBS}/{job['id']}"
    assert (job["status"], job["queue_position"]) == ("validating_files", None)
    world.check_file(body["training_file"])
    assert client.get(path).json()["status"] == "queued"

    lease = world.start(job["id"], resolved={"n_epochs": 3, "batch_size": 4})
    with tasks.fenced(world.database, lease) as session:
        row = session.get_one(Job, job["id"])
        jobs.set_phase(session, row, "training")
        jobs.set_progress(session, row, {"step": 5, "total_steps": 10, "percent": 50.0, "eta_seconds": 60.0})
        metrics = {"train_loss": 0.5, "valid_loss": None}
        message = events.describe_metrics(5, 10, metrics)
        events.add(session, row, message, type_="metrics", data={"step": 5, "total_steps": 10, **metrics})
    running = client.get(path).json()
    assert (running["status"], running["phase"]) == ("running", "training")
    assert running["progress"]["step"] == 5
    assert running["estimated_finish"] > running["created_at"]
    assert running["hyperparameters"] == {"n_epochs": 3, "batch_size": 4}
    assert running["method"]["supervised"]["hyperparameters"] == running["hyperparameters"]
    assert running["trained_tokens"] is None

    model = world.finish(lease)
    done = client.get(path).json()
    assert (done["status"], done["fine_tuned_model"], done["trained_tokens"]) == ("succeeded", model, 512)
    assert done["finished_at"] >= done["created_at"]
    assert (done["phase"], done["estimated_finish"], done["error"]) == (None, None, None)

    told = client.get(f"{path}/events?order=asc").json()["data"]
    assert [event["message"] for event in told] == [
        f"Created fine-tuning job: {job['id']}",
        f"Validating training file: {body['training_file']}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Step 5/10: training loss=0.5000",
        "Training finished; merging the adapter into its base",
        f"New fine-tuned model created: {model}",
        "The job has successfully completed",
    ]
    assert {event["object"] for event in told} == {"fine_tuning.job.event"}
    assert told[4]["type"] == "metrics"
    assert told[4]["data"] == {"step": 5, "total_steps": 10, "train_loss": 0.5, "valid_loss": None}
    assert client.get(f"{path}/events").json()["data"] == told[::-1]
    assert client.get(f"{path}/events?order=asc&type=message").json()["data"] == told[:4] + told[5:]
    assert client.get(f"{path}/events?type=metrics").json()["data"] == [told[4]]


def test_checkpoints(client, world, body):
    job = create(client, body, suffix="v1")
    path = f"{JOBS}/{job['id']}"
    lease = world.start(job["id"])
    with tasks.fenced(world.database, lease) as session:
        row = session.get_one(Job, job["id"])
        for step in (5, 10):
            folder = world.settings.runs_dir / f"step-{step}"
            checkpoints.record(
                session, row, step=step, path=folder, manifest_sha256="m", metrics={"train_loss": 0.5}
            )
    saved = client.get(f"{path}/checkpoints").json()
    assert [item["step_number"] for item in saved["data"]] == [10, 5]
    assert (saved["first_id"], saved["last_id"]) == tuple(item["id"] for item in saved["data"])
    first = saved["data"][0]
    assert first["fine_tuned_model_checkpoint"].startswith("ft:org--base:default:v1:")
    assert first["fine_tuned_model_checkpoint"].endswith(":ckpt-step-10")
    assert first["metrics"] == {
        "step": 10,
        "train_loss": 0.5,
        "train_mean_token_accuracy": None,
        "valid_loss": None,
        "valid_mean_token_accuracy": None,
        "full_valid_loss": None,
        "full_valid_mean_token_accuracy": None,
    }


def test_tokens_are_told_at_the_end(client, world, body):
    job = create(client, body)
    lease = world.start(job["id"])
    with tasks.fenced(world.database, lease) as session:
        jobs.finish_training(session, lease, exit_={"trained_tokens": 512})
    merging = client.get(f"{JOBS}/{job['id']}").json()
    assert (merging["status"], merging["phase"], merging["trained_tokens"]) == ("running", "merging", None)


def test_failure_shows_why(client, world, body):
    job = create(client, body)
    lease = world.start(job["id"])
    error = {"code": "nan_loss", "message": "The loss is not a number", "param": None}
    with tasks.fenced(world.database, lease) as session:
        jobs.fail(session, lease, error=error)
    failed = client.get(f"{JOBS}/{job['id']}").json()
    assert (failed["status"], failed["error"]) == ("failed", error)


@on_both
def test_cancel_twice(client, body):
    job = create(client, body)
    path = f"{JOBS}/{job['id']}/cancel"
    cancelled = client.post(path, content=b"", headers={"content-type": "application/json"})
    assert cancelled.status_code == 200, cancelled.text
    assert cancelled.json()["status"] == "cancelled"
    again = client.post(path)
    assert (again.status_code, again.json()["error"]["code"]) == (400, "job_not_cancellable")
    assert again.headers["x-should-retry"] == "false"


def test_cancel_of_a_running_job_is_a_request(client, world, body):
    job = create(client, body)
    lease = world.start(job["id"])
    for _ in range(2):
        assert client.post(f"{JOBS}/{job['id']}/cancel").json()["status"] == "running"
    with tasks.fenced(world.database, lease) as session:
        assert jobs.stop_asked(session, job["id"]) == "cancel"
        jobs.cancel(session, lease)
    assert client.get(f"{JOBS}/{job['id']}").json()["status"] == "cancelled"
    told = [event["message"] for event in client.get(f"{JOBS}/{job['id']}/events").json()["data"]]
    assert told[:2] == ["Fine-tuning job cancelled", "Cancellation requested"]


@on_both
def test_pages_under_equal_times(client, world, body):
    ids = {create(client, body)["id"] for _ in range(7)}
    with world.database.write() as session:
        session.execute(update(Job).values(created_at=1000.0))
    seen, after = [], None
    while True:
        page = client.get(JOBS, params={"limit": 3} | ({"after": after} if after else {})).json()
        seen += [job["id"] for job in page["data"]]
        if not page["has_more"]:
            break
        after = seen[-1]
    assert len(seen) == 7
    assert set(seen) == ids
    assert page.keys() == {"object", "data", "has_more"}


def test_status_filter(client, world, body):
    first, second = create(client, body), create(client, body)
    world.start(first["id"])
    assert [job["id"] for job in client.get(f"{JOBS}?status=queued").json()["data"]] == [second["id"]]
    assert client.get(f"{JOBS}?status=sleeping").json()["error"]["param"] == "status"


def test_event_pages(client, body):
    job = create(client, body)
    path = f"{JOBS}/{job['id']}/events"
    everything = client.get(path).json()
    assert everything.keys() == {"object", "data", "has_more"}
    page = client.get(f"{path}?limit=2").json()
    assert (page["data"], page["has_more"]) == (everything["data"][:2], True)
    rest = client.get(path, params={"limit": 2, "after": page["data"][-1]["id"]}).json()
    assert (rest["data"], rest["has_more"]) == (everything["data"][2:], False)


@on_both
def test_queue_position(client, world, body):
    first, second, third = (create(client, body) for _ in range(3))
    assert [job["queue_position"] for job in (first, second, third)] == [0, 1, 2]
    world.start(first["id"])
    client.post(f"{JOBS}/{second['id']}/cancel")
    shown = [client.get(f"{JOBS}/{job['id']}").json()["queue_position"] for job in (first, second, third)]
    assert shown == [None, None, 0]


def test_log_of_the_newest_attempt(client, world, body):
    job = create(client, body)
    path, folder = f"{JOBS}/{job['id']}/logs", world.settings.runs_dir / job["id"]
    nothing = client.get(path)
    assert (nothing.status_code, nothing.text, nothing.headers["x-next-offset"]) == (200, "", "0")
    for attempt, text in ((2, "older"), (10, "Loss € 0.5\n")):
        (folder / str(attempt)).mkdir(parents=True)
        (folder / str(attempt) / "log.txt").write_text(text)
    (folder / "notes").mkdir()
    answer = client.get(path)
    assert (answer.text, answer.headers["x-attempt"]) == ("Loss € 0.5\n", "10")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["x-next-offset"] == str(len("Loss € 0.5\n".encode()))
    assert client.get(f"{path}?offset=5").text == "€ 0.5\n"
    later = client.get(f"{path}?offset=1000")
    assert (later.text, later.headers["x-next-offset"]) == ("", "1000")
    assert client.get(f"{path}?attempt=2").text == "older"
    assert client.get(f"{path}?offset=-1").status_code == 400


def test_a_long_log_comes_in_whole_characters(client, world, body):
    job = create(client, body)
    folder = world.settings.runs_dir / job["id"] / "1"
    folder.mkdir(parents=True)
    text = "x" + "é" * 700_000
    (folder / "log.txt").write_text(text)
    read, offset = "", 0
    while True:
        answer = client.get(f"{JOBS}/{job['id']}/logs?offset={offset}")
        if not answer.content:
            break
        assert len(answer.content) <= 1024 * 1024
        read += answer.content.decode()
        offset = int(answer.headers["x-next-offset"])
    assert read == text


def test_a_character_still_being_written_waits(client, world, body):
    job = create(client, body)
    folder = world.settings.runs_dir / job["id"] / "1"
    folder.mkdir(parents=True)
    (folder / "log.txt").write_bytes("ab€".encode()[:-1])
    answer = client.get(f"{JOBS}/{job['id']}/logs")
    assert (answer.content, answer.headers["x-next-offset"]) == (b"ab", "2")


def test_one_transaction(client, world, body):
    """A refused job leaves no event behind."""
    client.post(JOBS, json=body | {"validation_file": "file-unknown"})
    with world.database.read() as session:
        assert session.scalar(select(func.count()).select_from(Event)) == 0
        assert session.scalar(select(func.count()).select_from(File)) == 1


def test_cursors_are_not_secrets(client, body):
    """Anything may be sent as a cursor or an id."""
    create(client, body)
    for cursor in (
        "",
        "ftjob-x",
        "' OR 1=1 --",
        "%",
        base64.b64encode(b"\xff" * 99).decode(),
        json.dumps({}),
    ):
        answer = client.get(JOBS, params={"after": cursor})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "after")
