"""Every service of docker-compose.yml, without its container: started, used and stopped as the file says."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.deploy.compose import ENGINES_ADDRESS, Deployment
from tests.deploy.compose_stack import deployed
from tests.stack import processes_of, wait_for

pytestmark = pytest.mark.long
HYPERPARAMETERS = {"n_epochs": 1, "batch_size": 8, "max_length": 128}


@pytest.fixture
def deployment(postgres_url: str, tiny_model: Path) -> Iterator[Deployment]:
    """The CPU profile, started in the order of the file; the tiny model may be imported."""
    del postgres_url  # asked for because it readies PostgreSQL's files and, for root, its user
    with deployed(tiny_model) as deployment:
        yield deployment


def train(client: OpenAI, source: Path) -> str:
    """Upload, check, train and merge; the new model's name."""
    with source.open("rb") as rows:
        file = client.files.create(file=rows, purpose="fine-tune")
    assert client.files.wait_for_processing(file.id, poll_interval=0.5).status == "processed"
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": HYPERPARAMETERS}}
    job_id = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method=method).id

    def ended() -> Any:
        job = client.fine_tuning.jobs.retrieve(job_id)
        return job if job.status in ("succeeded", "failed", "cancelled") else None

    job = wait_for(ended, within_s=400, what="the end of the job", every_s=1)
    assert job.status == "succeeded", job.error
    return job.fine_tuned_model


def test_the_main_job_on_the_services_of_the_file(deployment: Deployment, chat_file: Path) -> None:
    key_file = deployment.volume("keys") / "admin.key"
    assert key_file.stat().st_mode & 0o777 == 0o600
    key, address = key_file.read_text().strip(), f"http://127.0.0.1:{deployment.ports['8700']}"
    with httpx.Client(
        base_url=f"{address}/v1", headers={"authorization": f"Bearer {key}"}, timeout=60, trust_env=False
    ) as http:
        source = str(deployment.volume("imports") / "tiny")
        assert http.post("/models/import", json={"id": "tiny", "source": source}).status_code == 200
        wait_for(
            lambda: http.get("/models/tiny").json()["status"] == "ready",
            within_s=200,
            what="the import",
            every_s=0.5,
        )
    client = OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=5)
    answer = client.chat.completions.create(
        model=train(client, chat_file), messages=[{"role": "user", "content": "Hello"}], max_tokens=4
    )
    assert answer.choices[0].finish_reason in ("stop", "length")

    engines = [p for p in processes_of(deployment.folder) if "trainers.engine" in p.cmdline()]
    listening = {entry.laddr.ip for entry in engines[0].net_connections() if entry.status == "LISTEN"}
    assert listening == {ENGINES_ADDRESS}
    of_trainers = engines[0].environ()
    assert not [name for name in of_trainers if "URL" in name or "SECRETS" in name]

    deployment.start("migrate")  # as an upgrade does, beside all that runs
    assert deployment.processes["migrate"].wait(timeout=200) == 0, deployment.log("migrate")
    assert key_file.read_text().strip() == key
    assert deployment.is_healthy("api")

    for name in reversed([*deployment.processes]):
        if name != "migrate":
            deployment.stop(name)
    assert processes_of(deployment.folder) == []
