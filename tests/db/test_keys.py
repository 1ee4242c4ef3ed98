"""Keys open one organisation, only while they are valid, and cannot be read from the database (G24)."""

import hmac
import zlib

import pytest
from sqlalchemy import event, inspect, text, update
from sqlalchemy.exc import IntegrityError

from db import keys
from db.errors import Conflict, NotFound
from db.models import ApiKey
from db.session import clock
from db.tables import Org
from tests.db.world import World, run_against_open

PEPPER = "p" * 32


def create(world: World, *, role: str = "user", pepper: str = PEPPER) -> str:
    with world.database.write() as session:
        return keys.create(session, org_id=world.org_id, name="laptop", role=role, pepper=pepper)


def revoke(world: World, key: str) -> None:
    with world.database.write() as session:
        keys.revoke(session, keys.id_of(key), org_id=world.org_id)


def stored(world: World, key: str) -> ApiKey:
    with world.database.read() as session:
        return session.get_one(ApiKey, keys.id_of(key))


def caller(world: World, key: str, *, pepper: str = PEPPER) -> keys.Caller | None:
    with world.database.read() as session:
        return keys.authenticate(session, key, pepper=pepper)


def signed(body: str) -> str:
    """`body` with a checksum that is right."""
    return f"{body}_{zlib.crc32(body.encode()):08x}"


def replaced(key: str, index: int) -> str:
    return key[:index] + ("A" if key[index] != "A" else "B") + key[index + 1 :]


@pytest.mark.parametrize("role", ["admin", "user"])
def test_a_key_speaks_for_its_organisation(world: World, role: str):
    clinic = world.other("clinic")
    key = create(clinic, role=role)

    found = caller(world, key)

    assert found == keys.Caller(org_id="org-clinic", org_name="clinic", key_id=key.split("_")[2], role=role)
    assert key.startswith(f"rsd_{role}_")
    assert key != create(clinic, role=role)


def test_the_database_holds_no_key(world: World):
    key = create(world)
    secret = key.split("_", 3)[3].rsplit("_", 1)[0]
    dump = []
    with world.database.read() as session:
        for table in inspect(world.database.engine).get_table_names():
            dump += [str(row) for row in session.execute(text(f'SELECT * FROM "{table}"'))]  # noqa: S608
        stored = session.get_one(ApiKey, key.split("_")[2])

    assert secret not in "".join(dump)
    assert stored.digest in "".join(dump)
    assert stored.digest == hmac.new(PEPPER.encode(), key.encode(), "sha256").hexdigest()


def test_every_character_counts(world: World):
    key = create(world)
    assert caller(world, key) is not None

    for index in range(len(key)):
        assert caller(world, replaced(key, index)) is None


def test_a_mistyped_key_is_refused_without_asking_the_database(world: World):
    key = create(world)
    asked = []
    event.listen(world.database.engine, "before_cursor_execute", lambda *call: asked.append(call))

    assert caller(world, replaced(key, len(key) - 20)) is None
    assert asked == []
    assert caller(world, key) is not None
    assert asked != []


def test_a_right_checksum_is_not_enough(world: World):
    key = create(world)
    body = key.rsplit("_", 1)[0]

    assert caller(world, signed(body)) is not None
    assert caller(world, signed(replaced(body, len(body) - 1))) is None, "another secret"
    assert caller(world, signed(body.replace("rsd_user_", "rsd_admin_"))) is None, "a role of one's own"
    assert caller(world, signed(f"rsd_user_{'x' * 12}_{body[-43:]}")) is None, "an unknown id"


@pytest.mark.parametrize(
    "key",
    [
        "",
        "rsd",
        "sk-" + "a" * 48,
        "rsd_root_" + "a" * 12 + "_" + "b" * 43 + "_00000000",
        "rsd_user___",
        "é" * 70,
        "\0",
    ],
    ids=ascii,
)
def test_malformed_keys_open_nothing(world: World, key: str):
    assert caller(world, key) is None
    assert caller(world, signed(key)) is None


def test_nothing_may_stand_around_a_key(world: World):
    key = create(world)

    for wrong in (f" {key}", f"{key} ", f"{key}\n", f"Bearer {key}", key.upper()):
        assert caller(world, wrong) is None


def test_a_revoked_key_opens_nothing(world: World):
    key, other = create(world), create(world)
    world.run(update(ApiKey).where(ApiKey.id == key.split("_")[2]).values(revoked_at=1.0))

    assert caller(world, key) is None
    assert caller(world, other) is not None


def test_a_key_expires(world: World):
    key = create(world)
    world.run(update(ApiKey).values(expires_at=1e11))
    assert caller(world, key) is not None

    world.run(update(ApiKey).values(expires_at=1.0))

    assert caller(world, key) is None


def test_a_key_is_made_for_as_long_as_is_asked_for(world: World):
    with world.database.write() as session:
        key = keys.create(session, org_id=world.org_id, name="k", role="user", pepper=PEPPER, expires_in_s=60)
        now = clock(session)

    expires_at = stored(world, key).expires_at
    assert expires_at is not None
    assert now + 50 < expires_at <= now + 60


def test_revoking_is_at_once_and_once(world: World):
    key, admin = create(world), create(world, role="admin")
    revoke(world, key)
    first = stored(world, key).revoked_at

    assert caller(world, key) is None
    assert first is not None
    revoke(world, key)
    assert stored(world, key).revoked_at == first
    assert caller(world, admin) is not None


def test_another_organisations_key_is_not_revoked(world: World):
    theirs = create(world.other("clinic"), role="admin")

    with pytest.raises(NotFound):
        revoke(world, theirs)
    assert caller(world, theirs) is not None


def test_the_last_admin_key_that_works_stays(world: World):
    create(world.other("clinic"), role="admin")
    first, second, expired = (create(world, role="admin") for _ in range(3))
    create(world)
    world.run(update(ApiKey).where(ApiKey.id == keys.id_of(expired)).values(expires_at=1.0))
    revoke(world, first)

    with pytest.raises(Conflict) as refused:
        revoke(world, second)
    assert refused.value.code == "last_admin_key"
    assert caller(world, second) is not None
    revoke(world, expired)
    create(world, role="admin")
    revoke(world, second)
    assert caller(world, second) is None


def test_two_who_revoke_the_last_two_admin_keys_leave_one(world: World):
    first, second = create(world, role="admin"), create(world, role="admin")

    outcomes = run_against_open(
        world.database,
        lambda session: keys.revoke(session, keys.id_of(first), org_id=world.org_id),
        lambda: revoke(world, second),
    )

    assert outcomes[0] is None
    assert isinstance(outcomes[1], Conflict)
    assert (caller(world, first), caller(world, second) is None) == (None, False)


def test_a_use_is_noted_once_in_a_while(world: World):
    key = create(world)

    def note(every_s: float) -> float | None:
        with world.database.write() as session:
            keys.note_use(session, keys.id_of(key), every_s=every_s)
        return stored(world, key).last_used_at

    assert stored(world, key).last_used_at is None
    first = note(60)
    assert first is not None
    assert note(60) == first
    world.run(update(ApiKey).values(last_used_at=ApiKey.last_used_at - 61))
    later = note(60)
    assert later is not None
    assert later >= first


def test_another_pepper_opens_nothing(world: World):
    key = create(world)

    assert caller(world, key, pepper="q" * 32) is None


@pytest.mark.parametrize("pepper", ["", "short", "p" * 31])
def test_a_short_pepper_is_refused(world: World, pepper: str):
    key = create(world)

    with pytest.raises(ValueError, match="RESIDENCY_KEY_PEPPER"):
        create(world, pepper=pepper)
    with pytest.raises(ValueError, match="RESIDENCY_KEY_PEPPER"):
        caller(world, key, pepper=pepper)


def test_the_database_itself_refuses_an_unknown_role(world: World):
    with pytest.raises(IntegrityError):
        create(world, role="root")


def test_a_fresh_installation_gets_one_organisation(world: World):
    world.run(text("DELETE FROM models"))
    world.run(text("DELETE FROM orgs"))

    def ensure() -> Org:
        with world.database.write() as session:
            return keys.ensure_default_org(session)

    outcomes = run_against_open(world.database, keys.ensure_default_org, ensure)

    assert [outcome.id for outcome in outcomes] == [keys.DEFAULT_ORG_ID] * 2
    assert ensure().name == "default"
