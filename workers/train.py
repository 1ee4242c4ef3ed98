"""One attempt of a training job: torchrun, events, finish."""

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from db import blobs, job_files, jobs, registry
from db.errors import LeaseLost
from db.models import File, Job, Model
from db.session import Database
from db.settings import DatabaseSettings
from db.tasks import Lease
from trainers import specs
from workers import leases, processes, results, shutdown
from workers.layouts import layout_of
from workers.progress import EventCopier
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)
# Reasons that another attempt cannot mend, with the error code the user reads.
_FINAL_REASONS = {
    "bad_data": "invalid_training_file",
    "nan_loss": "nan_loss",
    "cuda_oom": "cuda_out_of_memory",
    "disk_full": "disk_full",
}
_NO_ROOM_BYTES = 1 << 20  # with less, a trainer may have been unable to say so in exit.json


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
        with _no_room_is_an_end():
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
        return processes.module_command(
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={self.nproc}",
            "--max_restarts=0",
            "-m",
            "trainers.run",
            str(self.run_dir),
        )

    def _run_child(self, argv: list[str]) -> None:
        gpus = [device.removeprefix("cuda:") for device in self.lease.devices if device.startswith("cuda:")]
        threads = max(1, (os.cpu_count() or 1) // self.nproc)
        env = processes.child_environment(
            self.marker,
            CUDA_VISIBLE_DEVICES=",".join(gpus),
            OMP_NUM_THREADS=str(threads),
            TORCH_ELASTIC_SHUTDOWN_TIMEOUT=str(int(self.settings.stop_grace_s)),
        )
        child = processes.spawn(argv, env=env, cwd=self.run_dir, log_path=self.run_dir / "log.txt")
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

        self.heartbeat.beat(write)
        return self._wants_stop()

    def _wants_stop(self) -> bool:
        return self.stop_asked or shutdown.requested()

    def _exit(self) -> dict[str, Any] | None:
        path = self.run_dir / "exit.json"
        if path.is_file():
            return json.loads(path.read_text())
        if shutil.disk_usage(DatabaseSettings().runs_dir).free < _NO_ROOM_BYTES:
            return {"reason": "disk_full", "message": "no space left on the disk of the runs"}
        return None

    def _settle(self) -> None:
        exit_ = self._exit()

        def write(session: Session) -> None:
            while self.events.copy(session, self.lease):
                pass
            finish(session, self.lease, exit_=exit_, draining=shutdown.requested())

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


def run_dir_of(job_id: str, token: int) -> Path:
    """The folder of one attempt; no other attempt writes there."""
    return DatabaseSettings().runs_dir / job_id / str(token)


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
    earlier = range(lease.token - 1, 0, -1)
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
        resume_roots=[run_dir_of(job.id, token) / "checkpoints" for token in earlier],
    )


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
    return {"init_adapter_dir": Path(str(model.adapter_path)), "init_adapter_digest": model.digest or ""}


def _list_mixed(session: Session, job: Job) -> list[tuple[File, dict[str, Any]]]:
    """Each file of a mixture with how much of it is taken."""
    return [
        (session.get_one(File, part["file"]), {k: v for k, v in part.items() if k != "file"})
        for part in job_files.mixture_of(job)
    ]
