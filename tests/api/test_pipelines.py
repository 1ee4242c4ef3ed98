"""Pipelines over HTTP: from one submission to the last stage, what is refused, and running one again."""

import json
from pathlib import Path

import pytest
from sqlalchemy import func, select

from db import jobs, tasks
from db.models import Job, Pipeline
from tests.api.cli_peer import Answer, error, run, serve

PIPELINES, JOBS = "/v1/pipelines", "/v1/fine_tuning/jobs"
on_both = pytest.mark.parametrize("database", ["sqlite", "postgres"], indirect=True)


@pytest.fixture
def body(world) -> dict:
    """Pretraining, fine-tuning on it, and a reward model beside a preference optimization."""
    model = world.base_model()
    texts, chats, pairs = (world.file(kind=kind) for kind in ("document", "conversation", "preference"))
    tuned = {"model": {"stage": "sft"}, "training_file": pairs}
    rank = {"hyperparameters": {"lora_rank": 4}}
    return {
        "name": "medical",
        "stages": [
            {"name": "pt", "model": model, "training_file": texts, "method": {"type": "pretraining"}},
            {
                "name": "sft",
                "model": {"stage": "pt"},
                "training_file": chats,
                "method": {"type": "supervised", "supervised": rank},
                "suffix": "v1",
                "metadata": {"team": "x"},
            },
            {"name": "rm", **tuned, "method": {"type": "reward"}, "seed": 5},
            {"name": "dpo", **tuned, "method": {"type": "dpo"}, "resources": {"nproc_per_node": 2}},
        ],
    }


def create(client, body, **headers) -> dict:
    answer = client.post(PIPELINES, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def statuses(pipeline: dict) -> dict[str, str]:
    return {stage["name"]: stage["status"] for stage in pipeline["stages"]}


def stage_of(pipeline: dict, name: str) -> dict:
    return next(stage for stage in pipeline["stages"] if stage["name"] == name)


def run_through(client, world, pipeline: dict) -> dict:
    """Carry every stage out, upstream first."""
    path = f"{PIPELINES}/{pipeline['id']}"
    while ready := [stage for stage in client.get(path).json()["stages"] if stage["status"] == "queued"]:
        world.finish(world.start(ready[0]["job_id"]))
    return client.get(path).json()


@on_both
def test_the_road_of_a_pipeline(client, world, body):
    pipeline = create(client, body)
    path = f"{PIPELINES}/{pipeline['id']}"
    assert pipeline["id"].startswith("pipe-")
    assert (pipeline["object"], pipeline["name"], pipeline["status"]) == ("pipeline", "medical", "queued")
    assert (pipeline["finished_at"], isinstance(pipeline["created_at"], int)) == (None, True)
    assert statuses(pipeline) == {"pt": "queued", "sft": "waiting", "rm": "waiting", "dpo": "waiting"}
    assert client.get(path).json() == pipeline

    sft = client.get(f"{JOBS}/{stage_of(pipeline, 'sft')['job_id']}").json()
    assert (sft["status"], sft["pipeline_id"], sft["stage"]) == ("waiting", pipeline["id"], "sft")
    assert (sft["user_provided_suffix"], sft["metadata"]) == ("v1", {"team": "x"})
    assert sft["hyperparameters"]["lora_rank"] == 4
    assert sft["queue_position"] is None
    assert [job["id"] for job in client.get(JOBS, params={"status": "waiting"}).json()["data"]] == [
        stage_of(pipeline, name)["job_id"]
        for name in sorted(
            ("sft", "rm", "dpo"), key=lambda name: stage_of(pipeline, name)["job_id"], reverse=True
        )
    ]

    world.finish(world.start(stage_of(pipeline, "pt")["job_id"]))
    after = client.get(path).json()
    assert statuses(after) == {"pt": "succeeded", "sft": "queued", "rm": "waiting", "dpo": "waiting"}
    made = stage_of(after, "pt")["fine_tuned_model"]
    assert stage_of(after, "sft")["model"] == sft["model"] == made

    done = run_through(client, world, pipeline)
    assert done["status"] == "succeeded"
    assert set(statuses(done).values()) == {"succeeded"}
    assert done["finished_at"] >= done["created_at"]
    parents = {model["id"]: model["parent"] for model in client.get("/v1/models").json()["data"]}
    tuned = stage_of(done, "sft")["fine_tuned_model"]
    assert parents[stage_of(done, "dpo")["fine_tuned_model"]] == tuned
    assert (parents[tuned], parents[made]) == (made, "org/base")
    assert client.get(PIPELINES).json() == {"object": "list", "data": [done], "has_more": False}


def test_a_second_run_reuses_what_is_unchanged(client, world, body):
    first = run_through(client, world, create(client, body))

    again = create(client, body)
    assert again["id"] != first["id"]
    assert again["status"] == "succeeded"
    for stage in again["stages"]:
        assert stage == stage_of(first, stage["name"]) | {"reused": True}
    assert not any(stage["reused"] for stage in first["stages"])

    body["stages"][3]["method"] = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}}
    changed = create(client, body)
    assert {stage["name"]: stage["reused"] for stage in changed["stages"]} == {
        "pt": True,
        "sft": True,
        "rm": True,
        "dpo": False,
    }
    assert stage_of(changed, "dpo")["status"] == "queued"


def test_a_failure_and_a_cancellation(client, world, body):
    pipeline = create(client, body)
    path = f"{PIPELINES}/{pipeline['id']}"
    world.finish(world.start(stage_of(pipeline, "pt")["job_id"]))
    world.finish(world.start(stage_of(pipeline, "sft")["job_id"]))
    lease = world.start(stage_of(pipeline, "rm")["job_id"])
    with tasks.fenced(world.database, lease) as session:
        jobs.fail(session, lease, error={"code": "nan_loss", "message": "NaN", "param": None})
    after = client.get(path).json()
    assert (after["status"], statuses(after)["rm"], statuses(after)["dpo"]) == ("queued", "failed", "queued")
    assert stage_of(after, "rm")["error"] == {"code": "nan_loss", "message": "NaN", "param": None}

    cancelled = client.post(f"{path}/cancel").json()
    assert (cancelled["status"], statuses(cancelled)["dpo"]) == ("failed", "cancelled")
    refused = client.post(f"{path}/cancel")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "pipeline_not_cancellable")


def test_a_pipeline_is_made_once_for_a_key(client, body):
    first = create(client, body, **{"idempotency-key": "k"})

    assert create(client, body, **{"idempotency-key": "k"}) == first
    assert len(client.get(PIPELINES).json()["data"]) == 1
    assert len(client.get(JOBS).json()["data"]) == 4


def test_pages(client, body):
    made = [create(client, body | {"name": f"n{number}"})["id"] for number in range(3)]

    page = client.get(PIPELINES, params={"limit": 2}).json()
    assert ([item["id"] for item in page["data"]], page["has_more"]) == (made[:0:-1], True)
    rest = client.get(PIPELINES, params={"after": made[1]}).json()
    assert ([item["id"] for item in rest["data"]], rest["has_more"]) == (made[:1], False)


SUPERVISED = "method.supervised.hyperparameters"


def supervised(**hyperparameters) -> dict:
    return {"method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}}


@pytest.mark.parametrize(
    ("position", "more", "code", "param"),
    [
        (1, {"model": {"stage": "nobody"}}, "unknown_stage", "stages.1.model.stage"),
        (1, {"model": {"stage": "sft"}}, "pipeline_cycle", "stages.1.model.stage"),
        (0, {"model": {"stage": "sft"}}, "pipeline_cycle", "stages.0.model.stage"),
        (3, {"model": {"stage": "rm"}}, "model_not_trainable", "stages.3.model.stage"),
        (3, {"name": "pt"}, "invalid_value", "stages.3.name"),
        (3, {"name": "a b"}, "invalid_value", "stages.3.name"),
        (0, {"model": "nobody/knows"}, "model_not_found", "stages.0.model"),
        (0, {"model": 7}, "invalid_value", "stages.0.model"),
        (0, {"model": {"stage": "pt", "more": 1}}, "invalid_value", "stages.0.model"),
        (2, {"training_file": "file-x"}, "not_found", "stages.2.training_file"),
        (2, {"validation_file": "file-x"}, "not_found", "stages.2.validation_file"),
        (1, {"method": {"type": "dreaming"}}, "unsupported_value", "stages.1.method.type"),
        (1, {"method": {"type": "dpo"}}, "invalid_training_file", "stages.1.training_file"),
        (
            1,
            supervised(n_epochs=51),
            "invalid_value",
            f"stages.1.{SUPERVISED}.n_epochs",
        ),
        (
            1,
            supervised(lora_rank={"stage": "pt"}),
            "invalid_value",
            f"stages.1.{SUPERVISED}.lora_rank",
        ),
        (
            1,
            supervised(reward_model={"stage": "rm"}),
            "unknown_parameter",
            f"stages.1.{SUPERVISED}.reward_model",
        ),
        (1, {"seed": -1}, "invalid_value", "stages.1.seed"),
        (1, {"seeds": 1}, "unknown_parameter", "stages.1.seeds"),
    ],
)
def test_refusals_name_the_place_and_leave_nothing(client, world, body, position, more, code, param):
    body["stages"][position] |= more
    answer = client.post(PIPELINES, json=body)

    assert answer.status_code == 400, answer.text
    told = answer.json()["error"]
    assert (told["code"], told["param"]) == (code, param), told
    with world.database.read() as session:
        assert session.scalar(select(func.count()).select_from(Pipeline)) == 0
        assert session.scalar(select(func.count()).select_from(Job)) == 0


def test_the_number_of_stages(client, body):
    template = body["stages"][0]
    for count in (0, 17):
        stages = [template | {"name": f"s{number}"} for number in range(count)]
        told = client.post(PIPELINES, json={"name": "n", "stages": stages}).json()["error"]
        assert (told["code"], told["param"]) == ("invalid_value", "stages")
    stages = [template | {"name": f"s{number}"} for number in range(16)]
    assert len(create(client, {"name": "n", "stages": stages})["stages"]) == 16


def test_reinforcement_learning_takes_the_reward_model_of_a_stage(client, world, body):
    prompts = world.file(kind="prompt")
    reward_model = {"stage": "rm"}
    rl = {"name": "rl", "model": {"stage": "sft"}, "training_file": prompts}
    rl["method"] = {"type": "ppo", "ppo": {"hyperparameters": {"reward_model_name_or_path": reward_model}}}
    body["stages"][3] = rl
    pipeline = create(client, body)
    assert statuses(pipeline)["rl"] == "waiting"

    for name in ("pt", "sft", "rm"):
        assert statuses(client.get(f"{PIPELINES}/{pipeline['id']}").json())["rl"] == "waiting"
        world.finish(world.start(stage_of(pipeline, name)["job_id"]))

    after = client.get(f"{PIPELINES}/{pipeline['id']}").json()
    job = client.get(f"{JOBS}/{stage_of(after, 'rl')['job_id']}").json()
    hyperparameters = job["method"]["ppo"]["hyperparameters"]
    assert hyperparameters["reward_model"] == stage_of(after, "rm")["fine_tuned_model"]
    assert job["model"] == stage_of(after, "sft")["fine_tuned_model"]
    assert job["status"] == "queued"

    path = "stages.3.method.ppo.hyperparameters.reward_model"
    for judge, code, param in (
        ({"stage": "pt"}, "not_a_reward_model", f"{path}.stage"),
        ("org/base", "not_a_reward_model", path),
        ("nobody/knows", "model_not_found", path),  # although the stage has to wait for its model
        (None, "missing_required_parameter", path),
    ):
        rl["method"]["ppo"]["hyperparameters"] = {"reward_model": judge}
        told = client.post(PIPELINES, json=body).json()["error"]
        assert (told["code"], told["param"]) == (code, param)


# --- the command line ---------------------------------------------------------------------------------------


YAML = """
name: medical
stages:
  - {name: pt, model: org/base, training_file: file-1, method: {type: pretraining}}
  - name: sft
    model: {stage: pt}
    training_file: file-2
"""
STAGES = [
    {"name": "pt", "status": "succeeded", "job_id": "ftjob-1", "reused": True, "model": "org/base",
     "fine_tuned_model": "ft:1", "error": None},
    {"name": "sft", "status": "running", "job_id": "ftjob-2", "reused": False, "model": "ft:1",
     "fine_tuned_model": None, "error": None},
]  # fmt: skip
SHOWN = {
    "id": "pipe-1",
    "name": "medical",
    "status": "running",
    "created_at": 1700000000,
    "finished_at": None,
    "stages": STAGES,
}


@pytest.fixture
def peer(monkeypatch):
    with serve() as peer:
        monkeypatch.setenv("RESIDENCY_URL", peer.url)
        monkeypatch.setenv("RESIDENCY_API_KEY", "sk-test")
        monkeypatch.setattr("api.client.POLL_EVERY_S", 0.001)
        yield peer


@pytest.fixture
def written(tmp_path) -> Path:
    path = tmp_path / "pipeline.yaml"
    path.write_text(YAML)
    return path


def ended(status: str, **more) -> dict:
    last = STAGES[1] | {"status": status} | more
    return SHOWN | {"status": status, "finished_at": 1700000060, "stages": [STAGES[0], last]}


def test_run_submits_the_file(peer, written):
    peer.answers("POST /v1/pipelines", SHOWN)
    result = run("run", str(written))

    assert (result.exit_code, result.stdout) == (0, "pipe-1\n")
    assert peer.requests[0].json() == {
        "name": "medical",
        "stages": [
            {
                "name": "pt",
                "model": "org/base",
                "training_file": "file-1",
                "method": {"type": "pretraining"},
            },
            {"name": "sft", "model": {"stage": "pt"}, "training_file": "file-2"},
        ],
    }
    assert json.loads(run("run", str(written), "--json").stdout) == SHOWN


def test_files_named_by_their_paths_are_uploaded_once(peer, tmp_path):
    path = tmp_path / "pipeline.yaml"
    path.write_text(
        YAML.replace("file-1", "rows.txt").replace("file-2", "rows.txt\n    validation_file: file-3")
    )
    (tmp_path / "rows.txt").write_text("Aspirin.")
    peer.answers("PUT /v1/files", {"id": "file-9"})
    peer.answers("POST /v1/pipelines", SHOWN)
    assert run("run", str(path)).exit_code == 0
    uploads = [request for request in peer.requests if request.path.startswith("/v1/files?")]
    assert len(uploads) == 1
    assert uploads[0].body == b"Aspirin."
    stages = peer.requests[-1].json()["stages"]
    assert [stage["training_file"] for stage in stages] == ["file-9", "file-9"]
    assert stages[1]["validation_file"] == "file-3"


def test_run_follows_to_the_end(peer, written):
    peer.answers("POST /v1/pipelines", SHOWN)
    peer.answers(
        "GET /v1/pipelines/pipe-1", SHOWN, Answer({}, 503), ended("succeeded", fine_tuned_model="ft:2")
    )
    result = run("run", str(written), "--follow")

    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "pipe-1"
    assert [line.split("  ", 1)[1] for line in lines[1:]] == [
        "pt succeeded (reused): ft:1",
        "sft running",
        "sft succeeded: ft:2",
    ]


def test_a_pipeline_that_fails_ends_in_status_1(peer, written):
    failure = {"code": "nan_loss", "message": "The loss is not a number.", "param": None}
    peer.answers("POST /v1/pipelines", SHOWN)
    peer.answers("GET /v1/pipelines/pipe-1", ended("failed", error=failure))
    result = run("run", str(written), "-f")

    assert result.exit_code == 1
    assert "sft failed: The loss is not a number." in result.stdout
    assert "pipe-1 failed" in result.stderr


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [\n", "1: a\n", "\x00"])
def test_a_file_that_is_no_pipeline(peer, tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    result = run("run", str(path))

    assert result.exit_code == 1
    assert "bad.yaml" in result.stderr
    assert peer.requests == []


def test_a_key_of_a_file_is_never_taken_for_ours(peer, tmp_path):
    path = tmp_path / "odd.yaml"
    path.write_text("path: x\nself: y\n")
    peer.answers("POST /v1/pipelines", error(400, "Unknown parameter: 'path'.", param="path"))

    assert "Unknown parameter: 'path'." in run("run", str(path)).stderr
    assert peer.requests[0].json() == {"path": "x", "self": "y"}


def test_refusals_of_a_file_name_the_place(peer, written):
    peer.answers("POST /v1/pipelines", error(400, "No.", param="stages.1.model.stage"))
    result = run("run", str(written))

    assert result.exit_code == 1
    assert "No. (stages.1.model.stage)" in result.stderr


def test_list_show_and_cancel(peer):
    peer.answers("GET /v1/pipelines", {"data": [SHOWN], "has_more": False})
    peer.answers("GET /v1/pipelines/pipe-1", SHOWN)
    peer.answers("POST /v1/pipelines/pipe-1/cancel", ended("cancelled"))

    listed = run("pipelines", "list").stdout
    assert "pipe-1" in listed
    assert "1/2" in listed
    shown = run("pipelines", "show", "pipe-1").stdout
    assert "ftjob-2" in shown
    assert "reused" in shown
    assert json.loads(run("pipelines", "show", "pipe-1", "--json").stdout) == SHOWN
    assert run("pipelines", "cancel", "pipe-1").stdout == "pipe-1  cancelled\n"
