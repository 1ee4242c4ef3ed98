"""Bodies of requests and answers about keys. Times are Unix seconds."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, StringConstraints

from api.schemas.common import Body

Role = Literal["admin", "user"]


class CreateKey(Body):
    """A key to be made for the caller's organisation."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=256)] = Field(
        description="Who or what will use it.", examples=["laptop"]
    )
    role: Role = Field(
        default="user",
        description="An `admin` may also import models, drain nodes, and make and revoke keys.",
    )
    expires_in_s: int | None = Field(
        default=None, ge=1, le=315_360_000, strict=True, description="Seconds; without it, never."
    )


class KeyObject(BaseModel):
    """What is known of a key; the key itself is nowhere."""

    id: str = Field(description="Stands in the key: `rsd_<role>_<id>_…`.")
    object: Literal["key"] = "key"
    name: str
    role: Role
    created_at: int
    expires_at: int | None
    last_used_at: int | None = Field(description="Within a minute or so. Null before its first use.")
    revoked_at: int | None = Field(description="Since then it opens nothing.")


class NewKeyObject(KeyObject):
    """A key that was made just now."""

    key: str = Field(description="The key itself, which cannot be read again.")


class KeyList(BaseModel):
    """A page of keys."""

    object: Literal["list"] = "list"
    data: list[KeyObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
