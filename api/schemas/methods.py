"""Answers about methods and their parameters."""

from typing import Any, Literal

from pydantic import BaseModel, Field


class ParameterObject(BaseModel):
    """A hyperparameter. `null` always means "not given"."""

    name: str
    description: str
    types: list[str] = Field(description="JSON types that are taken.")
    choices: list[str] | None = Field(description="Where strings are taken: which; null for any.")
    minimum: float | int | None
    maximum: float | int | None
    exclusive_minimum: float | int | None
    exclusive_maximum: float | int | None
    required: bool
    default: Any = Field(description='Taken when nothing is given; "auto" is resolved when the job starts.')
    aliases: list[str] = Field(description="Other names that are understood.")


class RowFormat(BaseModel):
    """One way to write a row of a training file."""

    name: str
    example: Any = Field(description="A row; where it is a text, it is a line of a `.txt` file.")
    example_with_tools: Any = Field(description="A row with tools; null for a format without them.")


class MethodObject(BaseModel):
    """A way to train: what goes into `method.type` of a job."""

    name: str
    object: Literal["method"] = "method"
    summary: str
    learns_from: str = Field(description="What the rows of its files must be.")
    row_formats: list[RowFormat]
    parameters: list[ParameterObject] = Field(description="Go into `method.<name>.hyperparameters`.")
    grader: dict[str, Any] | None = Field(
        description="JSON schema of `method.<name>.grader`, where the method takes one."
    )


class MethodList(BaseModel):
    """All methods."""

    object: Literal["list"] = "list"
    data: list[MethodObject]
    ignored: dict[str, str] = Field(description="Parameters that are accepted without effect, and why.")
