"""Judges what a run under faults leaves behind: what clients were told against what database and disk say.

After Jepsen: clients note every request with what came back, where no answer is a `maybe`; the tables of
jobs, events, attempts and device leases are the other witness, the run folders a third.
"""

import json
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Literal

from sqlalchemy import select

from db.models import Event, Job
from db.session import Database
from db.states import JOB_TERMINAL, JOB_TRANSITIONS
from db.work_models import Attempt, DeviceLease, Task

STEP = re.compile(r"Step (\d+)/\d+")
_STARTED = re.compile(r"Fine-tuning job (?:started|goes on \(attempt (\d+)\))")
_RESUMED = re.compile(r"Resuming from the checkpoint at step (\d+)")
_SAVED = re.compile(r"Checkpoint created at step (\d+)")


@dataclass(frozen=True)
class Op:
    """One request to create or cancel the job whose metadata holds `key`; `id` is what the answer named."""

    op: Literal["create", "cancel"]
    key: str
    t0: float
    t1: float
    result: Literal["yes", "no", "maybe"]
    id: str | None = None


@dataclass(frozen=True)
class JobSeen:
    """A job as the database has it, with its events in order: (message, data)."""

    id: str
    key: str | None
    status: str
    events: Sequence[tuple[str, dict]]
    saved: frozenset[int] = frozenset()  # steps of the checkpoints that its run folders ever held whole


@dataclass(frozen=True)
class Held:
    """A task or a device held by an attempt, from `start` to `end`."""

    what: str
    token: int  # of a device lease: the number of the attempt
    start: float
    end: float | None


@dataclass
class Witness:
    """All that is left."""

    jobs: list[JobSeen] = field(default_factory=list)
    attempts: list[Held] = field(default_factory=list)
    devices: list[Held] = field(default_factory=list)

    def without(self, job_ids: Container[str]) -> "Witness":
        """The same, but for some jobs that others made."""
        jobs = [job for job in self.jobs if job.id not in job_ids]
        return replace(
            self, jobs=jobs, attempts=[h for h in self.attempts if h.what.split()[-1] not in job_ids]
        )


def check(ops: Iterable[Op], witness: Witness, *, damaged: frozenset[str] = frozenset()) -> list[str]:
    """Every violation in words. All work must be over; `damaged` are jobs whose checkpoints were broken."""
    found = [*_check_requests(list(ops), witness)]
    found += _check_disjoint(witness.attempts, of=lambda held: held.what.split()[-1])  # the job, or the file
    found += _check_disjoint(witness.devices, of=lambda held: held.what)
    found += _check_tokens(witness.attempts)
    for job in witness.jobs:
        found += _check_states(job)
        found += _check_steps(job, damaged=job.id in damaged)
    return found


def _check_requests(ops: list[Op], witness: Witness) -> Iterator[str]:
    """Accepted ⊆ known; what was sent again made no second job; nothing is there that nobody asked for.

    A cancel that was accepted is how the job ends, whatever it had reached.
    """
    creates = [op for op in ops if op.op == "create"]
    for key in sorted({op.key for op in creates}):
        jobs = [job for job in witness.jobs if job.key == key]
        accepted = {op.id for op in creates if op.key == key and op.result == "yes"}
        refused = all(op.result == "no" for op in creates if op.key == key)
        if len(jobs) > 1:
            yield f"{key}: {len(jobs)} jobs of one request"
        if not accepted <= {job.id for job in jobs}:
            yield f"{key}: accepted as {sorted(map(str, accepted))}, but unknown"
        if refused and jobs:
            yield f"{key}: refused, but there"
    asked = {op.key for op in creates}
    yield from (f"{job.id}: nobody asked for it" for job in witness.jobs if job.key not in asked)
    cancelled = {op.key for op in ops if op.op == "cancel" and op.result == "yes"}
    for job in witness.jobs:
        if job.key in cancelled and job.status != "cancelled":
            yield f"{job.id}: is {job.status}, though its cancel was accepted"


def _check_disjoint(held: list[Held], *, of: Callable[[Held], str]) -> Iterator[str]:
    """Nothing is held by two at a time, whatever they do with it, and all is given back."""
    for _, leases in groupby(sorted(held, key=lambda h: (of(h), h.start, h.token)), of):
        listed = list(leases)
        yield from (
            f"{lease.what}: {lease.token} was never given back" for lease in listed if lease.end is None
        )
        for one, two in pairwise(listed):
            if one.end is not None and one.end > two.start:
                early_s = one.end - two.start
                yield f"{two.what}: {two.token} began {early_s:.3f} s before {one.what}: {one.token} ended"


def _check_tokens(attempts: list[Held]) -> Iterator[str]:
    for what, leases in groupby(sorted(attempts, key=lambda h: (h.what, h.start)), lambda h: h.what):
        tokens = [lease.token for lease in leases]
        if any(two <= one for one, two in pairwise(tokens)):
            yield f"{what}: tokens {tokens} do not rise"


def _check_states(job: JobSeen) -> Iterator[str]:
    """One end, and only legal steps to it."""
    states = [data["status"] for _, data in job.events if "status" in data]
    ends = [state for state in states if state in JOB_TERMINAL]
    if len(ends) != 1 or job.status not in JOB_TERMINAL:
        yield f"{job.id}: is {job.status}, with {len(ends)} terminal events: {states}"
    elif ends[0] != job.status or states[-1] != job.status:
        yield f"{job.id}: is {job.status}, but its events say {states}"
    for one, two in pairwise(["validating_files", *states]):
        if two not in JOB_TRANSITIONS[one]:
            yield f"{job.id}: went from {one} to {two}"


def _check_steps(job: JobSeen, *, damaged: bool) -> Iterator[str]:
    """Steps only rise within an attempt, and each attempt goes on where a whole checkpoint ends."""
    step, recorded, token = 0, 0, 0
    for message, _ in job.events:
        if started := _STARTED.fullmatch(message):
            token, step = int(started[1] or 1), 0
        elif resumed := _RESUMED.fullmatch(message):
            step = int(resumed[1])
            if step not in job.saved:
                yield f"{job.id}: attempt {token} resumed from step {step}, which was never whole"
            if step < recorded and not damaged:
                yield f"{job.id}: attempt {token} resumed from step {step} though {recorded} was saved"
        elif saved := _SAVED.fullmatch(message):
            recorded = max(recorded, int(saved[1]))
        elif (seen := STEP.match(message)) and int(seen[1]):
            if step == 0 and recorded and token > 1 and not damaged:
                yield f"{job.id}: attempt {token} began anew though {recorded} was saved"
            if int(seen[1]) < step:
                yield f"{job.id}: attempt {token} went from step {step} back to {seen[1]}"
            step = int(seen[1])


def read_witness(database: Database, runs_dir: Path) -> Witness:
    """What database and disk say now."""
    with database.read() as session:
        told: dict[str, list[tuple[str, dict]]] = {}
        for event in session.scalars(select(Event).order_by(Event.seq)):
            told.setdefault(event.job_id, []).append((event.message, event.data))
        jobs = [
            JobSeen(
                id=job.id,
                key=(job.metadata_ or {}).get("key", job.id),
                status=job.status,
                events=told.get(job.id, []),
                saved=_saved_steps(runs_dir / job.id),
            )
            for job in session.scalars(select(Job))
        ]
        attempts = [
            Held(f"{kind} of {subject}", attempt.token, attempt.started_at, attempt.ended_at)
            for attempt, kind, subject in session.execute(
                select(Attempt, Task.kind, Task.subject_id).join(Task, Task.id == Attempt.task_id)
            )
        ]
        devices = [
            Held(f"{lease.node}/{lease.device}", lease.attempt_id, lease.leased_at, lease.released_at)
            for lease in session.scalars(select(DeviceLease))
        ]
    return Witness(jobs, attempts, devices)


def _saved_steps(job_dir: Path) -> frozenset[int]:
    """What trainers said they had saved, and what is there without their word: kill -9 comes in between."""
    steps = {int(path.name.removeprefix("step-")) for path in job_dir.glob("*/checkpoints/step-*[0-9]")}
    for path in job_dir.glob("*/events.jsonl"):
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n") and (record := json.loads(line))["type"] == "checkpoint":
                steps.add(record["step"])
    return frozenset(steps)
