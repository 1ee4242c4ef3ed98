"""Waiting for a job: long polls and event streams, over a real server, and what they cost."""

import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from sqlalchemy import event as hooks
from sqlalchemy import text

from api.main import create_app
from db import events, jobs, tasks
from db.models import Job
from db.new_jobs import NewJob
from tests.stack import wait_for

JOBS = "/v1/fine_tuning/jobs"
TICK_S = 0.02
POLL = "max(events.seq)"
on_both = pytest.mark.parametrize("database", ["sqlite", "postgres"], indirect=True)


@pytest.fixture(autouse=True)
def fast_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.watch._TICK_S", TICK_S)


@pytest.fixture
def app(world):
    return create_app(world.settings, world.database)


@pytest.fixture
def remote(app, serve, world) -> Iterator[httpx.Client]:
    """A client of the app behind a real server."""
    with serve(app) as address, connect(address, world) as client:
        yield client


def connect(address: str, world, **more: Any) -> httpx.Client:
    headers = {"authorization": f"Bearer {world.user}"}
    return httpx.Client(base_url=address, headers=headers, trust_env=False, timeout=20, **more)


@pytest.fixture
def job_id(world) -> str:
    """A queued job, with three events."""
    new = NewJob(
        model=world.base_model(),
        training_file=world.file(),
        validation_file=None,
        method="supervised",
        spec_version=1,
        spec={"method": {"type": "supervised", "supervised": {"hyperparameters": {}}}},
        resources={"nproc_per_node": 1},
        seed=1,
    )
    with world.database.write() as session:
        return jobs.create(session, new, org_id="org-default").id


def tell(world, job_id: str, *messages: str) -> None:
    for message in messages:
        with world.database.write() as session:
            events.add(session, session.get_one(Job, job_id), message)


def fail(world, lease) -> None:
    with tasks.fenced(world.database, lease) as session:
        jobs.fail(session, lease, error={"code": "nan_loss", "message": "NaN", "param": None})


def listed(client: httpx.Client, job_id: str) -> list[dict]:
    return client.get(f"{JOBS}/{job_id}/events?order=asc&limit=1000").json()["data"]


@contextmanager
def stream(client: httpx.Client, job_id: str, last_id: str | None = None) -> Iterator[Iterator[str]]:
    """The lines of a stream."""
    headers = {} if last_id is None else {"last-event-id": last_id}
    with client.stream("GET", f"{JOBS}/{job_id}/events/stream", headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        yield answer.iter_lines()


def frames(lines: Iterator[str]) -> Iterator[dict]:
    """The events of a stream, up to `[DONE]`; fails when it ends without."""
    frame_id = None
    for line in lines:
        if line.startswith("id: "):
            frame_id = line.removeprefix("id: ")
        elif line == "data: [DONE]":
            assert next(lines) == ""
            assert list(lines) == []
            return
        elif line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            assert event["id"] == frame_id
            yield event
        else:
            assert line == "" or line.startswith(":")
    pytest.fail("the stream ended without [DONE]")


def take(iterator: Iterator[dict], count: int) -> list[dict]:
    return [next(iterator) for _ in range(count)]


# --- streams ------------------------------------------------------------------------------------------------


@on_both
def test_a_stream_tells_everything_once_and_ends_with_the_job(remote, world, job_id):
    url = f"{JOBS}/{job_id}/events/stream"
    with remote.stream("GET", url) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        told = frames(answer.iter_lines())
        received = take(told, 3)
        lease = world.start(job_id)
        received += take(told, 1)
        assert received[-1]["message"] == "Fine-tuning job started"
        tell(world, job_id, "A line\nand \u2028 another")
        received += take(told, 1)
        fail(world, lease)
        received += list(told)
    assert received == listed(remote, job_id)
    assert received[-1]["data"]["status"] == "failed"
    with stream(remote, job_id) as lines:
        assert list(frames(lines)) == received
    with stream(remote, job_id, received[-1]["id"]) as lines:
        assert list(frames(lines)) == []
    with remote.stream("GET", url, params={"after": received[1]["id"]}) as answer:
        assert list(frames(answer.iter_lines())) == received[2:]


@on_both
def test_no_gap_and_no_repeat_across_reconnects_and_a_restart(world, serve, job_id):
    """Events come all the time, more than a batch of them; the reader goes away after every few."""
    lease = world.start(job_id)
    writer = threading.Thread(target=tell, args=(world, job_id, *(f"event {n}" for n in range(320))))
    writer.start()
    received: list[dict] = []
    for count in (1, 2, 40, 150):
        with serve(create_app(world.settings, world.database)) as address, connect(address, world) as client:
            for part in (count - count // 2, count // 2):
                with stream(client, job_id, received[-1]["id"] if received else None) as lines:
                    received += take(frames(lines), part)
    writer.join()
    fail(world, lease)
    with serve(create_app(world.settings, world.database)) as address, connect(address, world) as client:
        with stream(client, job_id, received[-1]["id"]) as lines:
            received += list(frames(lines))
        assert received == listed(client, job_id)
    assert len(received) == 3 + 1 + 320 + 1


def test_refusals_come_before_the_stream(remote, job_id, as_stranger):
    url = f"{JOBS}/{job_id}/events/stream"
    assert remote.get(f"{JOBS}/ftjob-unknown/events/stream").status_code == 404
    assert remote.get(url, headers=as_stranger).status_code == 404
    unknown = remote.get(url, headers={"last-event-id": "ftevent-unknown"})
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "Last-Event-ID")
    unknown = remote.get(url, params={"after": "ftevent-unknown"})
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "after")


def test_silence_is_filled_with_pings(remote, job_id, monkeypatch):
    monkeypatch.setattr("api.event_stream.PING_S", 0.05)
    with stream(remote, job_id) as lines:
        take(frames(lines), 3)
        assert [next(lines) for _ in range(5)] == ["", ": ping", "", ": ping", ""]


def test_whoever_leaves_is_not_waited_for(remote, app, job_id):
    with stream(remote, job_id) as lines:
        take(frames(lines), 3)
        wait_for(lambda: app.state.watch.waiting == 1, within_s=5, what="the stream to wait")
    wait_for(lambda: app.state.watch.waiting == 0, within_s=5, what="the stream to be forgotten")
    with pytest.raises(httpx.ReadTimeout):
        remote.get(f"{JOBS}/{job_id}?wait=60", timeout=0.5)
    wait_for(lambda: app.state.watch.waiting == 0, within_s=5, what="the long poll to be forgotten")


# --- the log as a stream ------------------------------------------------------------------------------------


@pytest.fixture
def log_of(world, job_id):
    """Appends to the log of an attempt."""

    def append(attempt: int, text: bytes) -> None:
        folder = world.settings.runs_dir / job_id / str(attempt)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("ab") as log:
            log.write(text)

    return append


@contextmanager
def log_stream(client: httpx.Client, job_id: str, last_id: str | None = None) -> Iterator[Iterator[str]]:
    headers = {} if last_id is None else {"last-event-id": last_id}
    with client.stream("GET", f"{JOBS}/{job_id}/logs/stream", headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["x-accel-buffering"] == "no"
        yield answer.iter_lines()


def log_frames(lines: Iterator[str]) -> Iterator[tuple[str, int, str]]:
    """(id, attempt, text) of each frame, up to `[DONE]`; fails when the stream ends without."""
    frame_id = ""
    for line in lines:
        if line.startswith("id: "):
            frame_id = line.removeprefix("id: ")
        elif line == "data: [DONE]":
            assert list(lines) == [""]
            return
        elif line.startswith("data: "):
            said = json.loads(line.removeprefix("data: "))
            yield frame_id, said["attempt"], said["text"]
        else:
            assert line == "" or line.startswith(":")
    pytest.fail("the stream ended without [DONE]")


@on_both
def test_the_log_is_told_as_it_is_written_attempt_after_attempt(remote, world, job_id, log_of):
    with log_stream(remote, job_id) as lines:
        told = log_frames(lines)
        lease = world.start(job_id)
        log_of(1, "one € \u2028\n".encode() + "€".encode()[:2])
        first = next(told)
        assert first[1:] == (1, "one € \u2028\n")  # of a character only the whole
        log_of(1, "€".encode()[2:] + b" two\n")
        second = next(told)
        assert second[1:] == (1, "€ two\n")
        log_of(2, b"again\n")
        third = next(told)
        assert third[1:] == (2, "again\n")
        log_of(2, b"last words\n")
        fail(world, lease)
        rest = list(told)
    assert "".join(text for _, _, text in rest) == "last words\n"
    with log_stream(remote, job_id, first[0]) as lines:  # from the middle of the first attempt
        again = list(log_frames(lines))
    assert [(attempt, text) for _, attempt, text in again] == [(1, "€ two\n"), (2, "again\nlast words\n")]
    with log_stream(remote, job_id, again[-1][0]) as lines:
        assert list(log_frames(lines)) == []


def test_a_long_log_comes_in_pieces_and_whole(remote, world, job_id, log_of):
    lease = world.start(job_id)
    text = "".join(f"{n} ä\n" for n in range(300_000))
    log_of(1, text.encode())
    fail(world, lease)
    with log_stream(remote, job_id) as lines:
        pieces = list(log_frames(lines))
    assert len(pieces) > 1
    assert "".join(piece for _, _, piece in pieces) == text
    with log_stream(remote, job_id, pieces[0][0]) as lines:
        assert list(log_frames(lines)) == pieces[1:]


@pytest.mark.parametrize("last_id", ["ftevent-1", "1", "1:x", "-1:0", "1:0:0", ":", "9" * 30 + ":1"])
def test_a_place_that_no_frame_had_is_refused(remote, job_id, last_id):
    answer = remote.get(f"{JOBS}/{job_id}/logs/stream", headers={"last-event-id": last_id})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Last-Event-ID")


def test_the_log_of_a_stranger_is_not_there(remote, job_id, as_stranger):
    assert remote.get(f"{JOBS}/ftjob-unknown/logs/stream").status_code == 404
    assert remote.get(f"{JOBS}/{job_id}/logs/stream", headers=as_stranger).status_code == 404


def test_a_silent_log_is_filled_with_pings(remote, job_id, monkeypatch):
    monkeypatch.setattr("api.event_stream.PING_S", 0.05)
    monkeypatch.setattr("api.log_stream._LOOK_EVERY_S", 0.05)
    with log_stream(remote, job_id) as lines:
        assert [next(lines) for _ in range(4)] == [": ping", "", ": ping", ""]


# --- what watching costs ------------------------------------------------------------------------------------


@dataclass
class Statements:
    """What the database is asked."""

    all: list[str] = field(default_factory=list)

    @property
    def polls(self) -> int:
        return sum(POLL in statement for statement in self.all)


@pytest.fixture
def statements(world) -> Iterator[Statements]:
    seen = Statements()

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.all.append(statement)

    hooks.listen(world.database.engine, "before_cursor_execute", note)
    yield seen
    hooks.remove(world.database.engine, "before_cursor_execute", note)


def test_a_hundred_streams_cost_one_query_a_tick(remote, app, world, job_id, statements):
    limits = httpx.Limits(max_connections=None)
    with ExitStack() as stack:
        client = stack.enter_context(connect(str(remote.base_url), world, limits=limits))
        told = [frames(stack.enter_context(stream(client, job_id))) for _ in range(100)]
        for each in told:
            take(each, 3)
        wait_for(lambda: app.state.watch.waiting == 100, within_s=20, what="all streams to wait")
        assert world.database.engine.pool.checkedout() <= 1  # the poller's
        statements.all.clear()
        began = time.monotonic()
        wait_for(lambda: statements.polls >= 5, within_s=10, what="five queries")
        during = list(statements.all)
        assert statements.polls <= (time.monotonic() - began) / TICK_S + 1
        assert {statement for statement in during if POLL not in statement} <= {"BEGIN"}
        tell(world, job_id, "for all")
        assert {take(each, 1)[0]["message"] for each in told} == {"for all"}


def test_nobody_watches_nothing_is_asked(remote, app, job_id, statements, monkeypatch):
    monkeypatch.setattr("api.watch._TICK_S", 0.001)

    def polls_during_some_requests() -> int:
        statements.all.clear()
        for _ in range(50):
            remote.get("/v1/models")
        return statements.polls

    assert polls_during_some_requests() == 0
    with stream(remote, job_id):
        wait_for(lambda: app.state.watch.waiting == 1, within_s=5, what="the stream to wait")
        assert polls_during_some_requests() > 0
    wait_for(lambda: app.state.watch.waiting == 0, within_s=5, what="the stream to be forgotten")
    remote.get("/v1/models")
    polls_during_some_requests()
    assert polls_during_some_requests() == 0


def test_a_database_that_fails_for_a_while_is_asked_again(remote, app, world, job_id, caplog):
    caplog.set_level(logging.WARNING, logger="api.watch")
    with stream(remote, job_id) as lines:
        told = frames(lines)
        take(told, 3)
        wait_for(lambda: app.state.watch.waiting == 1, within_s=5, what="the stream to wait")
        with world.database.write() as session:
            session.execute(text("ALTER TABLE events RENAME TO away"))
        wait_for(lambda: "cannot look for news" in caplog.text, within_s=5, what="the failure")
        with world.database.write() as session:
            session.execute(text("ALTER TABLE away RENAME TO events"))
        tell(world, job_id, "back again")
        assert take(told, 1)[0]["message"] == "back again"


# --- the end of the server ----------------------------------------------------------------------------------


def test_a_server_told_to_stop_ends_its_streams_at_once(world, job_id):
    """A process of its own, told by the signal, with no time limit that would cut them."""
    environment = {
        "RESIDENCY_HOME": str(world.settings.home_dir),
        "RESIDENCY_DATABASE_URL": world.database.url,
        "RESIDENCY_KEY_PEPPER": world.settings.key_pepper.get_secret_value(),
    }
    with socket.create_server(("127.0.0.1", 0)) as listener:
        argv = ["uvicorn", "--factory", "api.main:create_app", "--fd", str(listener.fileno())]
        server = subprocess.Popen(
            [sys.executable, "-m", *argv], env=os.environ | environment, pass_fds=[listener.fileno()]
        )
        host, port = listener.getsockname()
        polling = http.client.HTTPConnection(host, port, timeout=20)
        try:
            with connect(f"http://{host}:{port}", world) as client, stream(client, job_id) as lines:
                take(frames(lines), 3)
                polling.request("GET", f"{JOBS}/{job_id}?wait=60", headers=dict(client.headers))
                client.get(f"{JOBS}/{job_id}?wait=0.2")  # sent later, so the other is being waited for
                told_at = time.monotonic()
                server.send_signal(signal.SIGTERM)
                assert [line for line in lines if line] == []
                assert b'"status":"queued"' in polling.getresponse().read()
                assert server.wait(timeout=10) in (0, -signal.SIGTERM)
                assert time.monotonic() - told_at < 5
        finally:
            polling.close()
            server.kill()
            server.wait()


# --- long polls ---------------------------------------------------------------------------------------------


@on_both
def test_a_long_poll_answers_when_the_status_changes(remote, app, world, job_id):
    with ThreadPoolExecutor() as threads:
        polling = threads.submit(remote.get, f"{JOBS}/{job_id}?wait=15")
        wait_for(lambda: app.state.watch.waiting == 1, within_s=5, what="the long poll to wait")
        assert world.database.engine.pool.checkedout() <= 1  # the poller's
        lease = world.start(job_id)
        assert polling.result().json()["status"] == "running"

        began = time.monotonic()
        polling = threads.submit(remote.get, f"{JOBS}/{job_id}?wait=15")
        wait_for(lambda: app.state.watch.waiting == 1, within_s=5, what="the long poll to wait")
        tell(world, job_id, "news, but no other status")
        fail(world, lease)
        assert polling.result().json()["status"] == "failed"
        assert remote.get(f"{JOBS}/{job_id}?wait=15").json()["status"] == "failed"
        assert time.monotonic() - began < 10


def test_a_long_poll_ends_in_time(remote, job_id):
    began = time.monotonic()
    assert remote.get(f"{JOBS}/{job_id}?wait=0.3").json()["status"] == "queued"
    assert 0.3 <= time.monotonic() - began < 10


@pytest.mark.parametrize("wait", ["-1", "60.5", "nan", "inf", "long"])
def test_times_that_cannot_be_waited_for(client, job_id, wait):
    answer = client.get(f"{JOBS}/{job_id}?wait={wait}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "wait")


def test_nobody_waits_for_unknown_jobs(client, as_stranger, job_id):
    assert client.get(f"{JOBS}/ftjob-unknown?wait=60").status_code == 404
    assert client.get(f"{JOBS}/{job_id}?wait=60", headers=as_stranger).status_code == 404
