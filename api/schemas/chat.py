"""What is read of a chat request."""

from typing import Any

from pydantic import ConfigDict, Field

from api.schemas.common import Body, Id


class ChatRequest(Body):
    """What is read of a chat request; all other keys go to the engine as they are."""

    model_config = ConfigDict(extra="allow")

    model: Id = Field(description="Id of a deployed model.")
    messages: list[dict[str, Any]] = Field(min_length=1, description="The conversation so far.")
    stream: bool | None = Field(default=None, strict=True, description="Whether to answer token by token.")
