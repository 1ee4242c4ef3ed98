"""/v1/fine_tuning/jobs/{id}/artifacts: the files that training left."""

import json
from collections.abc import MutableMapping
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse
from sqlalchemy.orm import Session
from starlette.types import Message, Receive, Scope, Send

from api.auth import CallerDep
from api.deps import DatabaseDep, SettingsDep
from api.run_files import RunFile, list_run_files, newest_attempt
from api.schemas.jobs import ArtifactList, ArtifactObject
from api.settings import ApiSettings
from db import job_files, jobs
from db.errors import NotFound
from db.models import File, Job, Model
from db.session import Database
from trainers.specs import write_method

router = APIRouter(prefix="/fine_tuning/jobs/{job_id}/artifacts", tags=["Fine-tuning"])

_SPEC_NAME = "spec.json"


@router.get("", summary="List fine-tuning artifacts")
def list_artifacts(
    job_id: str, caller: CallerDep, database: DatabaseDep, settings: SettingsDep
) -> ArtifactList:
    """The files of a job, by name: those of the attempt that was finished, else those of the newest."""
    job, spec = _read_job(database, job_id, org_id=caller.org_id)
    objects = [_artifact_object(file) for file in _files(job, settings)]
    if spec is not None:
        objects.append(
            ArtifactObject(
                id=_SPEC_NAME,
                name=_SPEC_NAME,
                bytes=len(spec),
                kind="spec",
                created_at=int(job.started_at or job.created_at),
            )
        )
    return ArtifactList(data=sorted(objects, key=lambda artifact: artifact.name), has_more=False)


@router.get(
    "/{name:path}",
    summary="Download fine-tuning artifact",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}, "description": "The bytes of the file."}},
)
def download_artifact(
    job_id: str, name: str, caller: CallerDep, database: DatabaseDep, settings: SettingsDep
) -> Response:
    """One file, or a range of it. `spec.json` says how to train the same again."""
    job, spec = _read_job(database, job_id, org_id=caller.org_id)
    if name == _SPEC_NAME and spec is not None:
        return Response(spec, media_type="application/json")
    # The name is looked up and never made a path of.
    for file in _files(job, settings):
        if file.name == name:
            return _AsItWas(file.path, media_type=_media_type(file), stat_result=file.stat)
    raise NotFound("artifact", name)


def _read_job(database: Database, job_id: str, *, org_id: str) -> tuple[Job, bytes | None]:
    """The job, and how to train it again once that is settled. Raises `NotFound`."""
    with database.read() as session:
        job = jobs.get(session, job_id, org_id=org_id)
        return job, None if job.resolved is None else _describe(session, job)


def _describe(session: Session, job: Job) -> bytes:
    """The job as its own request would have to be to give the same again, and the digests of what went in.

    Made from the rows: the spec in the run's folder holds paths of the server.
    """

    def sha256(file_id: str | None) -> str | None:
        file = session.get(File, file_id) if file_id else None
        return file.sha256 if file else None  # the file may have been deleted since

    mixture = job_files.mixture_of(job)
    spec = {
        "spec_version": job.spec_version,
        "job_id": job.id,
        "model": job.model_id,
        "model_digest": session.get_one(Model, job.model_pk).digest,
        "training_file": job.training_file,
        "training_file_sha256": sha256(job.training_file),
        "training_files": mixture or None,
        "training_files_sha256": [sha256(part["file"]) for part in mixture] or None,
        "validation_file": job.validation_file,
        "validation_file_sha256": sha256(job.validation_file),
        "method": write_method(job.method, job.resolved or {}),
        "seed": job.seed,
        "resources": job.resources,
    }
    return (json.dumps(spec, indent=2) + "\n").encode()


def _files(job: Job, settings: ApiSettings) -> list[RunFile]:
    job_dir = settings.runs_dir / job.id
    return list_run_files(job_dir / str(job.trained_attempt or newest_attempt(job_dir)))


def _artifact_object(file: RunFile) -> ArtifactObject:
    return ArtifactObject.model_validate(
        {
            "id": file.name,
            "name": file.name,
            "bytes": file.stat.st_size,
            "kind": file.kind,
            "created_at": int(file.stat.st_mtime),
        }
    )


def _media_type(file: RunFile) -> str:
    if file.kind == "log":
        return "text/plain"
    return "application/json" if file.name.endswith(".json") else "application/octet-stream"


class _AsItWas(FileResponse):
    """A file up to where it ended when it was found: a log that grows would break the promised length."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the file."""
        left_bytes = 0

        async def send_up_to_length(message: Message) -> None:
            nonlocal left_bytes
            if message["type"] == "http.response.start":
                left_bytes = _length(message)
            else:
                message["body"] = message["body"][:left_bytes]
                left_bytes -= len(message["body"])
            await send(message)

        await super().__call__(scope, receive, send_up_to_length)


def _length(start: MutableMapping[str, Any]) -> int:
    return next(int(value) for name, value in start["headers"] if name == b"content-length")
