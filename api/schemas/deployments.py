"""Bodies of requests and answers about the models that should answer. Times are Unix seconds."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from api.schemas.common import Body, Id


class CreateDeployment(Body):
    """A model that should answer."""

    model: Id = Field(description="Id of a model that is ready.")


class DeploymentObject(BaseModel):
    """A model that should answer, and whether it does."""

    id: str
    object: Literal["deployment"] = "deployment"
    model: str
    status: Literal["pending", "loading", "ready", "failed", "stopped"]
    auto: bool = Field(description="Whether a chat request made it; such ones give way to others.")
    created_at: int
    error: dict[str, Any] | None
    address: str | None = Field(description="Where its engine listens; admins only.")


class DeploymentList(BaseModel):
    """A page of deployments."""

    object: Literal["list"] = "list"
    data: list[DeploymentObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
