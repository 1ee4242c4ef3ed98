"""What the check of a training file found, as clients read it."""

from typing import Literal

from pydantic import BaseModel, Field


class RowFinding(BaseModel):
    """A row that was refused, or a fault of the whole file."""

    line: int = Field(description="Counted from 1; of a Parquet file, the number of the row.")
    code: str = Field(description="A reason that stays the same while its words may change.")
    message: str


class Notice(BaseModel):
    """Rows that are used as they are, though they may not be meant so."""

    count: int
    lines: list[int] = Field(description="The first of them.")


class Duplicate(BaseModel):
    """A row that was there before."""

    line: int
    same_as: int


class DuplicateRows(BaseModel):
    """Rows that are the same as an earlier one, byte for byte."""

    count: int
    first: list[Duplicate]


class NearDuplicate(BaseModel):
    """A row that is much like an earlier one."""

    line: int
    near: int
    similarity: float = Field(description="Part of the runs of three words that both have, estimated.")


class NearDuplicateRows(BaseModel):
    """Rows of the sample that are much like an earlier one of it."""

    count: int
    first: list[NearDuplicate]


class RowSampleReport(BaseModel):
    """What was found in a sample, the same one whenever the file is checked."""

    rows: int
    near_duplicates: NearDuplicateRows
    scripts: dict[str, float] = Field(description="Part of all letters that is of each script.")


class FileReport(BaseModel):
    """What the check of a training file found. Every row is used or refused, and counted as that."""

    object: Literal["file.report"] = "file.report"
    file_id: str
    rows: int
    rows_used: int
    rows_refused: int
    blank_lines: int
    format: str | None
    kind: str | None = Field(description="What the rows are to a method.")
    whole: bool = Field(description="Whether the file could be read to its end.")
    max_invalid_fraction: float
    accepted: bool = Field(description="Whether jobs may use the file.")
    reasons: dict[str, int] = Field(description="How many rows were refused for each reason.")
    errors: list[RowFinding] = Field(description="Of each reason, the first hundred.")
    notices: dict[str, Notice]
    duplicates: DuplicateRows
    sample: RowSampleReport
