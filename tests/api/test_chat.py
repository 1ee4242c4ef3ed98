"""Chat: finding the engine, waiting for it, and passing its answer on, to the bad end if need be."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection

import httpx
import openai
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient
from openai import OpenAI
from prometheus_client import REGISTRY
from sqlalchemy import func, select

from api.main import create_app
from db import deployments
from db.models import Deployment

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]


@dataclass
class Engine:
    """What the peer saw."""

    address: str = ""
    bodies: list[dict] = field(default_factory=list)
    asked: threading.Event = field(default_factory=threading.Event)
    abandoned: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)


def frame(text: str) -> bytes:
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'content': text}}]})}\n\n".encode()


def engine_app(engine: Engine) -> FastAPI:
    """A server of OpenAI's shape; the first message says how it behaves."""
    app = FastAPI()

    @app.post(CHAT)
    async def chat(request: Request):
        body = await request.json()
        engine.bodies.append(body)
        engine.asked.set()
        behaviour = body["messages"][0]["content"]
        if behaviour == "refuse":
            error = {
                "message": "n is too large",
                "type": "invalid_request_error",
                "param": "n",
                "code": "invalid_value",
            }
            return JSONResponse({"error": error}, 400)
        if behaviour == "never":
            return await until_left(request)
        if body.get("stream"):
            return StreamingResponse(frames(behaviour), media_type="text/event-stream")
        message = {"role": "assistant", "content": "Hello"}
        return {
            "object": "chat.completion",
            "model": body["model"],
            "choices": [{"index": 0, "message": message}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
        }

    async def until_left(request: Request):
        while not await request.is_disconnected():
            await asyncio.sleep(0.01)
        engine.abandoned.set()
        return JSONResponse({})

    async def frames(behaviour: str) -> AsyncIterator[bytes]:
        try:
            yield frame("one")
            if behaviour == "die":
                yield frame("two")[:20]
                raise ConnectionAbortedError("the engine dies")
            if behaviour == "hold":
                while not engine.go_on.is_set():
                    await asyncio.sleep(0.01)
            if behaviour == "forever":
                while True:
                    await asyncio.sleep(0.01)
                    yield frame("more")
            yield frame("two")
            if behaviour == "usage":
                usage = {"prompt_tokens": 5, "completion_tokens": 3}
                yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode()
            if behaviour != "stop short":
                yield b"data: [DONE]\n\n"
        except asyncio.CancelledError:
            engine.abandoned.set()
            raise

    return app


@pytest.fixture
def engine(serve) -> Iterator[Engine]:
    engine = Engine()
    with serve(engine_app(engine)) as engine.address:
        yield engine


@pytest.fixture
def model(world, engine) -> str:
    """A model that the peer serves."""
    world.deploy(world.base_model(), address=engine.address)
    return "org/base"


def ask(client, model: str, behaviour: str = "answer", **more) -> httpx.Response:
    return client.post(
        CHAT, json={"model": model, "messages": [{"role": "user", "content": behaviour}], **more}
    )


@pytest.fixture
def remote(server, world) -> Iterator[httpx.Client]:
    """A client of the app behind a real server."""
    headers = {"authorization": f"Bearer {world.user}"}
    with httpx.Client(base_url=server, headers=headers, trust_env=False, timeout=20) as client:
        yield client


def test_whole_answer(client, model, engine):
    answer = ask(client, model, temperature=0.5, user="u", unknown={"a": [1]})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == "Hello"
    assert answer.headers["content-type"] == "application/json"
    expected = {"model": model, "temperature": 0.5, "user": "u", "unknown": {"a": [1]}}
    assert engine.bodies[0] == expected | {"messages": [{"role": "user", "content": "answer"}]}


def test_tokens_are_counted_where_answers_tell_them(client, model):
    def counted() -> list[float]:
        name, kinds = "residency_chat_tokens_total", ("prompt", "completion")
        return [REGISTRY.get_sample_value(name, {"model": model, "kind": kind}) or 0.0 for kind in kinds]

    before = counted()
    ask(client, model)
    assert [now - then for now, then in zip(counted(), before, strict=True)] == [7, 2]
    ask(client, model, "usage", stream=True)
    ask(client, model, "refuse")
    assert [now - then for now, then in zip(counted(), before, strict=True)] == [12, 5]


def test_refusals_of_the_engine_are_passed_on(client, model):
    for stream in (False, True):
        answer = ask(client, model, "refuse", stream=stream)
        assert answer.status_code == 400
        assert answer.json()["error"] == {
            "message": "n is too large",
            "type": "invalid_request_error",
            "param": "n",
            "code": "invalid_value",
        }


def test_stream_comes_as_it_is_made(remote, model, engine):
    body = {"model": model, "messages": [{"role": "user", "content": "hold"}], "stream": True}
    with remote.stream("POST", CHAT, json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["x-request-id"]
        chunks = answer.iter_raw()
        assert next(chunks) == frame("one")  # while the engine waits
        engine.go_on.set()
        assert b"".join(chunks) == frame("two") + b"data: [DONE]\n\n"


@pytest.mark.parametrize("behaviour", ["die", "stop short"])
def test_death_in_the_middle_of_a_stream_is_told(remote, model, behaviour):
    answer = ask(remote, model, behaviour, stream=True)
    assert answer.status_code == 200
    events = [line.removeprefix("data: ") for line in answer.text.split("\n") if line]
    assert events[0] == frame("one").decode().strip().removeprefix("data: ")
    error = json.loads(events[-1])["error"]
    assert (error["code"], error["type"]) == ("engine_died", "server_error")
    assert answer.text.endswith("\n\n")
    assert all(json.loads(event) for event in events)  # not one cut frame


def test_a_server_told_to_stop_ends_its_streams_with_a_word(serve, world, model, engine, monkeypatch):
    monkeypatch.setattr("api.chat._LAST_S", 0.2)
    app = create_app(world.settings, world.database)
    body = {"model": model, "messages": [{"role": "user", "content": "forever"}], "stream": True}
    headers = {"authorization": f"Bearer {world.user}"}
    with serve(app) as address, httpx.Client(base_url=address, headers=headers, trust_env=False) as client:
        with client.stream("POST", CHAT, json=body) as answer:
            chunks = answer.iter_raw()
            assert next(chunks) == frame("one")
            app.state.watch.stop()
            *_, last = b"".join(chunks).strip().splitlines()
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "server_stopping"
    assert engine.abandoned.wait(20)


def test_a_server_told_to_stop_lets_nobody_wait_for_an_engine(world, settings):
    settings.chat_hold_s = 60
    world.deploy(world.base_model(), status="loading")
    app = create_app(settings, world.database)
    with TestClient(app, headers={"authorization": f"Bearer {world.user}"}) as client:
        threading.Timer(0.3, app.state.watch.stop).start()
        began = time.monotonic()
        answer = ask(client, "org/base")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_loading")
    assert time.monotonic() - began < 10


def test_client_that_leaves_a_stream_stops_the_engine(remote, model, engine):
    body = {"model": model, "messages": [{"role": "user", "content": "forever"}], "stream": True}
    with remote.stream("POST", CHAT, json=body) as answer:
        next(answer.iter_raw())
    assert engine.abandoned.wait(20)


def test_client_that_leaves_a_whole_answer_stops_the_engine(server, world, model, engine):
    body = {"model": model, "messages": [{"role": "user", "content": "never"}]}
    client = HTTPConnection(httpx.URL(server).netloc.decode())
    headers = {"authorization": f"Bearer {world.user}", "content-type": "application/json"}
    client.request("POST", CHAT, json.dumps(body), headers)
    assert engine.asked.wait(20)
    assert not engine.abandoned.is_set()
    client.close()
    assert engine.abandoned.wait(20)


def test_the_official_client_chats(server, world, model):
    with OpenAI(base_url=f"{server}/v1", api_key=world.user) as sdk:
        whole = sdk.chat.completions.create(model=model, messages=[{"role": "user", "content": "answer"}])
        assert whole.choices[0].message.content == "Hello"
        chunks = sdk.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "answer"}], stream=True
        )
        assert [chunk.choices[0].delta.content for chunk in chunks] == ["one", "two"]


@pytest.mark.parametrize("behaviour", ["die", "stop short"])
def test_the_official_client_learns_of_the_death(server, world, model, behaviour):
    with OpenAI(base_url=f"{server}/v1", api_key=world.user) as sdk:
        chunks = sdk.chat.completions.create(
            model=model, messages=[{"role": "user", "content": behaviour}], stream=True
        )
        with pytest.raises(openai.APIError, match="died while it answered"):
            list(chunks)


def test_unknown_model(client):
    error = ask(client, "nobody/knows").json()["error"]
    assert error["code"] == "model_not_found"
    assert error["message"] == "The model `nobody/knows` does not exist or you do not have access to it."


def test_model_that_is_not_deployed(client, world):
    answer = ask(client, world.base_model())
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "model_not_deployed", "model")
    assert "POST /v1/deployments" in error["message"]


def test_model_that_is_being_imported(client, as_admin):
    client.post("/v1/models/import", json={"id": "m", "source": "/s"}, headers=as_admin)
    answer = ask(client, "m")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_not_ready")
    assert answer.headers["retry-after"] == "5"


def test_failed_deployment_is_told_at_once(client, world):
    error = {"code": "engine_failed", "message": "The engine died 4 times."}
    world.deploy(world.base_model(), status="failed", error=error)
    answer = ask(client, "org/base")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "deployment_failed")
    assert "died 4 times" in answer.json()["error"]["message"]
    assert answer.headers["x-should-retry"] == "false"


def test_gives_up_waiting_with_a_hint(client, world, settings):
    settings.chat_hold_s = 0.3
    world.deploy(world.base_model(), status="loading")
    began = time.monotonic()
    answer = ask(client, "org/base")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_loading")
    assert 1 <= int(answer.headers["retry-after"]) <= 120
    assert 0.3 <= time.monotonic() - began < 5


def test_waits_until_the_engine_is_ready(client, world, engine):
    deployment_id = world.deploy(world.base_model(), status="loading")

    def become_ready() -> None:
        with world.database.write() as session:
            deployments.report(session, deployment_id, status="ready", address=engine.address)

    timer = threading.Timer(0.5, become_ready)
    timer.start()
    assert ask(client, "org/base").status_code == 200
    timer.join()


def test_first_chat_deploys_when_allowed(client, world, settings):
    settings.auto_deploy, settings.chat_hold_s = True, 0.3
    world.base_model()
    for _ in range(2):
        assert ask(client, "org/base").json()["error"]["code"] == "model_loading"
    with world.database.read() as session:
        rows = session.scalars(select(Deployment)).all()
    assert [(row.auto, row.status) for row in rows] == [(True, "pending")]


def test_engine_that_is_gone(client, world):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    world.deploy(world.base_model(), address=f"http://127.0.0.1:{free}")
    answer = ask(client, "org/base")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_loading")
    assert answer.headers["retry-after"] == "1"


def test_engine_that_hangs_up(client, world):
    """A peer that accepts, reads and closes without a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            connection, _ = listener.accept()
            connection.recv(65536)
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        world.deploy(world.base_model(), address=f"http://127.0.0.1:{listener.getsockname()[1]}")
        answer = ask(client, "org/base")
        thread.join()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_died")


def test_use_is_noted(client, world, engine):
    deployment_id = world.deploy(world.base_model(), address=engine.address)
    with world.database.write() as session:
        session.get_one(Deployment, deployment_id).last_used_at = 1.0
    ask(client, "org/base")
    assert world.deployment(deployment_id).last_used_at > 1e9


@pytest.mark.parametrize("name", ["chat_template", "chat_template_kwargs"])
def test_no_template_in_a_request(client, model, engine, name):
    answer = ask(client, model, **{name: "{% for i in range(9) %}"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", name)
    assert engine.bodies == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": MESSAGES}, "model"),
        ({"model": "m"}, "messages"),
        ({"model": "m", "messages": []}, "messages"),
        ({"model": "m", "messages": "Hi"}, "messages"),
        ({"model": "m", "messages": ["Hi"]}, "messages.0"),
        ({"model": 1, "messages": MESSAGES}, "model"),
        ({"model": "m", "messages": MESSAGES, "stream": "yes"}, "stream"),
    ],
)
def test_bodies_that_are_refused(client, body, param):
    answer = client.post(CHAT, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_no_session_is_held_while_streaming(remote, world, model, engine):
    body = {"model": model, "messages": [{"role": "user", "content": "hold"}], "stream": True}
    with remote.stream("POST", CHAT, json=body) as answer:
        chunks = answer.iter_raw()
        next(chunks)
        assert world.database.engine.pool.checkedout() == 0
        with world.database.read() as session:
            assert session.scalar(select(func.count()).select_from(Deployment)) == 1
        engine.go_on.set()
        list(chunks)
