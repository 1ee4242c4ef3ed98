"""A stack that may be broken, which all tests of this folder share: what it does not survive is a finding."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from db.session import Database
from tests.deploy.compose_stack import compose_stack
from tests.faults import parts
from tests.faults.history import Op, Witness, check, read_witness
from tests.stack import FAST, Stack, processes_of, start_stack, wait_for


@pytest.fixture(scope="session", params=["up"])
def stack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Iterator[Stack]:
    """`residency up` on SQLite and its own Redis, with two training slots and the tiny model.

    For `compose` (see `parts.on_both`) the services of docker-compose.yml.
    """
    if request.param == "compose":
        request.getfixturevalue("postgres_url")  # readies PostgreSQL's files and, for root, its user
        with compose_stack(tiny_model, FAST) as stack:
            yield stack
        return
    home = tmp_path_factory.mktemp("broken") / "home"
    stack = start_stack(home, import_dirs=[tiny_model], workers=2)
    stack.import_model(tiny_model, model_id="tiny")
    yield stack
    assert stack.stop() == 0
    assert processes_of(home) == []


@pytest.fixture(autouse=True)
def number(request: pytest.FixtureRequest) -> int:
    """Which repetition of a test this is."""
    return getattr(request, "param", 0)


@pytest.fixture
def stack_database(stack: Stack) -> Iterator[Database]:
    database = Database(stack.database_url)
    yield database
    database.dispose()


@pytest.fixture
def judge(stack: Stack, stack_database: Database) -> Callable[..., Witness]:
    """Waits for the end of jobs and of all that worked on them, and finds no fault with their history."""

    def judge(*job_ids: str, cancels: Sequence[Op] = (), **options: Any) -> Witness:
        def seen() -> Witness:
            whole = read_witness(stack_database, stack.home / "runs")
            mine = [held for held in whole.attempts if held.what.split()[-1] in job_ids]
            return Witness([job for job in whole.jobs if job.id in job_ids], mine, whole.devices)

        def over() -> Witness | None:
            witness = seen()
            held = [*witness.attempts, *witness.devices]
            return witness if all(lease.end is not None for lease in held) else None

        witness = wait_for(over, within_s=30, what="all leases to be given back", every_s=0.5)
        ops = [Op("create", str(job.key), 0, 0, "yes", id=job.id) for job in witness.jobs]
        assert len(ops) == len(job_ids)
        assert check([*ops, *cancels], witness, **options) == []
        for job_id in job_ids:
            wait_for(lambda: not parts.attempts(stack, job_id=job_id), within_s=15, what="no orphan")  # noqa: B023
        return witness

    return judge
