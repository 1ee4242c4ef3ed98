"""Settings come from variables, and secrets also from files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from db.session import Database
from db.settings import DatabaseSettings

URL = "postgresql://residency@host:5432/residency"
PRINT = (
    "from db.settings import DatabaseSettings as S; s = S(); print(s.url, s.key_pepper.get_secret_value())"
)


def read_settings(**env: str) -> str:
    """The URL and the pepper of a process with these variables."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("RESIDENCY_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PRINT],
        env=others | env,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_secrets_are_read_from_files(tmp_path: Path) -> None:
    (tmp_path / "residency_key_pepper").write_text("pepper\n")
    (tmp_path / "residency_database_password").write_text("p@ss:/word\n")
    (tmp_path / "of_somebody_else").write_text("x")
    env = {"RESIDENCY_SECRETS_DIR": str(tmp_path), "RESIDENCY_DATABASE_URL": URL}
    url, pepper = read_settings(**env).split()
    assert Database(url).engine.url.password == "p@ss:/word"
    assert pepper == "pepper"
    assert read_settings(**env, RESIDENCY_KEY_PEPPER="variable").split()[1] == "variable"


def test_without_a_folder_of_secrets_nothing_is_said() -> None:
    assert read_settings(RESIDENCY_DATABASE_URL=URL) == URL


@pytest.mark.parametrize("password", ["", "secret"])
def test_sqlite_has_no_password(tmp_path: Path, password: str) -> None:
    settings = DatabaseSettings(home=tmp_path, database_url="", database_password=SecretStr(password))
    assert settings.url == f"sqlite:///{tmp_path / 'residency.db'}"


def test_secrets_are_not_printed() -> None:
    assert "secret" not in repr(DatabaseSettings(database_password=SecretStr("secret")))
