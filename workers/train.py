"""One attempt of a training job: torchrun, events, finish."""

import contextlib
import errno
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from db import blobs, events, gangs, job_files, jobs, registry, retries, tasks
from db.errors import LeaseLost
from db.models import File, Job, Model
from db.session import Database
from db.settings import DatabaseSettings
from db.tasks import Lease
from trainers import specs
from workers import dispatch, launch, leases, processes, results, shutdown
from workers.addresses import address_of
from workers.last_words import read_exit
from workers.layouts import layout_of
from workers.progress import EventCopier
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)
# Reasons that another attempt cannot mend, with the error code the user reads.
_FINAL_REASONS = {
    "bad_data": "invalid_training_file",
    "nan_loss": "nan_loss",
    "cuda_oom": "cuda_out_of_memory",
    "cpu_oom": "out_of_memory",
    "disk_full": "disk_full",
    # An attempt that refuses the newest whole checkpoint has written none: the next would take the same.
    "bad_checkpoint": "bad_checkpoint",
}

_NO_MEMORY = ("cuda_oom", "cpu_oom")


class GangBroken(Exception):
    """A node of the gang is gone."""


def run(database: Database, lease: Lease, settings: WorkerSettings) -> None:
    """Carry out the attempt behind `lease`. A lost lease ends it without a word: another owner exists."""
    with contextlib.suppress(LeaseLost):
        _Attempt(database, lease, settings).run()


@dataclass
class _Attempt:
    database: Database
    lease: Lease
    settings: WorkerSettings

    def run(self) -> None:
        self.heartbeat = leases.Heartbeat(self.database, self.lease, self.settings)
        self.marker = leases.marker(self.database, self.lease)
        self.run_dir = run_dir_of(self.lease.subject_id, self.lease.token)
        self.events = EventCopier(self.run_dir)
        self.stop_asked = False
        self.gang: gangs.Health = "whole"
        with contextlib.suppress(GangBroken), _no_room_is_an_end():
            self.run_dir.mkdir(parents=True)
            self.nproc = self._write_spec()
            self._run_child(self._torchrun())
        self._settle()

    def _write_spec(self) -> int:
        with self.database.read() as session:
            spec = describe_run(session, self.lease)
        (self.run_dir / "spec.json").write_text(spec.model_dump_json(indent=2))
        return spec.resources.nproc_per_node

    def _torchrun(self) -> list[str]:
        if self.lease.nodes == 1:
            return launch.torchrun_alone(self.run_dir, nproc=self.nproc)
        address = address_of(self.settings)
        rendezvous = f"{address}:{launch.find_port(address)}"
        self.heartbeat.settle(
            lambda session: gangs.open_rendezvous(session, self.lease.attempt_id, rendezvous)
        )
        return launch.torchrun_in_gang(
            self.run_dir,
            nproc=self.nproc,
            nodes=self.lease.nodes,
            rank=0,
            rendezvous=rendezvous,
            address=address,
        )

    def _run_child(self, argv: list[str]) -> None:
        env = launch.environment(
            self.marker,
            self.lease.devices,
            nproc=self.nproc,
            settings=self.settings,
            address=address_of(self.settings) if self.lease.nodes > 1 else None,
        )
        child = launch.spawn(argv, env=env, run_dir=self.run_dir, log_path=self.run_dir / "log.txt")
        processes.supervise(
            child,
            marker=self.marker,
            on_beat=self._beat,
            beat_s=self.heartbeat.interval_s,
            # torchrun needs a moment of its own after its ranks are gone
            grace_s=self.settings.stop_grace_s + 10,
        )

    def _beat(self) -> bool:
        def write(session: Session) -> None:
            self.events.copy(session, self.lease)
            self.stop_asked = jobs.stop_asked(session, self.lease.subject_id) is not None
            if self.lease.nodes > 1:
                self._look_after_gang(session)

        self.heartbeat.beat(write)
        if self.gang == "gathering":
            dispatch.ring("train")  # for the nodes that were called
        if self.gang == "broken":
            raise GangBroken
        return self.stop_asked or shutdown.requested() or self.gang == "leaving"

    def _look_after_gang(self, session: Session) -> None:
        self.gang = gangs.look_after(session, self.lease.attempt_id)
        if self.gang == "broken":
            job = session.get_one(Job, self.lease.subject_id)
            events.add(session, job, "A node of the gang was lost; all its nodes stop", level="warn")

    def _settle(self) -> None:
        exit_ = read_exit(self.run_dir)
        gone = not processes.carrying(self.marker)

        def write(session: Session) -> None:
            while self.events.copy(session, self.lease):
                pass
            draining = shutdown.requested() or gangs.was_left(session, self.lease.attempt_id)
            finish(session, self.lease, exit_=exit_, draining=draining)
            if not gone:
                tasks.keep_devices(session, self.lease)

        self.heartbeat.settle(write)
        logger.info("job %s: attempt %s ended: %s", self.lease.subject_id, self.lease.token, exit_)


@contextlib.contextmanager
def _no_room_is_an_end() -> Iterator[None]:
    """A disk so full that the attempt could not begin ends it like one that filled up on the way."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        logger.warning("no room for an attempt: %s", error)


def finish(session: Session, lease: Lease, *, exit_: dict[str, Any] | None, draining: bool) -> None:
    """Turn the trainer's word (`exit.json`, None if it was killed) into the next state of the job."""
    reason = exit_["reason"] if exit_ else None
    message = exit_["message"] if exit_ else "The trainer was killed"
    asked = jobs.stop_asked(session, lease.subject_id, hold=True)
    if asked == "cancel":
        jobs.cancel(session, lease, exit_=exit_)
    elif reason == "done":
        output_dir = run_dir_of(lease.subject_id, lease.token) / "output"
        results.write(
            session, lease.subject_id, blobs_dir=DatabaseSettings().blobs_dir, output_dir=output_dir
        )
        jobs.finish_training(session, lease, exit_=exit_ or {})
    elif (smaller := _find_smaller_pass(session, lease, reason)) is not None:
        jobs.go_on_smaller(session, lease, exit_=exit_, micro_batch_size=smaller)
    elif asked == "pause" and reason not in _FINAL_REASONS:
        jobs.pause(session, lease, exit_=exit_)
    elif draining:
        jobs.give_back(session, lease, exit_=exit_, charge=False, why="The worker shuts down")
    elif reason in _FINAL_REASONS:
        code = _FINAL_REASONS[reason]
        param = "training_file" if reason == "bad_data" else None
        jobs.fail(session, lease, error={"code": code, "message": message, "param": param}, exit_=exit_)
    else:
        jobs.give_back(session, lease, exit_=exit_, charge=True, why=message)


def _find_smaller_pass(session: Session, lease: Lease, reason: str | None) -> int | None:
    """How many rows to try at once after an attempt that had too little memory; None if that is the end."""
    job = session.get_one(Job, lease.subject_id)
    if reason not in _NO_MEMORY or job.on_oom != "halve_batch":
        return None
    return specs.halve_micro_batch(job.method, (job.resolved or {})["micro_batch_size"])


def run_dir_of(job_id: str, token: int) -> Path:
    """The folder of one attempt; no other attempt writes there."""
    return DatabaseSettings().runs_dir / job_id / str(token)


def read_nproc(run_dir: Path) -> int:
    """How many processes an attempt has on each node."""
    return int(json.loads((run_dir / "spec.json").read_text())["resources"]["nproc_per_node"])


def describe_run(session: Session, lease: Lease) -> specs.RunSpec:
    """Everything the trainer needs, so that it needs nothing of ours."""
    paths = DatabaseSettings()
    job = session.get_one(Job, lease.subject_id)
    model = session.get_one(Model, job.model_pk)

    def path_of(file: File) -> Path:
        return blobs.path_of(paths.blobs_dir, file.org_id, file.sha256)

    train = session.get_one(File, job.training_file)
    validation = session.get_one(File, job.validation_file) if job.validation_file else None
    named = _describe_judge(session, job, base=model) | _describe_adapter(session, job)
    return specs.RunSpec(
        spec_version=specs.SPEC_VERSION,
        job_id=job.id,
        attempt=lease.token,
        method=job.method,
        hyperparameters=job.resolved or {},
        seed=job.seed,
        resources=specs.Resources.model_validate(job.resources),
        model_dir=Path(str(model.path)),
        model_id=model.id,
        model_digest=model.digest or "",
        **named,
        train_file=path_of(train),
        train_sha256=train.sha256,
        train_layout=layout_of(train),
        mixture=[
            specs.MixedFile(path=path_of(file), sha256=file.sha256, layout=layout_of(file), **share)
            for file, share in _list_mixed(session, job)
        ],
        validation_file=path_of(validation) if validation else None,
        validation_sha256=validation.sha256 if validation else "",
        validation_layout=layout_of(validation) if validation else specs.Layout(),
        cache_dir=paths.cache_dir,
        resume_roots=[
            run_dir_of(job_id, token) / "checkpoints" for job_id, token in _earlier(session, lease)
        ],
    )


def _earlier(session: Session, lease: Lease) -> Iterator[tuple[str, int]]:
    """(job, token) of the attempts to go on from, newest first."""
    yield from ((lease.subject_id, token) for token in range(lease.token - 1, 0, -1))
    job = session.get_one(Job, lease.subject_id)
    while job.retry_of is not None:
        job, old = session.get_one(Job, job.retry_of), job
        if not retries.is_same_work(job, old):
            return
        yield from ((job.id, token) for token in retries.list_attempts(session, job.id))


def _describe_judge(session: Session, job: Job, *, base: Model) -> dict[str, Any]:
    """The reward model of a ppo job; its adapter alone, where it stands on the very base of the policy."""
    name = (job.resolved or {}).get("reward_model")
    if name is None:
        return {}
    judge = registry.get_ready(session, name, org_id=job.org_id)
    made_by = session.get(Job, judge.job_id) if judge.job_id else None
    own_base = session.get(Model, made_by.model_pk) if made_by else None
    same = own_base is not None and own_base.digest == base.digest and judge.adapter_path is not None
    return {
        "reward_model_dir": Path(str(judge.path)),
        "reward_model_digest": judge.digest or "",
        "reward_adapter_dir": Path(str(judge.adapter_path)) if same else None,
    }


def _describe_adapter(session: Session, job: Job) -> dict[str, Any]:
    """The adapter whose weights the job starts from."""
    name = (job.resolved or {}).get("init_adapter")
    if name is None:
        return {}
    model = registry.get_ready(session, name, org_id=job.org_id)
    return {
        "init_adapter_dir": Path(str(model.adapter_path)),
        "init_adapter_digest": model.digest or "",
        "init_manifest_sha256": model.manifest_sha256,
    }


def _list_mixed(session: Session, job: Job) -> list[tuple[File, dict[str, Any]]]:
    """Each file of a mixture with how much of it is taken."""
    return [
        (session.get_one(File, part["file"]), {k: v for k, v in part.items() if k != "file"})
        for part in job_files.mixture_of(job)
    ]
