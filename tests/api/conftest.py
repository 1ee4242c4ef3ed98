"""The real app on a real database, keys for two tenants, and hands that do what workers do."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before anything imports the doorbell: nobody listens here, so that every ring fails at once.
os.environ.setdefault("RESIDENCY_REDIS_URL", "redis+socket:///nonexistent/residency.sock")

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from api.main import create_app
from api.settings import ApiSettings
from db import claims, deployments, files, jobs, keys, registry, tasks
from db.blobs import BlobWriter
from db.models import Deployment, Model
from db.session import Database, clock
from db.tables import Org
from db.tasks import Lease, Owner
from db.work_models import Task

PEPPER = "p" * 32
ORG, OTHER_ORG = keys.DEFAULT_ORG_ID, "org-other"
ROWS = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'


@pytest.fixture
def database(request: pytest.FixtureRequest) -> Database:
    """SQLite, unless a test asks for both databases with `@on_both`."""
    return request.getfixturevalue(f"{getattr(request, 'param', 'sqlite')}_database")


@pytest.fixture
def settings(tmp_path: Path) -> ApiSettings:
    return ApiSettings.model_validate(
        {"home": tmp_path / "home", "key_pepper": PEPPER, "max_upload_bytes": 200_000, "chat_hold_s": 10}
    )


@dataclass
class World:
    """Two tenants and a worker's hands."""

    database: Database
    settings: ApiSettings
    user: str = field(init=False)
    admin: str = field(init=False)
    stranger: str = field(init=False)

    def __post_init__(self) -> None:
        with self.database.write() as session:
            keys.ensure_default_org(session)
            session.add(Org(id=OTHER_ORG, name="other", created_at=clock(session)))
            session.flush()
            self.user = keys.create(session, org_id=ORG, name="u", role="user", pepper=PEPPER)
            self.admin = keys.create(session, org_id=ORG, name="a", role="admin", pepper=PEPPER)
            self.stranger = keys.create(session, org_id=OTHER_ORG, name="s", role="admin", pepper=PEPPER)

    def base_model(self, model_id: str = "org/base") -> str:
        """A base model that was imported."""
        with self.database.write() as session:
            pk = registry.start_import(session, org_id=ORG, model_id=model_id, source="/source").pk
        lease = self.claim("cpu")
        assert (lease.kind, lease.subject_id) == ("import", str(pk))
        with tasks.fenced(self.database, lease) as session:
            report = {"digest": "d1", "context_length": 2048}
            registry.record_import(session, pk, path=self.settings.models_dir / "base", report=report)
            tasks.finish(session, lease, outcome="done")
        return model_id

    def file(
        self,
        *,
        checked: bool = True,
        purpose: str = "fine-tune",
        org_id: str = ORG,
        kind: str = "conversation",
        content: bytes = ROWS,
    ) -> str:
        """An uploaded file; `kind` is what its check found."""
        with BlobWriter(self.settings.blobs_dir, org_id) as writer:
            writer.write(content)
            writer.sync()
            with self.database.write() as session:
                file = files.create(session, writer, org_id=org_id, filename="rows.jsonl", purpose=purpose)
        if checked and purpose == "fine-tune":
            self.check_file(file.id, kind=kind)
        return file.id

    def check_file(
        self,
        file_id: str,
        *,
        error: str | None = None,
        kind: str = "conversation",
        report: dict[str, Any] | None = None,
    ) -> None:
        """What a worker does with a training file."""
        lease = self.claim("cpu")
        assert (lease.kind, lease.subject_id) == ("validate", file_id)
        with tasks.fenced(self.database, lease) as session:
            tasks.finish(session, lease, outcome="done")
            files.record_check(session, file_id, report=report or {"rows": 1, "kind": kind}, error=error)
            jobs.files_checked(session, file_id)

    def start(self, job_id: str, *, resolved: dict[str, Any] | None = None) -> Lease:
        """Claim and start a job."""
        with self.database.write() as session:
            lease = self._claim(session, "train")
            assert lease.subject_id == job_id
            jobs.start(session, lease, resolved=resolved or {"n_epochs": 3, "batch_size": 4})
        return lease

    def finish(self, lease: Lease) -> str:
        """End the training behind `lease` and its merge; the new model's id."""
        with tasks.fenced(self.database, lease) as session:
            jobs.finish_training(session, lease, exit_={"trained_tokens": 512})
        merge = self.claim("cpu")
        folder = self.settings.models_dir / lease.subject_id
        folder.mkdir(parents=True)
        with tasks.fenced(self.database, merge) as session:
            job = jobs.finish_merge(
                session, merge, path=folder, adapter_path=folder / "a", report={"digest": "d2"}
            )
        return str(job.fine_tuned_model)

    def skip_delays(self) -> None:
        """Let the pause before a next attempt be over."""
        with self.database.write() as session:
            session.execute(update(Task).values(not_before=0.0))

    def claim(self, queue: str) -> Lease:
        with self.database.write() as session:
            return self._claim(session, queue)

    def _claim(self, session: Any, queue: str) -> Lease:
        owner = Owner(node="node", pid=1, started_at=1.0)
        devices = ["slot:0", "slot:1"]
        lease = claims.claim(session, queue=queue, owner=owner, devices=devices, shared_slot=True, ttl_s=60)
        assert lease is not None
        return lease

    def deploy(self, model_id: str, *, address: str | None = None, **report: Any) -> str:
        """A deployment that an engine serves at `address`, or that `report` describes."""
        with self.database.write() as session:
            model = session.scalars(select(Model).where(Model.id == model_id)).one()
            deployment_id = deployments.ensure(session, model, org_id=ORG, auto=False).id
            if address is not None:
                report = {"status": "ready", "address": address}
            if report:
                deployments.report(session, deployment_id, **report)
        return deployment_id

    def deployment(self, deployment_id: str) -> Deployment:
        with self.database.read() as session:
            return session.get_one(Deployment, deployment_id)


@pytest.fixture
def world(database: Database, settings: ApiSettings) -> World:
    return World(database, settings)


@pytest.fixture
def client(world: World) -> Iterator[TestClient]:
    """A user of the default organisation."""
    app = create_app(world.settings, world.database)
    with TestClient(app, headers=bearer(world.user)) as client:
        yield client


@pytest.fixture
def server(world: World) -> Iterator[str]:
    """The address of the app behind a real uvicorn."""
    with serve(create_app(world.settings, world.database)) as address:
        yield address


@pytest.fixture(name="serve", scope="session")
def serve_fixture() -> Any:
    """For tests that need a server of their own."""
    return serve


@contextmanager
def serve(app: FastAPI) -> Iterator[str]:
    """Run `app` in a thread. The socket listens before the server runs, so that nobody has to wait for it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def as_admin(world: World) -> dict[str, str]:
    return bearer(world.admin)


@pytest.fixture
def as_stranger(world: World) -> dict[str, str]:
    """An admin of another organisation."""
    return bearer(world.stranger)
