"""Random lives of jobs against a small model: what may happen happens, nothing else does (G7, G8, G9)."""

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session

from db import jobs, recovery, tasks
from db.errors import Conflict, IllegalTransition, LeaseLost
from db.models import Event, File, Job
from db.states import JOB_TERMINAL, JOB_TRANSITIONS, TASK_QUEUES
from db.tasks import Lease, Owner
from db.work_models import Attempt, DeviceLease, Task
from tests.db.world import ERROR, World, record_check

SLOTS = ["slot:0", "slot:1"]
MAX_ATTEMPTS = 3
_numbers = itertools.count(1)


@dataclass
class Work:
    """What the model knows of a task."""

    number: int  # the order in which tasks came to be
    status: str = "queued"
    token: int = 0
    charged: int = 0
    lease: Lease | None = None


@dataclass
class Life:
    """What the model knows of a job."""

    id: str
    files: list[str]
    priority: int = 0
    status: str = "validating_files"
    history: list[str] = field(default_factory=list)
    cancel_asked: bool = False
    pause_asked: bool = False
    merging: bool = False
    work: dict[str, Work] = field(default_factory=dict)

    def move(self, following: str) -> None:
        assert following in JOB_TRANSITIONS[self.status], "the model itself must be legal"
        self.status = following
        self.history.append(following)

    def close(self, kind: str) -> None:
        self.work[kind].status, self.work[kind].lease = "closed", None


class JobMachine(RuleBasedStateMachine):
    """Rules act on the database and on the model; the invariant compares the two."""

    world: World

    @initialize()
    def begin(self) -> None:
        self.lives: dict[str, Life] = {}
        self.file_states: dict[str, str] = {}
        self.node = f"node-{next(_numbers)}"
        self.tasks_made = itertools.count()
        self.unproven: dict[int, int] = {}  # attempt -> devices it still holds
        self.stale: list[Lease] = []

    # what users do

    @rule(
        states=st.sampled_from(["processed", "processed", "processed", "uploaded", "processed uploaded"]),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
    )
    @precondition(lambda self: len(self.lives) < 5)
    def create_job(self, states: str, priority: int) -> None:
        chosen = [self._add_file(state) for state in states.split()]
        validation_file = chosen[1] if chosen[1:] else None
        job = self.world.add_job(chosen[0], validation_file=validation_file, priority=priority)
        life = self.lives[job.id] = Life(job.id, chosen, priority)
        self._files_looked_at(life)

    @rule(data=st.data())
    @precondition(lambda self: 0 < len(self.lives) < 5)
    def retry(self, data: st.DataObject) -> None:
        old = data.draw(st.sampled_from(list(self.lives.values())))
        broken = any(self.file_states[file_id] == "error" for file_id in old.files)
        if old.status not in ("failed", "cancelled") or broken:
            with pytest.raises(Conflict):
                self.world.retry(old.id)
            return
        job = self.world.retry(old.id)
        assert job.retry_of == old.id
        life = self.lives[job.id] = Life(job.id, old.files, old.priority)
        self._files_looked_at(life)

    @rule(data=st.data(), good=st.sampled_from([True, True, False]))
    @precondition(lambda self: self._unchecked())
    def check_file(self, data: st.DataObject, good: bool) -> None:
        file_id = data.draw(st.sampled_from(self._unchecked()))
        with self.world.database.write() as session:
            record_check(session, file_id, error=None if good else "Line 1: not JSON")
        self.file_states[file_id] = "processed" if good else "error"
        for life in self.lives.values():
            if file_id in life.files and life.status in ("waiting", "validating_files"):
                self._files_looked_at(life)

    @rule(data=st.data())
    @precondition(lambda self: self.lives)
    def cancel(self, data: st.DataObject) -> None:
        life = data.draw(st.sampled_from(list(self.lives.values())))
        if life.status in JOB_TERMINAL:
            with pytest.raises(Conflict):
                self.world.cancel(life.id)
            return
        self.world.cancel(life.id)
        waiting = [kind for kind, work in life.work.items() if work.status == "queued"]
        if waiting or life.status in ("waiting", "validating_files", "paused"):
            for kind in waiting:
                life.close(kind)
            life.move("cancelled")
        else:
            life.cancel_asked = True

    @rule(data=st.data())
    @precondition(lambda self: self.lives)
    def pause(self, data: st.DataObject) -> None:
        life = data.draw(st.sampled_from(list(self.lives.values())))
        if life.status not in ("queued", "running", "paused") or life.merging:
            with pytest.raises(Conflict):
                self.world.pause(life.id)
            return
        self.world.pause(life.id)
        if life.status == "queued":
            life.close("train")
            life.move("paused")
        elif life.status == "running":
            life.pause_asked = True

    @rule(data=st.data())
    @precondition(lambda self: self.lives)
    def resume(self, data: st.DataObject) -> None:
        life = data.draw(st.sampled_from(list(self.lives.values())))
        if life.status != "paused":
            with pytest.raises(Conflict):
                self.world.resume(life.id)
            return
        self.world.resume(life.id)
        life.work["train"].status, life.work["train"].number = "queued", next(self.tasks_made)
        life.move("queued")

    # what workers do

    @rule(data=st.data())
    @precondition(lambda self: self._waiting("train") or self._waiting("merge"))
    def claim(self, data: st.DataObject) -> None:
        kind = data.draw(st.sampled_from([kind for kind in ("merge", "train") if self._waiting(kind)]))
        queue = TASK_QUEUES[kind]
        self.world.skip_delays()
        owner = Owner(node=self.node, pid=1, started_at=1.0)
        lease = self.world.claim(queue, owner=owner, devices=SLOTS)
        held = len(self._leased("train")) + sum(self.unproven.values())
        if kind == "train" and held >= len(SLOTS):
            assert lease is None
            return
        life, work = min(self._waiting(kind), key=lambda pair: (-pair[0].priority, pair[1].number))
        assert lease is not None
        assert (lease.subject_id, lease.token) == (life.id, work.token + 1)
        assert len(lease.devices) == (1 if kind == "train" else 0)
        work.status, work.token, work.charged, work.lease = "leased", lease.token, work.charged + 1, lease
        if kind == "train":
            life.move("running")

    @rule(data=st.data())
    @precondition(lambda self: self._leased())
    def heartbeat(self, data: st.DataObject) -> None:
        life, lease = self._draw_lease(data)
        with self.world.database.write() as session:
            tasks.check(session, lease, ttl_s=60)
            assert jobs.stop_asked(session, life.id) == self._asked(life)
        with pytest.raises(IllegalTransition):  # it runs already
            self._fenced(lease, lambda session: jobs.start(session, lease, resolved={}))

    @rule(data=st.data())
    @precondition(lambda self: self._leased())
    def finish(self, data: st.DataObject) -> None:
        life, lease = self._draw_lease(data)
        if life.cancel_asked:
            self._fenced(lease, lambda session: jobs.cancel(session, lease))
            self._end(life, lease, "cancelled")
        elif life.pause_asked:
            self._fenced(lease, lambda session: jobs.pause(session, lease))
            life.work["train"].charged -= 1
            self._pause(life, lease)
        elif lease.kind == "merge":
            self.world.merge(lease)
            self._end(life, lease, "succeeded")
        else:
            self._train(life, lease)

    @rule(data=st.data())
    @precondition(lambda self: any(self._asked(life) for life, _ in self._leased()))
    def finish_without_seeing_the_wish(self, data: st.DataObject) -> None:
        life, lease = self._draw_lease(data)
        if lease.kind == "train":
            self._train(life, lease)
        else:
            self.world.merge(lease)
            self._end(life, lease, "succeeded")

    @rule(data=st.data(), how=st.sampled_from(["failed", "charged", "not charged", "silent", "known dead"]))
    @precondition(lambda self: self._leased())
    def interrupt(self, data: st.DataObject, how: str) -> None:
        life, lease = self._draw_lease(data)
        if how == "failed":
            self._fenced(lease, lambda session: jobs.fail(session, lease, error=ERROR))
            self._end(life, lease, "failed")
            return
        if how in ("charged", "not charged"):
            self.world.give_back(lease, charge=how == "charged")
        elif how == "known dead":
            assert recovery.abandon(self.world.database, lease.attempt_id)
        else:
            self.world.expire(lease)
            assert recovery.reap(self.world.database, ttl_s=0) == 1
        if how in ("silent", "known dead") and lease.devices:
            self.unproven[lease.attempt_id] = len(lease.devices)
        self._interrupt(life, lease, charge=how != "not charged")

    @rule(data=st.data())
    @precondition(lambda self: self._leased("train"))
    def run_out_of_memory(self, data: st.DataObject) -> None:
        life, lease = self._draw_lease(data, "train")
        self._fenced(
            lease, lambda session: jobs.go_on_smaller(session, lease, exit_=None, micro_batch_size=2)
        )
        assert (self.world.job(life.id).resolved or {})["micro_batch_size"] == 2
        self._interrupt(life, lease, charge=False)

    @rule(data=st.data())
    @precondition(lambda self: self.unproven)
    def prove_devices_free(self, data: st.DataObject) -> None:
        attempt_id = data.draw(st.sampled_from(list(self.unproven)))
        with self.world.database.write() as session:
            tasks.release_devices(session, attempt_id)
        del self.unproven[attempt_id]

    # what nobody may do

    @rule(data=st.data(), write=st.sampled_from(["heartbeat", "train", "merge", "fail", "give_back", "take"]))
    @precondition(lambda self: self.stale)
    def write_under_a_stale_token(self, data: st.DataObject, write: str) -> None:
        lease = data.draw(st.sampled_from(self.stale))
        calls: dict[str, Callable[[], Any]] = {
            "train": lambda: self.world.train(lease),
            "merge": lambda: self.world.merge(lease),
            "give_back": lambda: self.world.give_back(lease),
            "fail": lambda: self._fenced(lease, lambda session: jobs.fail(session, lease, error=ERROR)),
            "heartbeat": lambda: self._fenced(lease, lambda session: tasks.check(session, lease, ttl_s=60)),
        }
        if write == "take":
            with self.world.database.write() as session:
                assert tasks.take_away(session, lease) is None
            return
        with pytest.raises(LeaseLost):
            calls[write]()

    # what must hold

    @invariant()
    def database_equals_model(self) -> None:
        with self.world.database.read() as session:
            stored = {job.id: job for job in session.scalars(select(Job).where(Job.id.in_(self.lives)))}
            work = self._rows(session, Task, Task.subject_id)
            told = self._rows(session, Event, Event.job_id)
            self._compare_devices(session)
        for life in self.lives.values():
            job = stored[life.id]
            assert job.status == life.status
            assert (job.cancel_requested_at is not None) == life.cancel_asked
            assert (job.pause_requested_at is not None) == life.pause_asked
            assert (job.finished_at is not None) == (life.status in JOB_TERMINAL)
            assert (job.phase == "merging") == (life.merging and life.status == "running")
            assert (job.error is not None) == (life.status == "failed")
            rows = {task.kind: (task.status, task.token, task.charged) for task in work[life.id]}
            assert rows == {kind: (w.status, w.token, w.charged) for kind, w in life.work.items()}
            history = [event.data["status"] for event in told[life.id] if "status" in event.data]
            assert history == life.history
            assert sum(state in JOB_TERMINAL for state in history) == (life.status in JOB_TERMINAL)

    def teardown(self) -> None:
        """Leave nothing that the next example could claim."""
        self.world.run(update(Task).values(status="closed", node=None, lease_expires_at=None))
        self.world.run(update(Attempt).where(Attempt.ended_at.is_(None)).values(ended_at=1.0, outcome="lost"))

    # the model's own arithmetic

    def _add_file(self, status: str) -> str:
        file_id = f"file-{next(_numbers)}"
        self.world.run(
            insert(File).values(
                id=file_id,
                org_id=self.world.org_id,
                filename="a.jsonl",
                purpose="fine-tune",
                bytes=1,
                sha256="0" * 64,
                status=status,
                created_at=1.0,
            )
        )
        self.file_states[file_id] = status
        return file_id

    def _files_looked_at(self, life: Life) -> None:
        found = {self.file_states[file_id] for file_id in life.files}
        if "error" in found:
            life.move("failed")
        elif found == {"processed"} and life.status != "waiting":
            life.work["train"] = Work(next(self.tasks_made))
            life.move("queued")

    def _unchecked(self) -> list[str]:
        return [file_id for file_id, state in self.file_states.items() if state == "uploaded"]

    def _leased(self, kind: str | None = None) -> list[tuple[Life, Work]]:
        return self._works("leased", kind)

    def _waiting(self, kind: str) -> list[tuple[Life, Work]]:
        return self._works("queued", kind)

    def _works(self, status: str, kind: str | None) -> list[tuple[Life, Work]]:
        return [
            (life, work)
            for life in self.lives.values()
            for own_kind, work in life.work.items()
            if work.status == status and kind in (None, own_kind)
        ]

    def _draw_lease(self, data: st.DataObject, kind: str | None = None) -> tuple[Life, Lease]:
        life, work = data.draw(st.sampled_from(self._leased(kind)))
        assert work.lease is not None
        return life, work.lease

    def _asked(self, life: Life) -> str | None:
        return "cancel" if life.cancel_asked else "pause" if life.pause_asked else None

    def _pause(self, life: Life, lease: Lease) -> None:
        life.pause_asked = False
        self._end(life, lease, "paused")

    def _train(self, life: Life, lease: Lease) -> None:
        self.world.train(lease)
        life.close("train")
        life.work["merge"] = Work(next(self.tasks_made))
        life.merging, life.pause_asked = True, False
        self.stale.append(lease)

    def _end(self, life: Life, lease: Lease, state: str) -> None:
        life.close(lease.kind)
        life.move(state)
        self.stale.append(lease)

    def _interrupt(self, life: Life, lease: Lease, *, charge: bool) -> None:
        work = life.work[lease.kind]
        work.charged -= not charge
        work.lease = None
        if life.pause_asked and not life.cancel_asked and work.charged < MAX_ATTEMPTS:
            self._pause(life, lease)
            return
        self.stale.append(lease)
        if life.cancel_asked or work.charged >= MAX_ATTEMPTS:
            life.close(lease.kind)
            life.move("cancelled" if life.cancel_asked else "failed")
            return
        work.status = "queued"
        if lease.kind == "train":
            life.move("queued")

    def _fenced(self, lease: Lease, write: Callable[[Session], Any]) -> None:
        with tasks.fenced(self.world.database, lease) as session:
            write(session)

    def _rows(self, session: Session, entity: Any, key: Any) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {job_id: [] for job_id in self.lives}
        for row in session.scalars(
            select(entity).where(key.in_(self.lives)).order_by(*entity.__mapper__.primary_key)
        ):
            found[getattr(row, key.key)].append(row)
        return found

    def _compare_devices(self, session: Session) -> None:
        held = session.scalars(
            select(DeviceLease.device).where(DeviceLease.node == self.node, DeviceLease.released_at.is_(None))
        )
        counted = Counter(held)
        assert set(counted.values()) <= {1}
        assert counted.total() == len(self._leased("train")) + sum(self.unproven.values())


def live_randomly(
    world: World, *, sequences: int, steps: int, machine: type[JobMachine] = JobMachine
) -> None:
    run_state_machine_as_test(
        type("BoundJobMachine", (machine,), {"world": world}),
        settings=settings(
            max_examples=sequences,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


def test_random_lives_of_jobs(world: World):
    live_randomly(world, sequences=100, steps=20)


@pytest.mark.faults(g=7)
@pytest.mark.timeout(3600)
def test_many_random_lives_of_jobs(world: World):
    live_randomly(world, sequences=1000, steps=50)
