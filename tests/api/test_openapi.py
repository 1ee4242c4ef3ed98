"""The published description of the API: what it says is pinned, and it hides nothing."""

import json
from pathlib import Path

from fastapi import FastAPI

SNAPSHOT = Path(__file__).parents[2] / "docs" / "openapi.json"


def test_the_published_description_is_the_one_that_is_served(client):
    """A difference is a change of the contract: look at it, then `make openapi`."""
    assert client.get("/openapi.json").json() == json.loads(SNAPSHOT.read_text())


def test_every_operation_tells_what_it_does_and_how_it_refuses(client):
    app: FastAPI = client.app
    operations = [
        (path, operation)
        for path, methods in app.openapi()["paths"].items()
        for operation in methods.values()
    ]
    for path, operation in operations:
        assert operation["summary"], path
        assert operation["description"], path
        if path.startswith("/v1/"):
            assert {"200", "4XX", "5XX"} <= operation["responses"].keys(), path
            assert operation["security"], path
        assert "422" not in operation["responses"], path  # refusals are 400
    identifiers = [operation["operationId"] for _, operation in operations]
    assert len(set(identifiers)) == len(identifiers)
