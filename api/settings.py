"""What an operator may decide about the HTTP layer."""

from pydantic import Field, SecretStr

from db.settings import DatabaseSettings

_MIB = 1024 * 1024


class ApiSettings(DatabaseSettings):
    """Read from `RESIDENCY_*`, with where the data lies and the pepper of the keys."""

    max_upload_bytes: int = Field(default=512 * _MIB, ge=1, description="Largest file that may be uploaded.")
    max_body_bytes: int = Field(default=16 * _MIB, ge=1024, description="Largest body of any other request.")
    body_idle_s: float = Field(
        default=30.0, gt=0, description="How long a body may stand still before it is given up."
    )
    body_min_bytes_per_s: int = Field(
        default=1024, ge=1, description="How fast a body has to come, after `body_idle_s`."
    )
    metrics_token: SecretStr = Field(
        default=SecretStr(""), description="Opens /metrics and nothing else; without it, admins' keys do."
    )
    import_enabled: bool = Field(default=True, description="Whether admins may import base models.")
    hub: bool = Field(default=False, description="Whether models and data may come from a hub.")
    auto_deploy: bool = Field(default=False, description="Whether chatting with a model deploys it.")
    dashboard_url: str = Field(
        default="",
        pattern=r"^$|^:\d{1,5}$|^https?://",
        description="Where `/dashboard` leads; `:8701` is that port of the host that was asked.",
    )
    chat_hold_s: float = Field(
        default=60.0, ge=0, description="How long a chat request waits for its engine to become ready."
    )
