"""`residency migrate`: the newest schema, the default organisation, and an admin key that works."""

import os
from pathlib import Path

from db import keys
from db.migrate import upgrade
from db.session import Database
from db.settings import DatabaseSettings


def migrate(settings: DatabaseSettings, *, key_file: Path) -> None:
    """Ready the database for the service. `key_file` gets a new admin key unless the one in it works."""
    pepper = settings.key_pepper.get_secret_value()
    database = Database(settings.url)
    upgrade(database)
    with database.write() as session:
        org = keys.ensure_default_org(session)
        known = key_file.read_text().strip() if key_file.is_file() else ""
        if keys.authenticate(session, known, pepper=pepper) is None:
            key = keys.create(session, org_id=org.id, name=key_file.name, role="admin", pepper=pepper)
            write_private(key_file, key)
    database.dispose()


def write_private(path: Path, text: str) -> None:
    """Write a new file that only its owner may read."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(text + "\n")
