"""What bodies of every resource share: unknown keys refused, errors, deletions."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, model_validator

_MAX_DEPTH = 64
Purpose = Literal["assistants", "batch", "evals", "fine-tune", "user_data", "vision"]
FileStatus = Literal["uploaded", "processed", "error"]
Id = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class Body(BaseModel):
    """A request body. Unknown keys are refused rather than ignored."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _storable(cls, value: Any) -> Any:
        refuse_unstorable(value)
        return value


def refuse_unstorable(value: Any) -> None:
    """Raise ValueError for what JSON can say but a database or UTF-8 cannot, and for absurd nesting."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        following: list[Any] = []
        for item in level:
            if isinstance(item, str) and ("\x00" in item or not _is_utf8(item)):
                raise ValueError("strings must be Unicode without NUL characters and half surrogate pairs")
            if isinstance(item, dict):
                following += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                following += item
        if not following:
            return
        level = following
    raise ValueError(f"the body is nested more than {_MAX_DEPTH} levels deep")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every refusal."""

    error: ErrorDetail


class Deleted(BaseModel):
    """Something is gone."""

    id: str
    object: str
    deleted: bool = True
