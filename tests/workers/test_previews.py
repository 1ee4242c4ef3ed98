"""Questions about files, answered by real trainer processes."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from db import blobs, files, previews, recovery, tasks, upkeep
from db.models import Model, Preview
from db.session import Database
from db.settings import DatabaseSettings
from db.work_models import Attempt, Task
from tests.db.world import World
from tests.tiny import chat_rows
from tests.workers.test_hub import jsonl
from workers import previews as runner
from workers import processes
from workers.ring import _RUNNERS
from workers.settings import WorkerSettings


@pytest.fixture
def database(sqlite_database: Database) -> Database:
    return sqlite_database


@pytest.fixture
def settings(world: World, monkeypatch: pytest.MonkeyPatch) -> WorkerSettings:
    monkeypatch.setenv("RESIDENCY_HOME", str(world.home))
    return WorkerSettings(heartbeat_s=0.1)


@pytest.fixture
def model(world: World, tiny_model: Path) -> Model:
    return world.add_model("tiny", path=str(tiny_model))


def ask(
    world: World, model: Model, *, kind: Any = "rows", file_id: str | None = None, **asked: Any
) -> Preview:
    file_id = file_id or world.add_file(jsonl(chat_rows(4)))
    wanted = {"layout": {}, "method": "supervised", "hyperparameters": {}} | asked
    with world.database.write() as session:
        file = files.get(session, file_id, org_id=world.org_id)
        key = previews.name_question(kind, file, model, asked=wanted)
        return previews.ask(session, key, kind=kind, file=file, model=model, asked=wanted)


def look(world: World, preview: Preview) -> Preview | None:
    with world.database.read() as session:
        return session.get(Preview, preview.id)


def answer_of(world: World, preview: Preview) -> dict[str, Any]:
    found = look(world, preview)
    assert found is not None
    assert found.answer is not None
    return found.answer


@pytest.mark.long
def test_rows_are_shown(world: World, model: Model, settings: WorkerSettings) -> None:
    preview = ask(world, model, rows=[4], hyperparameters={"max_length": 80, "chat_template": "chatml"})
    lease = world.take("cpu")
    assert (lease.kind, lease.subject_id) == ("preview", preview.id)
    _RUNNERS[lease.kind](world.database, lease, settings)

    answer = answer_of(world, preview)
    (row,) = answer["rows"]
    assert (answer["hyperparameters"]["max_length"], row["row"], row["used"]) == (80, 4, True)
    said = "".join(token["text"] for token in row["texts"][0]["tokens"] if token["trained"])
    assert said == chat_rows(4)[3]["messages"][1]["content"] + "<|im_end|>"
    assert world.task(preview.id, "preview").status == "closed"
    assert list((world.home / "scratch").iterdir()) == []


@pytest.mark.long
def test_tokens_are_counted(world: World, model: Model, settings: WorkerSettings) -> None:
    preview = ask(world, model, kind="tokens")
    runner.run(world.database, world.take("cpu"), settings)
    answer = answer_of(world, preview)
    assert (answer["rows"], answer["examples"], answer["refused"]) == (4, 4, 0)


@pytest.mark.long
def test_what_is_wrong_with_the_data_is_an_answer(
    world: World, model: Model, settings: WorkerSettings
) -> None:
    preview = ask(world, model, rows=[9])
    runner.run(world.database, world.take("cpu"), settings)
    assert answer_of(world, preview)["error"]["param"] == "row"


@pytest.mark.parametrize("kind", ["rows", "tokens"])
def test_bytes_that_have_changed_are_not_looked_at(
    world: World, model: Model, settings: WorkerSettings, kind: str
) -> None:
    """What a job says of them is the answer, and only until the file may have been uploaded again (G20)."""
    preview = ask(world, model, kind=kind)
    path = blobs.path_of(DatabaseSettings().blobs_dir, preview.org_id, preview.sha256)
    path.write_bytes(path.read_bytes().replace(b"fever", b"Fever", 1))
    runner.run(world.database, world.take("cpu"), settings)
    error = answer_of(world, preview)["error"]
    assert error["code"] == "content_corrupt"
    assert f"the stored bytes of {preview.sha256} have changed on the disk" in error["message"]
    found = look(world, preview)
    assert found is not None
    assert found.expires_at - found.created_at < previews.KEPT_S


def test_a_process_that_breaks_is_tried_again_and_then_told(
    world: World, model: Model, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_MODULES", {"rows": "trainers.there_is_none"})
    preview = ask(world, model)
    for status in ("queued", "closed"):
        world.skip_delays()
        runner.run(world.database, world.take("cpu"), settings)
        assert world.task(preview.id, "preview").status == status
    assert answer_of(world, preview)["error"]["code"] == previews.FAILED_CODE


def test_one_that_takes_too_long_is_ended(world: World, model: Model, settings: WorkerSettings) -> None:
    preview = ask(world, model)
    lease = world.take("cpu")
    runner.run(world.database, lease, settings.model_copy(update={"preview_limit_s": 0.0}))
    assert answer_of(world, preview)["error"]["code"] == "preview_too_long"
    assert [attempt.outcome for attempt in world.attempts(preview.id, "preview")] == ["done"]
    marker = processes.marker_of(world.database.url, lease.kind, lease.subject_id, lease.token)
    assert processes.carrying(marker) == []


def test_one_whose_workers_die_is_told(world: World, model: Model) -> None:
    preview = ask(world, model)
    for _ in range(2):
        world.expire(world.take("cpu"))
        recovery.reap(world.database, ttl_s=60)
    assert answer_of(world, preview)["error"]["code"] == previews.FAILED_CODE


@pytest.mark.parametrize("gone", ["file", "model"])
def test_a_question_about_what_is_gone_is_dropped(
    world: World, model: Model, settings: WorkerSettings, gone: str
) -> None:
    file_id = world.add_file(jsonl(chat_rows(4)))
    preview = ask(world, model, file_id=file_id)
    if gone == "file":
        world.delete_file(file_id)
    else:
        world.run(update(Model).where(Model.pk == model.pk).values(deleted_at=1.0))
    runner.run(world.database, world.take("cpu"), settings)
    assert look(world, preview) is None
    assert world.task(preview.id, "preview").status == "closed"


def test_old_answers_go_with_the_traces_of_their_work(world: World, model: Model) -> None:
    old, kept = ask(world, model, rows=[1]), ask(world, model, rows=[2])
    for preview in (old, kept):
        with tasks.fenced(world.database, lease := world.take("cpu")) as session:
            tasks.finish(session, lease, outcome="done")
            previews.record(session, preview.id, {"rows": []})
    world.run(update(Preview).where(Preview.id == old.id).values(expires_at=1.0))
    world.run(update(Task).where(Task.subject_id == old.id).values(created_at=1.0))

    upkeep.run(world.database, DatabaseSettings(home=world.home))

    assert (look(world, old), look(world, kept) is None) == (None, False)
    with world.database.read() as session:
        assert {task.subject_id for task in session.query(Task).where(Task.kind == "preview")} == {kept.id}
        assert session.query(Attempt).count() == 1
