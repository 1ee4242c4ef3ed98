"""/v1/models/{id}/files: the weights of a model and what belongs to them, to be taken away."""

from pathlib import Path

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse

from api.auth import CallerDep
from api.deps import DatabaseDep
from api.run_files import walk_files
from api.schemas.models import ModelFileList, ModelFileObject
from db import registry
from db.errors import NotFound
from db.models import Model
from db.session import Database

router = APIRouter(prefix="/models/{model_id:path}/files", tags=["Models"])


@router.get("", summary="List model files")
def list_model_files(model_id: str, caller: CallerDep, database: DatabaseDep) -> ModelFileList:
    """The files of a model by name; of a checkpoint, those of its adapter."""
    objects = []
    for name, path in sorted(_find_files(database, model_id, org_id=caller.org_id).items()):
        stat = path.stat()
        objects.append(ModelFileObject(id=name, name=name, bytes=stat.st_size, created_at=int(stat.st_mtime)))
    return ModelFileList(data=objects, has_more=False)


@router.get(
    "/{name:path}",
    summary="Download model file",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}, "description": "The bytes of the file."}},
)
def download_model_file(model_id: str, name: str, caller: CallerDep, database: DatabaseDep) -> Response:
    """One file, or a range of it."""
    # The name is looked up and never made a path of.
    path = _find_files(database, model_id, org_id=caller.org_id).get(name)
    if path is None:
        raise NotFound("model file", name)
    return FileResponse(path, media_type="application/octet-stream", filename=path.name)


def _find_files(database: Database, model_id: str, *, org_id: str) -> dict[str, Path]:
    with database.read() as session:
        folder = _folder_of(registry.get(session, model_id, org_id=org_id))
    return {} if folder is None else {name: Path(entry.path) for name, entry in walk_files(folder)}


def _folder_of(model: Model) -> Path | None:
    folder = model.adapter_path if model.kind == "checkpoint" else model.path
    return None if folder is None else Path(folder)
