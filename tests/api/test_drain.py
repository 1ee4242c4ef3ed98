"""The API told to stop under load ends what it has begun, and does nothing that nobody is told of (G13)."""

import http.client
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select

from db.models import File, Job
from tests.api.conftest import ROWS, bearer
from tests.deploy.compose import Deployment
from tests.stack import wait_for

pytestmark = pytest.mark.long
JOBS = "/v1/fine_tuning/jobs"
DRAIN_S = 10
on_postgres = pytest.mark.parametrize("database", ["postgres"], indirect=True)


@dataclass
class Load:
    """Clients that send one job after another, each with or without a connection for every job."""

    port: int
    key: str
    body: bytes
    keep: bool
    answered: list[str] = field(default_factory=list)
    unanswered: list[float] = field(default_factory=list)  # when each of them was sent

    def send_until_refused(self) -> None:
        """Ends when nobody listens any more."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = bearer(self.key) | {"content-type": "application/json"}
        while True:
            sent_at = time.monotonic()
            try:
                connection.request("POST", JOBS, self.body, headers)
                answer = connection.getresponse()
                text = answer.read()
            except ConnectionRefusedError:
                return
            except (ConnectionError, http.client.BadStatusLine):
                self.unanswered.append(sent_at)
                connection.close()
                continue
            assert answer.status == 200, text
            self.answered.append(json.loads(text)["id"])
            if not self.keep:
                connection.close()


@pytest.fixture
def api(world, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The API as docker-compose.yml starts it, two processes, on the world's database; and its port."""
    deployment = Deployment(tmp_path)
    environment = deployment.environment("api") | {
        "RESIDENCY_HOME": str(world.settings.home_dir),
        "RESIDENCY_DATABASE_URL": world.database.url,
        "RESIDENCY_DATABASE_PASSWORD": "",
        "RESIDENCY_KEY_PEPPER": world.settings.key_pepper.get_secret_value(),
        "RESIDENCY_REDIS_URL": os.environ["RESIDENCY_REDIS_URL"],
    }
    process = subprocess.Popen(deployment.command("api"), env=environment, start_new_session=True)
    try:
        deployment.processes["api"] = process
        wait_for(lambda: deployment.is_healthy("api"), within_s=100, what="the API", every_s=0.5)
        yield process, deployment.ports["8700"]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def half_of_an_upload(port: int, key: str) -> http.client.HTTPConnection:
    """A file of which the second half is still to come."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest("PUT", "/v1/files?filename=slow.jsonl&purpose=fine-tune")
    for name, value in (bearer(key) | {"content-length": str(2 * len(ROWS))}).items():
        connection.putheader(name, value)
    connection.endheaders(ROWS)
    return connection


@on_postgres
def test_told_to_stop_under_load_it_answers_all_that_it_has_begun(api, world):
    process, port = api
    body = json.dumps({"model": world.base_model(), "training_file": world.file()}).encode()
    loads = [Load(port, world.user, body, keep) for keep in (True, True, False, False)]
    threads = [threading.Thread(target=load.send_until_refused) for load in loads]
    client = httpx.Client(
        base_url=f"http://127.0.0.1:{port}", headers=bearer(world.user), trust_env=False, timeout=60
    )
    with client:
        job_id = client.post(JOBS, content=body, headers={"content-type": "application/json"}).json()["id"]
        with client.stream("GET", f"{JOBS}/{job_id}/events/stream") as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("id: ")
            upload = half_of_an_upload(port, world.user)
            for thread in threads:
                thread.start()
            wait_for(lambda: all(len(load.answered) > 5 for load in loads), within_s=60, what="the load")
            told_at = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line.startswith("data: [DONE]")] == []  # ends, and whole
            for byte in ROWS:  # a slow client, with a good second of sending before it
                upload.send(bytes([byte]))
                time.sleep(0.02)
            answer = upload.getresponse()
            assert answer.status == 200, answer.read()
            file_id = json.loads(answer.read())["id"]
            upload.close()
    assert process.wait(timeout=DRAIN_S) in (0, -signal.SIGTERM)
    assert time.monotonic() - told_at < DRAIN_S
    for thread in threads:
        thread.join()
    # Who comes later may be sent away, but nothing is done for them.
    assert all(sent_at > told_at for load in loads for sent_at in load.unanswered)
    told_of = {job_id, *(known for load in loads for known in load.answered)}
    with world.database.read() as session:
        assert set(session.scalars(select(Job.id))) == told_of
        assert session.get(File, file_id) is not None
