"""/v1/votes: which of two answers was preferred, and files of preferences made of that."""

import json
from typing import Any

from fastapi import APIRouter, BackgroundTasks
from sqlalchemy.orm import Session

from api import render
from api.auth import CallerDep
from api.deps import After, DatabaseDep, Limit, SettingsDep
from api.once import OnceDep
from api.schemas.common import Deleted
from api.schemas.files import FileObject
from api.schemas.votes import CreateVote, VoteList, VoteObject
from db import files, votes
from db.blobs import BlobWriter
from db.errors import Conflict
from db.models import Vote
from workers.dispatch import ring

router = APIRouter(prefix="/votes", tags=["Votes"])

_FILENAME = "votes.jsonl"


@router.post("", summary="Create vote")
def create_vote(body: CreateVote, caller: CallerDep, once: OnceDep) -> VoteObject:
    """Keep which of two answers to one prompt was preferred."""
    asked = body.model_dump(mode="json")

    def make(session: Session) -> dict[str, Any]:
        vote = votes.create(
            session,
            org_id=caller.org_id,
            prompt=asked["prompt"],
            chosen=body.chosen.content,
            chosen_model=body.chosen.model,
            rejected=body.rejected.content,
            rejected_model=body.rejected.model,
        )
        return render.vote_object(vote).model_dump(mode="json")

    return VoteObject.model_validate(once.answer(make, request=("POST /v1/votes", asked)))


@router.get("", summary="List votes")
def list_votes(caller: CallerDep, database: DatabaseDep, after: After = None, limit: Limit = 20) -> VoteList:
    """The votes of your organisation, newest first."""
    with database.read() as session:
        page = votes.list_page(session, org_id=caller.org_id, after=after, limit=limit)
    objects = [render.vote_object(vote) for vote in page.rows]
    return VoteList.model_validate(render.page(objects, has_more=page.has_more))


@router.post("/export", summary="Export votes")
def export_votes(
    caller: CallerDep,
    database: DatabaseDep,
    settings: SettingsDep,
    once: OnceDep,
    background: BackgroundTasks,
) -> FileObject:
    """Make a training file of all votes, a pair of answers a row, as `reward` and `dpo` learn from."""
    with BlobWriter(settings.blobs_dir, caller.org_id) as writer:
        with database.read() as session:
            for vote in votes.read_all(session, org_id=caller.org_id):
                writer.write(write_row(vote))
        if writer.size_bytes == 0:
            raise Conflict("no_votes", "There are no votes yet: a file without rows trains nothing.")
        writer.sync()

        def make(session: Session) -> dict[str, Any]:
            file = files.create(
                session, writer, org_id=caller.org_id, filename=_FILENAME, purpose="fine-tune"
            )
            return render.file_object(file).model_dump(mode="json")

        answer = once.answer(make, request=("POST /v1/votes/export", {"sha256": writer.sha256}))
    background.add_task(ring, "cpu")
    return FileObject.model_validate(answer)


def write_row(vote: Vote) -> bytes:
    """A vote as a row of a training file."""
    row = {
        "prompt": vote.prompt,
        "chosen": [{"role": "assistant", "content": vote.chosen}],
        "rejected": [{"role": "assistant", "content": vote.rejected}],
    }
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


@router.delete("/{vote_id}", summary="Delete vote")
def delete_vote(vote_id: str, caller: CallerDep, database: DatabaseDep) -> Deleted:
    """Take a vote back. Files that were made of it stay as they are."""
    with database.write() as session:
        votes.delete(session, vote_id, org_id=caller.org_id)
    return Deleted(id=vote_id, object="vote")
