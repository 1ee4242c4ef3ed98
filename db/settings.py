"""Where the data lives and which secret guards the keys."""

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class DatabaseSettings(BaseSettings):
    """Read from `RESIDENCY_*`. `home` holds blobs, models, runs and, by default, the SQLite file."""

    model_config = SettingsConfigDict(env_prefix="RESIDENCY_")

    home: Path = Path("~/.residency")
    database_url: str = ""
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
        return self.database_url or f"sqlite:///{self.home_dir / 'residency.db'}"

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
