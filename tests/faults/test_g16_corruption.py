"""A damaged checkpoint is found before it is loaded: training falls back, a deployment is refused (G16)."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import parts
from tests.faults.history import Witness
from tests.faults.injections import DAMAGES
from tests.stack import Stack, wait_for
from tests.workers.test_recovery import job_of, submit, wait_for_checkpoint, wait_for_end
from trainers.folders.checkpoints import list_checkpoints

pytestmark = [pytest.mark.faults(g=16), pytest.mark.timeout(3600)]
FILES = ("adapter_model.safetensors", "optimizer.pt", "MANIFEST.json", "trainer_state.json")


def checkpoints_of(stack: Stack, job_id: str) -> list[tuple[int, Path]]:
    """(step, folder) of what the first attempt saved, newest last."""
    return list_checkpoints(stack.home / "runs" / job_id / "1" / "checkpoints")


@parts.repeated(len(FILES) * len(DAMAGES))
def test_training_falls_back_and_the_deployment_names_the_file(
    stack: Stack, chat_file: Path, judge: Callable[..., Witness], number: int
) -> None:
    name, damage = FILES[number // len(DAMAGES)], DAMAGES[number % len(DAMAGES)]
    job_id = submit(stack, chat_file, max_steps=2_000, save_steps=3)
    wait_for_checkpoint(stack, job_id)
    wait_for(lambda: len(checkpoints_of(stack, job_id)) > 1, within_s=200, what="a second checkpoint")
    with stack.http() as client:
        client.post(f"/fine_tuning/jobs/{job_id}/pause").raise_for_status()
        wait_for(lambda: job_of(stack, job_id)["status"] == "paused", within_s=120, what="the pause")
        (older, _), (newest, folder) = checkpoints_of(stack, job_id)[-2:]

        damage(folder / name)

        [tuned] = [
            c for c in stack.sdk().fine_tuning.jobs.checkpoints.list(job_id) if c.step_number == newest
        ]
        answer = client.post("/deployments", json={"model": tuned.fine_tuned_model_checkpoint})
        deployment = answer.json()
        assert answer.is_success, deployment

        def refused() -> dict | None:
            seen = client.get(f"/deployments/{deployment['id']}").json()
            assert seen["status"] != "ready"
            return seen if seen["status"] == "failed" else None

        assert name in str(wait_for(refused, within_s=200, what="the refusal")["error"])

        client.post(f"/fine_tuning/jobs/{job_id}/resume").raise_for_status()
        told = "Resuming from the checkpoint at step"
        wait_for(lambda: any(m.startswith(told) for m in messages(stack, job_id)), within_s=200, what=told)
        client.post(f"/fine_tuning/jobs/{job_id}/cancel").raise_for_status()
    assert wait_for_end(stack, job_id)["status"] == "cancelled"

    [job] = judge(job_id, damaged=frozenset({job_id})).jobs
    [found] = [data for _, data in job.events if data.get("code") == "checkpoint.corrupt"]
    assert name in found["problem"]
    assert Path(found["path"]) == folder
    assert f"{told} {older}" in [message for message, _ in job.events]


def messages(stack: Stack, job_id: str) -> list[str]:
    """What the events of a job say."""
    return [event.message for event in stack.sdk().fine_tuning.jobs.list_events(job_id, limit=100)]
