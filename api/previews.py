"""/v1/files/ID/preview and /tokens: what a model and a method will see in a file. A worker looks."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from api.auth import CallerDep
from api.deps import DatabaseDep
from api.disconnect import unless_disconnected
from api.errors import NEVER_RETRY, ApiError
from api.schemas.previews import FilePreview, FileTokens
from api.watch import Watch, WatchDep
from db import files, previews, registry
from db.errors import Conflict
from db.keys import Caller
from db.models import Preview
from db.session import Database
from trainers.specs import Layout, SpecError, parse_method, write_method
from trainers.specs.methods import METHODS
from workers.dispatch import ring

router = APIRouter(prefix="/files", tags=["Files"])
_RETRY_AFTER_S = 2


@dataclass(frozen=True)
class _Asked:
    """Whose view is asked for, and how long the caller waits for it."""

    model: str
    method: str
    hyperparameters: dict[str, Any]
    wait_s: float


def _read_asked(
    model: Annotated[str, Query(min_length=1, max_length=256, description="Id of a model.")],
    method: Annotated[str, Query(description="As in `method.type` of a job.")] = "supervised",
    max_length: Annotated[int | None, Query(description="As in a job.")] = None,
    block_size: Annotated[int | None, Query(description="As in a `pretraining` job.")] = None,
    train_on_inputs: Annotated[bool | None, Query(description="As in a `supervised` job.")] = None,
    chat_template: Annotated[str | None, Query(description="As in a job.")] = None,
    template: Annotated[str | None, Query(description="Another name for `chat_template`.")] = None,
    wait: Annotated[float, Query(ge=0, le=60, description="Seconds to wait for a worker's answer.")] = 20.0,
) -> _Asked:
    """The query, with the hyperparameters that shape rows as a job would have them. Raises ApiError."""
    given = {
        "max_length": max_length,
        "block_size": block_size,
        "train_on_inputs": train_on_inputs,
        "chat_template": chat_template,
        "template": template,
    }
    if method not in METHODS:
        message = f"'{method}' is not one of {', '.join(METHODS)} - 'method'"
        raise ApiError(400, "unsupported_value", message, param="method")
    try:
        read = parse_method(write_method(method, given), None)
    except SpecError as error:
        param = (error.param or "").rpartition(".")[2]
        raise ApiError(400, error.code, error.message, param=param or None) from error
    shaping = read.kind.shaping | {"chat_template"}
    return _Asked(model, method, read.hyperparameters.model_dump(mode="json", include=shaping), wait)


_AskedDep = Annotated[_Asked, Depends(_read_asked)]
_RowNumber = Annotated[int, Field(ge=1, le=2**31)]


@router.get("/{file_id}/preview", summary="Preview rows", response_model_exclude_unset=True)
async def preview_rows(
    file_id: str,
    request: Request,
    caller: CallerDep,
    database: DatabaseDep,
    watch: WatchDep,
    asked: _AskedDep,
    row: Annotated[
        list[_RowNumber] | None,
        Query(max_length=20, description="Numbers of rows, from 1; the first three without it."),
    ] = None,
) -> FilePreview:
    """Rows as training will see them: the text of the template, and of each token whether it is trained.

    The first answer takes some seconds; while it is not there the status is 503, to be asked again.
    """
    question = _Question(file_id, "rows", asked, rows=sorted(set(row)) if row else None)
    answer = await _answer(question, request, caller, database=database, watch=watch)
    return FilePreview.model_validate(answer | {"object": "file.preview"})


@router.get("/{file_id}/tokens", summary="Count tokens")
async def count_tokens(
    file_id: str,
    request: Request,
    caller: CallerDep,
    database: DatabaseDep,
    watch: WatchDep,
    asked: _AskedDep,
) -> FileTokens:
    """How many tokens the rows take, and what share of them is cut and trained; of a long file, by a sample.

    The first answer takes some seconds; while it is not there the status is 503, to be asked again.
    """
    question = _Question(file_id, "tokens", asked)
    answer = await _answer(question, request, caller, database=database, watch=watch)
    return FileTokens.model_validate(answer | {"object": "file.tokens"})


@dataclass(frozen=True)
class _Question:
    """What is asked about a file."""

    file_id: str
    kind: Literal["rows", "tokens"]
    asked: _Asked
    rows: list[int] | None = None

    def put(self, database: Database, *, org_id: str) -> Preview:
        """The preview, new if nobody has asked before. Raises NotFound, Conflict."""
        with database.read() as session:
            file = files.get(session, self.file_id, org_id=org_id)
            model = registry.get_ready(session, self.asked.model, org_id=org_id)
        if not file.sha256:
            raise Conflict("file_not_ready", f"The bytes of '{file.id}' have not come.", param="file_id")
        layout = Layout.of_stored(
            file.filename,
            format=file.format,
            column_map=file.column_map,
            max_invalid_fraction=file.max_invalid_fraction,
        )
        wanted = {
            "layout": dataclasses.asdict(layout),
            "method": self.asked.method,
            "hyperparameters": self.asked.hyperparameters,
            "rows": self.rows,
        }
        key = previews.name_question(self.kind, file, model, asked=wanted)
        with database.read() as session:
            found = previews.find(session, key, org_id=org_id)
        if found is not None:
            return found
        with database.write() as session:
            return previews.ask(session, key, kind=self.kind, file=file, model=model, asked=wanted)


async def _answer(
    question: _Question, request: Request, caller: Caller, *, database: Database, watch: Watch
) -> dict[str, Any]:
    """The worker's answer, waited for. Raises ApiError: refused (400), or not there yet (503)."""
    preview = await run_in_threadpool(question.put, database, org_id=caller.org_id)
    if preview.answer is None:
        await run_in_threadpool(ring, "cpu")
        wait_s = question.asked.wait_s
        await unless_disconnected(request, watch.news(preview.id, after_seq=0, timeout_s=wait_s))
        preview = await run_in_threadpool(question.put, database, org_id=caller.org_id)
    if preview.answer is None:
        message = "A worker is looking at the file; ask again."
        raise ApiError(503, "preview_pending", message, headers={"retry-after": str(_RETRY_AFTER_S)})
    error = preview.answer.get("error")
    if error is not None:
        status = 500 if error["code"] in previews.OUR_FAULTS else 400
        raise ApiError(status, error["code"], error["message"], param=error["param"], headers=NEVER_RETRY)
    return preview.answer | {"file_id": question.file_id, "model": question.asked.model}
