"""The official client, unchanged, old and new: `sdk_checks` in the environment of each version."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.contracts.sdk_checks.context import TERMINAL, Context
from tests.contracts.sdk_checks.run import CHECKS
from tests.stack import Stack, wait_for

HERE = Path(__file__).parent
# One file of pins a version; the Makefile makes the environments from them.
VERSIONS = [path.stem.removeprefix("openai-") for path in sorted(HERE.glob("openai-*.txt"))]
NEWEST = VERSIONS[-1]
OLDER = [pytest.param(version, marks=pytest.mark.long) for version in VERSIONS[:-1]]
SLASHED = "org/tiny-slash"
LIMIT_S = 300
HYPERPARAMETERS = {
    "n_epochs": 2,
    "batch_size": 4,
    "learning_rate": 0.01,
    "max_length": 128,
    "save_steps": 8,
    "max_validation_overlap": 1,  # the same rows tell what was learnt
}


@pytest.fixture(scope="module")
def http(stack: Stack) -> Iterator[httpx.Client]:
    with stack.http() as client:
        yield client


@pytest.fixture(scope="module")
def contexts(
    stack: Stack, http: httpx.Client, chat_file: Path, tiny_model: Path
) -> Iterator[dict[str, Context]]:
    """A finished job, and behind it one that keeps the device until the checks are over."""
    for version in VERSIONS:
        assert python_of(version).exists(), (
            f"{python_of(version)} is missing: run `make install` or `make test`"
        )
    files = [upload(http, chat_file), upload(http, chat_file)]
    finished = create_job(http, HYPERPARAMETERS, training_file=files[0], validation_file=files[1])
    endless = HYPERPARAMETERS | {"max_steps": 1_000_000, "save_steps": 1_000_000, "logging_steps": 20}
    running = create_job(http, endless, training_file=files[0])
    try:
        stack.import_model(tiny_model, model_id=SLASHED)
        job = wait_for(lambda: ended(http, finished), within_s=300, what="the job's end", every_s=0.5)
        assert job["status"] == "succeeded", job["error"]
        wait_for(lambda: job_of(http, running)["estimated_finish"], within_s=150, what="the long job's steps")
        yield {
            version: Context(
                version=version,
                base="tiny",
                slashed=SLASHED,
                training_file=files[0],
                validation_file=files[1],
                finished_job=finished,
                running_job=running,
                may_delete=version == NEWEST,
            )
            for version in VERSIONS
        }
    finally:  # the tests after these need the device
        assert http.post(f"/fine_tuning/jobs/{running}/cancel").status_code == 200
        wait_for(lambda: ended(http, running), within_s=150, what="the end of the long job")


@pytest.fixture(scope="module", params=[*OLDER, NEWEST])
def results(
    request: pytest.FixtureRequest,
    stack: Stack,
    contexts: dict[str, Context],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str | None]:
    """What went wrong with each check that came to an end, None for nothing."""
    folder = tmp_path_factory.mktemp(f"openai-{request.param}")
    (folder / "context.json").write_text(json.dumps(asdict(contexts[request.param])))
    # A clean environment, and a folder from which nothing of ours can be imported but the checks.
    argv = [str(python_of(request.param)), "-m", "sdk_checks.run", str(folder / "context.json")]
    env = {"PATH": os.defpath, "OPENAI_BASE_URL": stack.url, "OPENAI_API_KEY": stack.key}
    with (folder / "results.jsonl").open("wb") as out, suppress(subprocess.TimeoutExpired):
        subprocess.run(argv, cwd=HERE, env=env, stdout=out, timeout=LIMIT_S, check=False)
    found = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return {result["check"]: result["failure"] for result in found}


@pytest.mark.parametrize("check", CHECKS)
def test_the_contract_holds(results: dict[str, str | None], check: str) -> None:
    assert check in results, "the check did not come to an end"
    if (failure := results[check]) is not None:
        pytest.fail(failure, pytrace=False)


def python_of(version: str) -> Path:
    """The interpreter of an environment with that `openai`."""
    return HERE.parents[1] / ".contracts" / f"openai-{version}" / "bin" / "python"


def upload(http: httpx.Client, path: Path) -> str:
    """Upload training rows and wait until they are checked; the id of the file."""
    answer = http.post(
        "/files", files={"file": (path.name, path.read_bytes())}, data={"purpose": "fine-tune"}
    )
    assert answer.status_code == 200, answer.text
    file_id = answer.json()["id"]
    wait_for(
        lambda: http.get(f"/files/{file_id}").json()["status"] == "processed",
        within_s=150,
        what="the check of a file",
    )
    return file_id


def create_job(http: httpx.Client, hyperparameters: dict[str, Any], **files: str) -> str:
    """The id of a new job."""
    method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    body = {"model": "tiny", "suffix": "sdk", "method": method, **files}
    answer = http.post("/fine_tuning/jobs", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def job_of(http: httpx.Client, job_id: str) -> dict[str, Any]:
    """The job as it is now."""
    return http.get(f"/fine_tuning/jobs/{job_id}").json()


def ended(http: httpx.Client, job_id: str) -> dict[str, Any] | None:
    """The job, once it has come to an end."""
    job = job_of(http, job_id)
    return job if job["status"] in TERMINAL else None
