"""Liveness and readiness."""

from fastapi.testclient import TestClient

from api.main import create_app
from db.session import Database


def test_ready_without_a_broker(client):
    assert client.get("/healthz").json() == {"status": "ok"}
    answer = client.get("/readyz")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ready", "database": "ok", "broker": "down"}


def test_not_ready_without_a_schema(settings, tmp_path):
    settings.home_dir.mkdir()
    client = TestClient(create_app(settings, Database(f"sqlite:///{tmp_path / 'empty.db'}")))
    assert client.get("/healthz").status_code == 200
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["database"]) == (503, "down")


def test_the_start_makes_the_schema(settings):
    """Nothing is given but the settings; the app opens its own database."""
    with TestClient(create_app(settings)) as client:
        assert client.get("/readyz").json()["status"] == "ready"
    assert (settings.home_dir / "residency.db").is_file()
