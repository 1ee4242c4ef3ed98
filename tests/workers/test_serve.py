"""Engines as the database desires them: started on demand, restarted when they die, ended on delete."""

import psutil
import pytest
from openai import OpenAI

from tests.stack import Stack, processes_of, wait_for

QUESTION = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


def engines_of(stack: Stack) -> list[psutil.Process]:
    return [p for p in processes_of(stack.home) if "trainers.engine" in p.cmdline()]


@pytest.fixture
def deployed(stack: Stack) -> str:
    """The id of a ready deployment of the tiny model."""
    with stack.http() as client:
        made = client.post("/deployments", json={"model": "tiny"}).json()
        wait_for(
            lambda: client.get(f"/deployments/{made['id']}").json()["status"] == "ready",
            within_s=150,
            what="the engine",
        )
    return made["id"]


def engine_of_deployment(stack: Stack, deployment_id: str) -> psutil.Process:
    return next(p for p in engines_of(stack) if any(deployment_id in word for word in p.cmdline()))


def test_a_killed_engine_is_restarted_and_the_client_only_waits(stack: Stack, deployed: str) -> None:
    engine = engine_of_deployment(stack, deployed)
    engine.kill()
    client: OpenAI = stack.sdk(max_retries=5)
    answer = client.chat.completions.create(**QUESTION, temperature=0)  # type: ignore[call-overload]
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert engine_of_deployment(stack, deployed).pid != engine.pid


def test_delete_ends_the_process_and_the_next_chat_starts_another(stack: Stack, deployed: str) -> None:
    engine = engine_of_deployment(stack, deployed)
    with stack.http() as client:
        assert client.delete(f"/deployments/{deployed}").json()["deleted"] is True
        wait_for(lambda: not engine.is_running(), within_s=20, what="the end of the engine")
        wait_for(
            lambda: client.get(f"/deployments/{deployed}").json()["status"] == "stopped",
            within_s=20,
            what="the node to say so",
        )
    stack.sdk().chat.completions.create(**QUESTION)  # type: ignore[call-overload]
