"""Bodies of requests and answers about files that come in parts or from a hub. Times are Unix seconds."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, StringConstraints

from api.reading import Told
from api.schemas.common import Body, Id, Purpose
from api.schemas.files import FileObject
from db.uploads import MAX_PARTS

UploadStatus = Literal["pending", "completed", "cancelled", "expired"]


class ExpiresAfter(Body):
    """When a file is to be deleted."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2_592_000, strict=True)


class CreateUpload(Told):
    """A file that will come in parts."""

    filename: Annotated[str, StringConstraints(min_length=1)]
    purpose: Purpose
    bytes: int = Field(ge=1, strict=True, description="Of the whole file.")
    mime_type: Annotated[str, StringConstraints(max_length=256)] | None = Field(
        default=None, description="Not used: how a file is to be read, its name tells."
    )
    expires_after: ExpiresAfter | None = Field(default=None, description="For the file, once it is made.")


class CompleteUpload(Body):
    """The parts in the order in which they make the file."""

    part_ids: list[Id] = Field(min_length=1, max_length=MAX_PARTS)
    md5: Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{32}$")] | None = Field(
        default=None, description="What the whole must have, in hexadecimal."
    )


class ImportFile(Told):
    """Training data to be fetched from a hub."""

    source: Annotated[str, StringConstraints(min_length=1, max_length=512)] = Field(
        description="`hf://organisation/name@revision`; the revision may be left out."
    )
    config: Annotated[str, StringConstraints(min_length=1, max_length=128)] | None = Field(
        default=None, description="Which part of the data set, where it has several."
    )
    split: Annotated[str, StringConstraints(pattern=r"^\w[\w.-]{0,63}$")] = "train"
    purpose: Literal["fine-tune"] = "fine-tune"


class UploadPartObject(BaseModel):
    """A part that is there."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str
    bytes: int
    sha256: str


class UploadObject(BaseModel):
    """A file that comes in parts. `parts` and what is said of the rows are additions of this service."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    format: str | None = Field(description="As the file will have it.")
    column_map: dict[str, str] | None = Field(description="As the file will have it.")
    max_invalid_fraction: float = Field(description="As the file will have it.")
    status: UploadStatus
    file: FileObject | None = Field(description="What the parts have made.")
    parts: list[UploadPartObject] = Field(
        description="What has come so far; empty once the upload has ended."
    )
