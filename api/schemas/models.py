"""Bodies of requests and answers about models and their files. Times are Unix seconds."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints, field_validator

from api.schemas.common import Body, Id

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


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelObject]
