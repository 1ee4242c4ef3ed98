"""Votes: kept, listed, taken back, and made a training file that preference methods take as it is."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from api.schemas.votes import CreateVote
from api.votes import write_row
from db.models import Vote
from tests.api.cli_peer import run
from trainers.rows.formats import Pair, detect_format, read_row

on_both = pytest.mark.parametrize("database", ["sqlite", "postgres"], indirect=True)
VOTE: dict[str, Any] = {
    "prompt": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Is it a fever?"}],
    "chosen": {"model": "ft:base:default::a", "content": "Yes, see a doctor."},
    "rejected": {"model": "org/base", "content": "Perhaps."},
}
# Line ends of other kinds than the one that ends a row, and what is not ASCII.
ODD = 'a\u2028b\r\nc\x0bd "quoted" \\ 发烧 🤒'


def vote(client, **changes: Any) -> dict[str, Any]:
    answer = client.post("/v1/votes", json=VOTE | changes)
    assert answer.status_code == 200, answer.text
    return answer.json()


@on_both
def test_votes_are_kept_listed_and_taken_back(client, as_stranger):
    first = vote(client)
    assert first == VOTE | {"id": first["id"], "object": "vote", "created_at": first["created_at"]}
    assert first["id"].startswith("vote-")
    second, third = vote(client), vote(client)
    page = client.get("/v1/votes", params={"limit": 2}).json()
    assert page == {
        "object": "list",
        "data": [third, second],
        "first_id": third["id"],
        "last_id": second["id"],
        "has_more": True,
    }
    assert client.get("/v1/votes", params={"after": second["id"]}).json()["data"] == [first]
    assert client.get("/v1/votes", headers=as_stranger).json()["data"] == []
    path = f"/v1/votes/{second['id']}"
    assert client.delete(path, headers=as_stranger).status_code == 404
    assert client.delete(path).json() == {"id": second["id"], "object": "vote", "deleted": True}
    assert client.delete(path).status_code == 404
    assert client.get("/v1/votes").json()["data"] == [third, first]


def test_a_vote_that_is_sent_again_counts_once(client):
    header = {"idempotency-key": "click"}
    first, again = (client.post("/v1/votes", json=VOTE, headers=header).json() for _ in range(2))
    assert first == again
    assert len(client.get("/v1/votes").json()["data"]) == 1


@pytest.mark.parametrize(
    ("changes", "param", "part"),
    [
        ({"prompt": []}, "prompt", "at least 1"),
        ({"prompt": [{"role": "user", "content": " "}]}, "prompt.0.content", "empty"),
        ({"prompt": [{"role": "tool", "content": "1"}]}, "prompt.0.role", "'system', 'user' or 'assistant'"),
        ({"prompt": [{"role": "system", "content": "a"}]}, "prompt", "must be the user's, not the system's"),
        ({"chosen": {"model": "m", "content": "\x1c\n"}}, "chosen.content", "empty"),
        ({"chosen": {"model": "", "content": "a"}}, "chosen.model", "at least 1"),
        ({"rejected": {"model": "m", "content": " Yes, see a doctor.\n"}}, "rejected", "are the same"),
        ({"winner": "a"}, "winner", "Unknown parameter"),
    ],
)
def test_what_nobody_could_learn_from_is_refused(client, changes, param, part):
    answer = client.post("/v1/votes", json=VOTE | changes)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert part in error["message"]
    assert client.get("/v1/votes").json()["data"] == []


@on_both
def test_votes_become_a_file_that_preference_methods_take(client, world, tmp_path, as_stranger):
    refused = client.post("/v1/votes/export")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "no_votes")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    vote(client)
    vote(client, prompt=[*turns, {"role": "user", "content": ODD}])
    gone = vote(client, chosen={"model": "m", "content": "taken back"})
    client.delete(f"/v1/votes/{gone['id']}")
    vote(client, chosen={"model": "m", "content": f" {ODD}\n"})
    assert client.post("/v1/votes/export", headers=as_stranger).status_code == 400
    file = client.post("/v1/votes/export").json()
    assert (file["object"], file["purpose"], file["filename"]) == ("file", "fine-tune", "votes.jsonl")
    assert file["status"] == "uploaded"
    content = client.get(f"/v1/files/{file['id']}/content").content
    rows = [json.loads(line) for line in content.split(b"\n")[:-1]]
    assert rows[0] == {
        "prompt": VOTE["prompt"],
        "chosen": [{"role": "assistant", "content": "Yes, see a doctor."}],
        "rejected": [{"role": "assistant", "content": "Perhaps."}],
    }
    assert rows[1]["prompt"][-1]["content"] == ODD
    assert rows[2]["chosen"][0]["content"] == f" {ODD}\n"

    report = check(tmp_path / "votes.jsonl", content)
    assert (report["rows_used"], report["rows_refused"]) == (3, 0)
    assert (report["accepted"], report["kind"]) == (True, "preference")
    world.check_file(file["id"], report=report)
    body = {"model": world.base_model(), "training_file": file["id"]}
    for method in ("reward", "dpo"):
        job = client.post("/v1/fine_tuning/jobs", json=body | {"method": {"type": method}})
        assert (job.status_code, job.json()["status"]) == (200, "queued"), job.text


def check(path: Path, content: bytes) -> dict[str, Any]:
    """What `residency data check` finds in the file."""
    path.write_bytes(content)
    return json.loads(run("data", "check", str(path), "--json").stdout)


_TEXT = st.text(
    st.sampled_from("abcdefg发\n\x1c\u2028"), min_size=1, max_size=3
)  # most of them say something
_MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": _TEXT})


@given(earlier=st.lists(_MESSAGE, max_size=3), question=_TEXT, chosen=_TEXT, rejected=_TEXT)
def test_no_vote_that_is_accepted_makes_a_row_that_is_refused(earlier, question, chosen, rejected):
    prompt = [*earlier, {"role": "user", "content": question}]
    body = {"prompt": prompt, "chosen": {"model": "a", "content": chosen}}
    try:
        CreateVote.model_validate(body | {"rejected": {"model": "b", "content": rejected}})
    except ValidationError:
        assume(False)
    row = json.loads(write_row(Vote(prompt=prompt, chosen=chosen, rejected=rejected)))
    found = read_row(row, detect_format(row), line=1)
    assert isinstance(found, Pair)
    assert found.prompt == prompt
    assert (found.chosen["content"], found.rejected["content"]) == (chosen, rejected)
