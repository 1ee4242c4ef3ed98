"""What the service says about a job that failed."""

from typing import Any

from pydantic import BaseModel, Field


class Suggestion(BaseModel):
    """What could be done about it."""

    text: str
    changes: dict[str, Any] = Field(
        description="What to ask for instead: values by their path in the body of a job."
    )


class Diagnosis(BaseModel):
    """Why a job failed, as data."""

    code: str = Field(
        description="`cuda_oom`, `cpu_oom`, `nan_loss`, `nccl_timeout`, `bad_row`, `bad_data`, `disk_full`, "
        "`bad_checkpoint`, `trainer_killed`, `trainer_error`, `worker_lost`; else the code of the error."
    )
    message: str
    retryable: bool = Field(description="Whether the same job may succeed if it is tried again.")
    attempts: int = Field(description="How often it was tried.")
    file: str | None = Field(description="The file that is at fault.")
    line: int | None = Field(description="And its line, counted from 1.")
    suggestion: Suggestion | None
    log_tail: list[str] = Field(
        description="The last 50 lines of the last attempt's log; then, of each other node, the name of its "
        "log and its last 10 lines."
    )
