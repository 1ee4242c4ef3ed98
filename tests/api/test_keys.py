"""Keys over HTTP: admins make and revoke those of their organisation, and see when each was used."""

import logging
import time
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event, select, text

from api.key_uses import KeyUses
from api.main import create_app
from db.models import ApiKey
from tests.stack import wait_for

on_both = pytest.mark.parametrize("database", ["sqlite", "postgres"], indirect=True)


@pytest.fixture
def admin(client, as_admin):
    client.headers.update(as_admin)
    return client


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def make(admin, **wishes: Any) -> dict[str, Any]:
    answer = admin.post("/v1/keys", json={"name": "laptop"} | wishes)
    assert answer.status_code == 200, answer.text
    return answer.json()


def seen(admin) -> dict[str, dict[str, Any]]:
    return {key["id"]: key for key in admin.get("/v1/keys").json()["data"]}


@on_both
def test_a_key_is_made_used_and_revoked(admin, world):
    made = make(admin, expires_in_s=3600)
    key = made.pop("key")
    assert made == {
        "id": key.split("_")[2],
        "object": "key",
        "name": "laptop",
        "role": "user",
        "created_at": made["created_at"],
        "expires_at": made["created_at"] + 3600,
        "last_used_at": None,
        "revoked_at": None,
    }
    assert seen(admin)[made["id"]] == made
    assert admin.get("/v1/models", headers=bearer(key)).status_code == 200
    # Another process of the API, with its own connections.
    with TestClient(create_app(world.settings, type(world.database)(world.database.url))) as other:
        assert other.get("/v1/models", headers=bearer(key)).status_code == 200
        gone = admin.delete(f"/v1/keys/{made['id']}")
        assert gone.json() == {"id": made["id"], "object": "key", "deleted": True}
        for api in (admin, other):
            assert api.get("/v1/models", headers=bearer(key)).status_code == 401
        other.app.state.database.dispose()
    revoked_at = seen(admin)[made["id"]]["revoked_at"]
    assert revoked_at >= made["created_at"]
    assert admin.delete(f"/v1/keys/{made['id']}").status_code == 200
    assert seen(admin)[made["id"]]["revoked_at"] == revoked_at


def test_the_key_itself_is_nowhere_afterwards(admin, world, caplog):
    caplog.set_level(logging.DEBUG)
    key = make(admin, role="admin")["key"]
    admin.get("/v1/models", headers=bearer(key))
    secret = key.split("_", 3)[3]
    assert secret not in admin.get("/v1/keys").text
    assert secret not in caplog.text
    with world.database.read() as session:
        for table in ("api_keys", "idempotent_requests"):
            rows = session.execute(text(f"SELECT * FROM {table}"))  # noqa: S608
            assert secret not in str(rows.all())


def test_a_key_that_was_asked_for_twice_is_two_keys(admin):
    header = {"idempotency-key": "once"}
    first, second = (admin.post("/v1/keys", json={"name": "a"}, headers=header).json() for _ in range(2))
    assert first["id"] != second["id"]


def test_keys_come_in_pages_and_only_those_of_the_organisation(admin, world, as_stranger):
    ids = [make(admin, name=str(index))["id"] for index in range(3)]
    page = admin.get("/v1/keys", params={"limit": 2}).json()
    assert ([key["id"] for key in page["data"]], page["has_more"]) == (ids[:0:-1], True)
    assert (page["first_id"], page["last_id"]) == (ids[2], ids[1])
    rest = admin.get("/v1/keys", params={"after": page["last_id"]}).json()
    assert {key["name"] for key in rest["data"]} == {"0", "a", "u"}
    theirs = admin.get("/v1/keys", headers=as_stranger).json()["data"]
    assert [key["id"] for key in theirs] == [world.stranger.split("_")[2]]
    assert admin.delete(f"/v1/keys/{ids[0]}", headers=as_stranger).status_code == 404
    assert seen(admin)[ids[0]]["revoked_at"] is None


def test_users_have_no_business_with_keys(client, world):
    own = world.user.split("_")[2]
    asked = (("GET", ""), ("POST", ""), ("DELETE", f"/{own}"))
    for method, path in asked:
        answer = client.request(method, f"/v1/keys{path}", json={"name": "a"} if method == "POST" else None)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_permissions")


def test_what_is_refused(admin, world):
    for wrong, param in (
        ({"name": ""}, "name"),
        ({"role": "root"}, "role"),
        ({"expires_in_s": 0}, "expires_in_s"),
        ({"expires_in_s": "60"}, "expires_in_s"),
        ({"scope": "all"}, "scope"),
    ):
        answer = admin.post("/v1/keys", json={"name": "a"} | wrong)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), wrong
    own = world.admin.split("_")[2]
    last = admin.delete(f"/v1/keys/{own}")
    assert (last.status_code, last.json()["error"]["code"]) == (400, "last_admin_key")
    assert "make another one" in last.json()["error"]["message"]
    make(admin, role="admin")
    assert admin.delete(f"/v1/keys/{own}").status_code == 200
    assert admin.get("/v1/keys").status_code == 401


def used(world) -> dict[str, float]:
    """When which keys were used, of those that were."""
    with world.database.read() as session:
        rows = session.execute(select(ApiKey.id, ApiKey.last_used_at)).all()
    return {key_id: used_at for key_id, used_at in rows if used_at is not None}


@on_both
def test_uses_are_noted_behind_the_requests(admin, world):
    own = world.admin.split("_")[2]
    begun = time.time()
    assert admin.get("/v1/models").status_code == 200
    wait_for(lambda: own in used(world), within_s=20, what="the note")
    assert set(used(world)) == {own}
    assert begun - 1 < used(world)[own] < time.time() + 1
    assert seen(admin)[own]["last_used_at"] == int(used(world)[own])


def test_nobody_waits_for_a_note(admin, world):
    """Somebody writes for long: the request is answered meanwhile, and the note comes after."""
    with world.database.write():
        assert admin.get("/v1/models").status_code == 200
        assert used(world) == {}
    wait_for(lambda: used(world), within_s=20, what="the note")


def test_a_key_is_noted_once_a_minute(world):
    asked = []
    event.listen(world.database.engine, "before_cursor_execute", lambda *call: asked.append(call[2]))
    uses, ids = KeyUses(world.database), [key.split("_")[2] for key in (world.user, world.admin)]
    for key_id in (*ids, *ids, *ids):
        uses.note(key_id)
    wait_for(lambda: set(used(world)) == set(ids), within_s=20, what="both notes")
    uses.close()
    assert sum("UPDATE api_keys" in statement for statement in asked) == 2


def test_a_note_that_fails_is_told_to_the_log_only(world, caplog):
    caplog.set_level(logging.INFO)
    with world.database.write() as session:
        session.execute(text("ALTER TABLE api_keys RENAME TO elsewhere"))
    uses = KeyUses(world.database)
    uses.note("a")
    wait_for(lambda: "was not noted: no such table" in caplog.text, within_s=20, what="the log")
    uses.close()
