"""The command line: jobs, deployments and chat."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.api.cli_peer import Answer, Peer, error, run, serve

JOB = {
    "id": "ftjob-1",
    "object": "fine_tuning.job",
    "created_at": 1700000000,
    "finished_at": None,
    "model": "base",
    "fine_tuned_model": None,
    "status": "running",
    "training_file": "file-1",
    "validation_file": None,
    "trained_tokens": None,
    "seed": 7,
    "hyperparameters": {"n_epochs": 3},
    "method": {"type": "supervised"},
    "error": None,
    "phase": "training",
    "progress": {"step": 1, "total_steps": 2, "tokens_per_s": 90.0, "eta_seconds": 61},
}
SUCCEEDED = JOB | {"status": "succeeded", "fine_tuned_model": "ft:base:x", "phase": None}


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    with serve() as peer:
        monkeypatch.setenv("RESIDENCY_URL", peer.url)
        monkeypatch.setenv("RESIDENCY_API_KEY", "sk-test")
        monkeypatch.setattr("api.client.POLL_EVERY_S", 0.001)
        yield peer


# --- jobs ---------------------------------------------------------------------------------------------------


def test_create_sends_the_hyperparameters(peer: Peer) -> None:
    peer.answers("POST /v1/fine_tuning/jobs", JOB)
    options = ["--epochs", "2", "--learning-rate", "1e-4", "-p", "lora_rank=16", "-p", "dtype=float32"]
    result = run("jobs", "create", "--model", "m", "--file", "file-1", "--suffix", "s", *options)
    assert result.stdout == "ftjob-1\n"
    hyperparameters = {"n_epochs": 2, "learning_rate": 1e-4, "lora_rank": 16, "dtype": "float32"}
    assert peer.requests[0].json() == {
        "model": "m",
        "training_file": "file-1",
        "suffix": "s",
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
    }


@pytest.mark.parametrize("param", [["-p", "lora_rank"], ["-p", "=3"], ["--epochs", "2", "-p", "n_epochs=3"]])
def test_bad_params_are_usage_errors(peer: Peer, param: list[str]) -> None:
    result = run("jobs", "create", "--model", "m", "--file", "file-1", *param)
    assert result.exit_code == 2
    assert peer.requests == []


def event(number: int, message: str, **more: Any) -> dict[str, Any]:
    plain = {
        "id": f"ftevent-{number}",
        "created_at": 1700000000,
        "level": "info",
        "type": "message",
        "data": {},
    }
    return plain | {"message": message} | more


def events_page(*events: dict[str, Any]) -> dict[str, Any]:
    return {"data": list(events), "has_more": False}


def test_following_prints_each_event_once_until_the_end(peer: Peer) -> None:
    peer.answers("GET /v1/fine_tuning/jobs/ftjob-1", JOB, JOB, SUCCEEDED)
    peer.answers(
        "GET /v1/fine_tuning/jobs/ftjob-1/events",
        events_page(event(1, "Created"), event(2, "Step 1", type="metrics", data={"train_loss": 2.0})),
        events_page(),
        events_page(event(3, "Done")),
    )
    result = run("jobs", "logs", "ftjob-1", "-f")
    assert result.exit_code == 0
    lines = [line.split("  ", 1)[-1] for line in result.stdout.splitlines() if line]
    assert lines == ["Created", "Step 1", "Done", "ftjob-1 succeeded: ft:base:x"]
    asked = [request.path for request in peer.requests if "/events" in request.path]
    assert all("order=asc" in path for path in asked)
    assert "after=ftevent-2" in asked[-1]


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_following_a_job_that_does_not_succeed(peer: Peer, status: str) -> None:
    over = JOB | {"status": status, "error": {"code": "x", "message": "No space left."}}
    peer.answers("GET /v1/fine_tuning/jobs/ftjob-1", over)
    peer.answers("GET /v1/fine_tuning/jobs/ftjob-1/events", events_page())
    result = run("jobs", "logs", "ftjob-1", "--follow")
    assert result.exit_code == 1
    assert f"ftjob-1 {status}: No space left." in result.stderr


def test_following_outlives_a_restart_of_the_server(peer: Peer) -> None:
    peer.answers("GET /v1/fine_tuning/jobs/ftjob-1", JOB, error(503, "away"), SUCCEEDED)
    peer.answers("GET /v1/fine_tuning/jobs/ftjob-1/events", error(502, "away"), events_page())
    assert run("jobs", "logs", "ftjob-1", "-f").exit_code == 0


def test_logs_of_an_unknown_job(peer: Peer) -> None:
    peer.answers("GET /v1/fine_tuning/jobs/nope", error(404, "No such fine-tuning job: nope"))
    assert run("jobs", "logs", "nope", "-f").stderr == "No such fine-tuning job: nope\n"


def log(text: str, *, following: int, attempt: int = 1) -> Answer:
    return Answer(text.encode(), headers={"x-next-offset": str(following), "x-attempt": str(attempt)})


def test_raw_logs_are_read_to_the_end(peer: Peer) -> None:
    route = "GET /v1/fine_tuning/jobs/ftjob-1/logs"
    peer.answers(route, log("one\n", following=4), log("twö\n\x1b[2J", following=13), log("", following=13))
    result = run("jobs", "logs", "ftjob-1", "--raw")
    assert result.stdout == "one\ntwö\n[2J"
    assert [request.path.rpartition("=")[2] for request in peer.requests] == ["0", "4", "13"]


def test_raw_logs_of_a_new_attempt_start_again(peer: Peer) -> None:
    peer.answers("GET /v1/fine_tuning/jobs/ftjob-1", JOB, SUCCEEDED)
    first = [log("one\n", following=4), log("", following=4)]
    second = [
        log("", following=4, attempt=2),
        log("two\n", following=4, attempt=2),
        log("", following=4, attempt=2),
    ]
    peer.answers("GET /v1/fine_tuning/jobs/ftjob-1/logs", *first, *second)
    result = run("jobs", "logs", "ftjob-1", "--raw", "-f")
    assert result.stdout.startswith("one\ntwo\n")
    assert result.exit_code == 0


def test_show_and_cancel(peer: Peer) -> None:
    peer.answers("GET /v1/fine_tuning/jobs/ftjob-1", JOB)
    shown = run("jobs", "show", "ftjob-1").stdout
    for said in ("running", "training", "1/2, 1:01 left", "n_epochs"):
        assert said in shown
    assert json.loads(run("jobs", "show", "ftjob-1", "--json").stdout) == JOB
    peer.answers("POST /v1/fine_tuning/jobs/ftjob-1/cancel", JOB)
    assert run("jobs", "cancel", "ftjob-1").stdout.startswith("ftjob-1  running")


def test_show_tells_what_a_job_waits_for(peer: Peer) -> None:
    blocked_by = [{"reason": "earlier_jobs", "count": 2}, {"reason": "devices", "needed": 1, "held": 2}]
    waiting = JOB | {"status": "queued", "blocked_by": blocked_by, "expected_start_at": 1700000000}
    peer.answers("GET /v1/fine_tuning/jobs/ftjob-1", waiting)
    shown = run("jobs", "show", "ftjob-1").stdout
    assert "earlier_jobs count=2, devices needed=1 held=2, expected to start " in " ".join(shown.split())


def test_pause_and_resume(peer: Peer) -> None:
    peer.answers("POST /v1/fine_tuning/jobs/ftjob-1/pause", JOB)
    assert run("jobs", "pause", "ftjob-1").stdout.startswith("ftjob-1  running (it pauses as soon as")
    peer.answers("POST /v1/fine_tuning/jobs/ftjob-1/pause", JOB | {"status": "paused"})
    assert run("jobs", "pause", "ftjob-1").stdout == "ftjob-1  paused\n"
    peer.answers("POST /v1/fine_tuning/jobs/ftjob-1/resume", JOB | {"status": "queued"})
    assert run("jobs", "resume", "ftjob-1").stdout == "ftjob-1  queued\n"


RETRY = "POST /v1/fine_tuning/jobs/ftjob-1/retry"


def test_retry(peer: Peer) -> None:
    peer.answers(RETRY, JOB | {"id": "ftjob-2", "retry_of": "ftjob-1"})
    assert run("jobs", "retry", "ftjob-1").stdout == "ftjob-2\n"
    assert peer.requests[-1].json() == {}
    assert run("jobs", "retry", "ftjob-1", "-p", "n_epochs=1").stdout == "ftjob-2\n"
    assert peer.requests[-1].json() == {"hyperparameters": {"n_epochs": 1}}


def test_retry_as_suggested(peer: Peer) -> None:
    changes = {"method.supervised.hyperparameters.micro_batch_size": 2}
    failed = JOB | {"status": "failed", "diagnosis": {"suggestion": {"text": "Smaller.", "changes": changes}}}
    peer.answers("GET /v1/fine_tuning/jobs/ftjob-1", failed)
    peer.answers(RETRY, JOB | {"id": "ftjob-2"})
    assert run("jobs", "retry", "ftjob-1", "--as-suggested", "-p", "n_epochs=1").stdout == "ftjob-2\n"
    assert peer.requests[-1].json() == {"hyperparameters": {"micro_batch_size": 2, "n_epochs": 1}}
    peer.answers("GET /v1/fine_tuning/jobs/ftjob-1", JOB)
    assert run("jobs", "retry", "ftjob-1", "--as-suggested").exit_code == 2


def test_a_retry_cannot_change_the_resources(peer: Peer) -> None:
    diagnosis = {"suggestion": {"text": "Fewer.", "changes": {"resources.nnodes": 1}}}
    peer.answers("GET /v1/fine_tuning/jobs/ftjob-1", JOB | {"status": "failed", "diagnosis": diagnosis})
    refused = run("jobs", "retry", "ftjob-1", "--as-suggested")
    assert refused.exit_code == 2
    assert "resources.nnodes=1" in refused.output


# --- deployments and chat -----------------------------------------------------------------------------------


def test_a_deployment_is_waited_for(peer: Peer) -> None:
    deployment = {"id": "dep-1", "model": "m", "status": "pending", "error": None, "created_at": 1700000000}
    peer.answers("POST /v1/deployments", deployment)
    peer.answers("GET /v1/deployments/dep-1", deployment, deployment | {"status": "ready"})
    assert run("deployments", "create", "m").stdout == "dep-1  m  ready\n"
    peer.answers(
        "GET /v1/deployments/dep-1", deployment | {"status": "failed", "error": {"message": "Too big."}}
    )
    result = run("deployments", "create", "m")
    assert (result.exit_code, result.stderr) == (1, "m could not be loaded: Too big.\n")


def sse(*frames: Any, done: bool = True) -> Answer:
    lines = [f"data: {json.dumps(frame)}\n\n" for frame in frames] + (["data: [DONE]\n\n"] if done else [])
    return Answer((": ping\n\n" + "".join(lines)).encode(), headers={"content-type": "text/event-stream"})


def delta(text: str | None, finish: str | None = None) -> dict[str, Any]:
    content = {} if text is None else {"content": text}
    return {"choices": [{"index": 0, "delta": content, "finish_reason": finish}]}


CHAT = "POST /v1/chat/completions"


def test_one_question_is_streamed(peer: Peer) -> None:
    peer.answers(CHAT, sse(delta(""), delta("Hel"), delta("lo\x1b[2J"), delta(None, "stop")))
    options = ["--system", "Be kind.", "--temperature", "0", "--max-tokens", "9"]
    result = run("chat", "m", "--message", "Hi", *options)
    assert result.stdout == "Hello[2J\n"
    assert peer.requests[0].json() == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
        "temperature": 0,
        "max_completion_tokens": 9,
        "stream": True,
    }


def test_a_whole_answer(peer: Peer) -> None:
    choice = {"message": {"content": "Hello"}, "finish_reason": "length"}
    peer.answers(CHAT, {"choices": [choice]})
    result = run("chat", "m", "--message", "Hi", "--no-stream")
    assert result.stdout == "Hello\n"
    assert "token limit" in result.stderr


def test_a_model_that_loads_is_waited_for(peer: Peer) -> None:
    loading = error(503, "still loading", code="model_loading")
    loading.headers["retry-after"] = "0"
    peer.answers(CHAT, loading, sse(delta("Hello", "stop")))
    assert run("chat", "m", "--message", "Hi").stdout == "Hello\n"


@pytest.mark.parametrize(
    "answer", [sse(delta("Hel"), done=False), sse(delta("Hel"), {"error": {"message": "engine died"}})]
)
def test_an_answer_that_breaks_off_is_an_error(peer: Peer, answer: Answer) -> None:
    peer.answers(CHAT, answer)
    result = run("chat", "m", "--message", "Hi")
    assert result.exit_code == 1
    assert "broke off" in result.stderr


def test_a_conversation_remembers_and_survives_an_error(peer: Peer) -> None:
    hello, bye = sse(delta("Hello", "stop")), sse(delta("Bye", "stop"))
    peer.answers(CHAT, hello, error(400, "too long"), bye, hello)
    result = run("chat", "m", stdin="Hi\n\nagain\nbye\n/new\nHi\n")
    assert result.exit_code == 0
    assert result.stdout == "Hello\nBye\nHello\n"
    assert "too long" in result.stderr
    said = [[message["content"] for message in request.json()["messages"]] for request in peer.requests]
    assert said == [["Hi"], ["Hi", "Hello", "again"], ["Hi", "Hello", "bye"], ["Hi"]]
