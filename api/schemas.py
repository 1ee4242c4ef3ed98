"""Bodies of requests and answers. Times are Unix seconds."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

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


# --- requests -----------------------------------------------------------------------------------------------


ImportSource = Annotated[str, StringConstraints(min_length=1, max_length=4096)]


class ImportModel(Body):
    """A model to be imported, or one to be made of a base and adapters."""

    id: Annotated[
        str,
        StringConstraints(
            max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$"
        ),
    ] = Field(
        description="Name under which the model will be known; after its first part none may be `files`.",
        examples=["org/model"],
    )
    source: ImportSource | None = Field(
        default=None,
        description="A folder with safetensors or a GGUF file, as a path on the worker's machine, "
        "or `hf://organisation/name@revision` where hubs are allowed.",
    )
    base: Id | None = Field(
        default=None, description="The source is a LoRA adapter: id of the model to merge it into."
    )
    adapters: list[ImportSource] | None = Field(
        default=None,
        min_length=1,
        max_length=8,
        description="In place of `source`: LoRA adapters, the first to be merged into `base` and each of the "
        "others into the result of the one before. Written like a `source`, or as the id of a job of yours.",
    )

    @field_validator("id")
    @classmethod
    def _leads_to_no_files(cls, model_id: str) -> str:
        if "files" in model_id.split("/")[1:]:
            raise ValueError("'files' after a slash is where the files of a model are")
        return model_id


class CreateDeployment(Body):
    """A model that should answer."""

    model: Id = Field(description="Id of a model that is ready.")


class ChatRequest(Body):
    """What is read of a chat request; all other keys go to the engine as they are."""

    model_config = ConfigDict(extra="allow")

    model: Id = Field(description="Id of a deployed model.")
    messages: list[dict[str, Any]] = Field(min_length=1, description="The conversation so far.")
    stream: bool | None = Field(default=None, strict=True, description="Whether to answer token by token.")


# --- answers ------------------------------------------------------------------------------------------------


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every refusal."""

    error: ErrorDetail


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


class Deleted(BaseModel):
    """Something is gone."""

    id: str
    object: str
    deleted: bool = True


class LineageObject(BaseModel):
    """A model on the way from a base to a result."""

    model: str
    kind: Literal["base", "merged", "checkpoint"]
    job_id: str | None = Field(description="The job that made it; null for what was imported.")
    method: str | None = Field(description="The method of that job.")
    deleted: bool = Field(description="Whether it is gone; its id may be another model's by now.")


class ModelObject(BaseModel):
    """A model that can be trained on or deployed. The keys after `owned_by` are additions of this service."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    status: Literal["importing", "ready", "failed"]
    kind: Literal["base", "merged", "checkpoint"]
    parent: str | None = Field(description="The model it was trained on.")
    root: str = Field(description="The base model at the start of its lineage.")
    digest: str | None = Field(description="sha256 over the files of the model.")
    max_model_len: int | None = Field(description="Longest context in tokens.")
    details: dict[str, Any] | None
    error: dict[str, Any] | None
    source: str | None = Field(description="Where it came from; admins only.")
    evaluation: dict[str, Any] | None = Field(
        default=None,
        description="`steps`: what held-out rows and fixed prompts showed before the training that made it, "
        "at each checkpoint and after it. Only on single models.",
    )
    job_id: str | None = Field(default=None, description="The job that made it.")
    lineage: list[LineageObject] | None = Field(
        default=None,
        description="From its base to itself, a training after the other. Only on single models.",
    )


class ModelFileObject(BaseModel):
    """A file of a model."""

    id: str = Field(description="The name; it may hold slashes.")
    object: Literal["model.file"] = "model.file"
    name: str
    bytes: int
    created_at: int


class ModelFileList(BaseModel):
    """All files of a model."""

    object: Literal["list"] = "list"
    data: list[ModelFileObject]
    has_more: bool


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


class DeploymentList(BaseModel):
    """A page of deployments."""

    object: Literal["list"] = "list"
    data: list[DeploymentObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelObject]
