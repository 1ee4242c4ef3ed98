"""Answers about files and what was prepared of them. Times are Unix seconds."""

from typing import Literal

from pydantic import BaseModel, Field

from api.schemas.common import FileStatus


class FileObject(BaseModel):
    """An uploaded file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = Field(description="When the file will be deleted.")
    filename: str
    purpose: str
    status: FileStatus = Field(description="`uploaded` until the rows are checked.")
    status_details: str | None = Field(description="The first thing that is wrong with the file.")
    sha256: str = Field(description="Empty until the bytes of an imported file have come.")
    rows: int | None = Field(description="Rows of a checked training file that can be trained on.")
    format: str | None = Field(description="The format of every row, where it was given.")
    column_map: dict[str, str] | None = Field(description="The file's own names for keys of rows.")
    max_invalid_fraction: float = Field(description="Part of the rows that may be wrong: they are left out.")
    source: str | None = Field(description="Where an imported file comes from.")


class FileList(BaseModel):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class PreparedObject(BaseModel):
    """Training data as token ids."""

    id: str = Field(description="Digest of the rows, the tokenizer, the template and the parameters.")
    object: Literal["prepared_data"] = "prepared_data"
    bytes: int
    rows: int
    tokens: int
    used_at: int
    expires_at: int = Field(description="Collected then, unless a run uses it before.")


class PreparedList(BaseModel):
    """All prepared data."""

    object: Literal["list"] = "list"
    data: list[PreparedObject]
