"""/metrics: who may read it, and what it says when parts are away (G36)."""

import zlib
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from api.main import create_app
from db.session import Database

TOKEN = "scrape-" + "t" * 40


def read(client: TestClient, key: str) -> dict[str, float]:
    answer = client.get("/metrics", headers={"authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        "".join([sample.name, *sorted(sample.labels.values())]): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


@pytest.fixture
def with_token(world) -> TestClient:
    settings = world.settings.model_copy(update={"metrics_token": SecretStr(TOKEN)})
    with TestClient(create_app(settings, world.database)) as client:
        yield client


@pytest.mark.parametrize(("who", "status"), [("user", 403), ("stranger", 403), ("admin", 200)])
def test_keys_of_the_hosts_admins_open_it(client, world, who: str, status: int) -> None:
    key = getattr(world, who)
    assert client.get("/metrics", headers={"authorization": f"Bearer {key}"}).status_code == status


def test_nobody_else_gets_in(client, with_token) -> None:
    for one in (client, with_token):
        assert one.get("/metrics", headers={"authorization": ""}).status_code == 401
        assert one.get("/metrics", headers={"authorization": "Bearer scrape"}).status_code == 401
        assert one.get("/metrics", headers={"authorization": "Bearer "}).status_code == 401


def test_the_token_opens_it_and_nothing_else(with_token) -> None:
    assert read(with_token, TOKEN)["residency_database_up"] == 1
    answer = with_token.get("/v1/models", headers={"authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 401


def test_requests_are_counted_by_route(client, world) -> None:
    before = read(client, world.admin)
    for number in range(3):
        client.get(f"/v1/fine_tuning/jobs/ftjob-{number}")
    after = read(client, world.admin)
    name = "residency_requests_total/v1/fine_tuning/jobs/{job_id}404GET"
    assert after[name] - before.get(name, 0) == 3
    count = "residency_request_seconds_count/v1/fine_tuning/jobs/{job_id}"
    assert after[count] - before.get(count, 0) == 3


def test_a_broker_that_is_away_shows(client, world) -> None:
    found = read(client, world.admin)  # nobody listens where the tests ring
    assert (found["residency_broker_up"], found["residency_database_up"]) == (0, 1)


def test_a_database_that_is_away_shows_to_the_token(settings, tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'no folder' / 'x.db'}")
    settings = settings.model_copy(update={"metrics_token": SecretStr(TOKEN)})
    client = TestClient(create_app(settings, database))  # without its start, which would fail
    found = read(client, TOKEN)
    assert found["residency_database_up"] == 0
    assert not [name for name in found if name.startswith("residency_tasks")]
    body = "rsd_admin_" + "a" * 12 + "_" + "b" * 43
    key = f"{body}_{zlib.crc32(body.encode()):08x}"
    assert client.get("/metrics", headers={"authorization": f"Bearer {key}"}).status_code == 503
