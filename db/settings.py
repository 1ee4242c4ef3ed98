"""Where the data lives and which secret guards the keys."""

import os
from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy.engine import make_url


class DatabaseSettings(BaseSettings):
    """Read from `RESIDENCY_*`. `home` holds blobs, models, runs and, by default, the SQLite file.

    What no variable says may be a file, `residency_key_pepper` and the like, in RESIDENCY_SECRETS_DIR.
    """

    model_config = SettingsConfigDict(
        env_prefix="RESIDENCY_", secrets_dir=os.environ.get("RESIDENCY_SECRETS_DIR")
    )

    home: Path = Path("~/.residency")
    database_url: str = ""
    database_password: SecretStr = Field(
        default=SecretStr(""), description="Password for `database_url`, so that it can be a file of its own."
    )
    key_pepper: SecretStr = Field(
        default=SecretStr(""),
        description="Secret of at least 32 characters; keys are stored as HMACs under it.",
    )
    prepared_unused_s: float = Field(
        default=7 * 24 * 3600.0, ge=24 * 3600, description="How long prepared data that no run uses is kept."
    )

    @property
    def home_dir(self) -> Path:
        """The home folder as an absolute path."""
        return self.home.expanduser().absolute()

    @property
    def url(self) -> str:
        """The SQLAlchemy URL; SQLite in the home folder unless one is set."""
        if not self.database_url:
            return f"sqlite:///{self.home_dir / 'residency.db'}"
        password = self.database_password.get_secret_value()
        if not password:
            return self.database_url
        return make_url(self.database_url).set(password=password).render_as_string(hide_password=False)

    @property
    def blobs_dir(self) -> Path:
        """Uploaded bytes, content-addressed."""
        return self.home_dir / "blobs"

    @property
    def models_dir(self) -> Path:
        """Imported and merged models, one folder each."""
        return self.home_dir / "models"

    @property
    def runs_dir(self) -> Path:
        """One folder a job, one below it an attempt."""
        return self.home_dir / "runs"

    @property
    def cache_dir(self) -> Path:
        """Prepared data shared by jobs; safe to delete while nothing runs."""
        return self.home_dir / "cache"
