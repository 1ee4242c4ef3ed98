"""The only writer of job state. Every change is a compare-and-swap on the status and leaves an event."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Select, select, update
from sqlalchemy.orm import Session

from db import adapters, events, job_files, registry, stages, tasks
from db.errors import Conflict, IllegalTransition, NotFound
from db.ids import new_id
from db.models import Job
from db.new_jobs import NewJob, Place
from db.scope import scoped
from db.session import clock, timestamp
from db.states import JOB_TERMINAL, check_job_transition
from db.tasks import Lease


def create(session: Session, new: NewJob, *, org_id: str, place: Place | None = None) -> Job:
    """Accept a job: row, first events and, when nothing is left to wait for, the task.

    Raises `NotFound` for an unknown model or file and `Conflict` for one that cannot be used.
    """
    awaits = place.awaits if place else frozenset()
    model = None if "model" in awaits else registry.get_trainable(session, new.model, org_id=org_id)
    if "reward_model" not in awaits:
        registry.hold_judge(session, new.spec, org_id=org_id)
    new = adapters.settle(session, new, base=model, org_id=org_id)
    job_files.hold(session, new, org_id=org_id)
    job = Job(
        id=place.job_id if place else new_id("ftjob-"),
        org_id=org_id,
        status="waiting" if place and place.waits_for else "validating_files",
        model_id=new.model,
        model_pk=model.pk if model else None,
        training_file=new.training_file,
        validation_file=new.validation_file,
        method=new.method,
        spec_version=new.spec_version,
        spec=new.spec,
        resources=new.resources,
        seed=new.seed,
        suffix=new.suffix,
        metadata_=new.metadata,
        integrations=new.integrations,
        pipeline_id=place.pipeline_id if place else None,
        stage=place.stage if place else None,
        priority=new.priority,
        on_oom=new.on_oom,
        retry_of=new.retry_of,
        created_at=clock(session),
    )
    session.add(job)
    session.flush()
    job_files.note_mixed(session, job)
    again = f", which tries {job.retry_of} again" if job.retry_of else ""
    events.add(session, job, f"Created fine-tuning job: {job.id}{again}")
    if place and place.waits_for:
        events.add(session, job, f"Waiting for other stages: {', '.join(place.waits_for)}")
    else:
        _admit(session, job)
    return job


def get(session: Session, job_id: str, *, org_id: str) -> Job:
    """Raises `NotFound`."""
    job = session.scalar(scoped(Job, org_id).where(Job.id == job_id))
    if job is None:
        raise NotFound("fine-tuning job", job_id)
    return job


def request_cancel(session: Session, job_id: str, *, org_id: str) -> Job:
    """Cancel a job: at once if nobody works on it, else its worker is told at its next heartbeat.

    Raises `NotFound`; `Conflict` with `job_not_cancellable` when it is over.
    """
    job = _own(session, job_id, org_id=org_id)
    if job.status in JOB_TERMINAL:
        raise Conflict("job_not_cancellable", f"Job '{job_id}' has {job.status} and cannot be cancelled.")
    # Only now, with the job locked, no task of it can appear any more.
    closed = [tasks.close_waiting(session, kind=kind, subject_id=job_id) for kind in ("train", "merge")]
    if any(closed) or job.status in ("waiting", "validating_files", "paused"):
        _move(session, job, "cancelled", message="Fine-tuning job cancelled")
    elif job.cancel_requested_at is None:
        job.cancel_requested_at = clock(session)
        events.add(session, job, "Cancellation requested")
    return job


def request_pause(session: Session, job_id: str, *, org_id: str) -> Job:
    """Pause a job: at once if it waits; else its worker saves a checkpoint first, and may be done before.

    Raises `NotFound`; `Conflict` with `job_not_pausable` when there is nothing to pause.
    """
    job = _own(session, job_id, org_id=org_id)
    if job.status == "paused" or (job.status == "running" and job.pause_requested_at is not None):
        return job
    if job.status not in ("queued", "running") or job.phase == "merging":
        doing = job.phase if job.status == "running" else job.status
        raise Conflict("job_not_pausable", f"Job '{job_id}' is {doing} and cannot be paused.")
    if tasks.close_waiting(session, kind="train", subject_id=job_id):
        _move(session, job, "paused", message="Fine-tuning job paused")
    else:
        job.pause_requested_at = clock(session)
        events.add(session, job, "Pause requested")
    return job


def resume(session: Session, job_id: str, *, org_id: str) -> Job:
    """Queue a paused job again; it goes on from its last checkpoint.

    Raises `NotFound`; `Conflict` with `job_not_resumable` when it is not paused.
    """
    job = _own(session, job_id, org_id=org_id)
    if job.status != "paused":
        raise Conflict("job_not_resumable", f"Job '{job_id}' is {job.status}, not paused.")
    tasks.reopen(session, kind="train", subject_id=job_id)
    _move(session, job, "queued", message="Fine-tuning job resumed, moving job to queued state")
    return job


def files_checked(session: Session, file_id: str) -> None:
    """Queue or fail the jobs that waited for the check of `file_id`, oldest first; no stage waits to fail."""
    concerned = select(Job.id).where(
        Job.status.in_(("waiting", "validating_files")), job_files.reads(file_id)
    )
    found = set(session.scalars(concerned))
    kept = lock_all(session, stages.with_dependents(session, found))
    for job in sorted(kept, key=lambda job: job.created_at):
        if job.id not in found or job.status not in ("waiting", "validating_files"):
            continue
        error = job_files.find_error(session, job)
        if error is not None:
            _fail(session, job.id, error)
        elif job.status == "validating_files" and job_files.all_checked(session, job):
            _queue(session, job)


def start(session: Session, lease: Lease, *, resolved: dict[str, Any]) -> Job:
    """A worker claimed the job: it runs now, with `resolved` hyperparameters."""
    job = _lock(session, lease.subject_id)
    again = job.started_at is not None
    message = f"Fine-tuning job goes on (attempt {lease.token})" if again else "Fine-tuning job started"
    started_at = job.started_at or timestamp(session)
    _move(session, job, "running", message=message, started_at=started_at, resolved=resolved)
    return job


def stop_asked(session: Session, job_id: str, *, hold: bool = False) -> Literal["cancel", "pause"] | None:
    """What the user wants a running job to stop for. With `hold` no wish can come before the commit."""
    select_ = select(Job).where(Job.id == job_id)
    job = session.scalars(_locked(select_) if hold else select_).one()
    if job.cancel_requested_at is not None:
        return "cancel"
    return "pause" if job.pause_requested_at is not None else None


def set_phase(session: Session, job: Job, phase: str) -> None:
    """Finer progress of a running job."""
    job.phase = phase
    session.flush()


def set_progress(session: Session, job: Job, progress: dict[str, Any]) -> None:
    """The latest step as the user sees it, and when that was."""
    job.progress = progress | {"updated_at": clock(session)}
    session.flush()


def set_result_files(session: Session, job: Job, file_ids: list[str]) -> None:
    """The files that hold the metrics of the job."""
    job.result_files = file_ids
    session.flush()


def finish_training(session: Session, lease: Lease, *, exit_: dict[str, Any]) -> None:
    """Training is done: free the devices and queue the merge. Call inside `tasks.fenced`."""
    job = _lock(session, lease.subject_id)
    tasks.finish(session, lease, outcome="done", exit_=exit_)
    job.phase, job.trained_attempt, job.pause_requested_at = "merging", lease.token, None
    job.trained_tokens = exit_.get("trained_tokens")
    tasks.enqueue(session, kind="merge", subject_id=job.id, org_id=job.org_id, priority=job.priority)
    has_adapter = (job.resolved or {}).get("use_peft", True)
    next_ = "merging the adapter into its base" if has_adapter else "checking the model, trained as a whole"
    events.add(session, job, f"Training finished; {next_}", data={"exit": exit_})


def finish_merge(
    session: Session, lease: Lease, *, path: Path, adapter_path: Path, report: dict[str, Any]
) -> Job:
    """The merge is verified: register the model and end the job. Call inside `tasks.fenced`."""
    job = _lock(session, lease.subject_id)
    tasks.finish(session, lease, outcome="done", exit_=report)
    model = registry.register_merged(session, job, path=path, adapter_path=adapter_path, report=report)
    job.fine_tuned_model = model.id
    events.add(session, job, f"New fine-tuned model created: {model.id}", data={"merge": report})
    _move(session, job, "succeeded", message="The job has successfully completed")
    return job


def fail(
    session: Session, lease: Lease, *, error: dict[str, Any], exit_: dict[str, Any] | None = None
) -> None:
    """End the job with `error` ({code, message, param}). Call inside `tasks.fenced`."""
    tasks.finish(session, lease, outcome="failed", exit_=exit_)
    _fail(session, lease.subject_id, error)


def cancel(session: Session, lease: Lease, *, exit_: dict[str, Any] | None = None) -> None:
    """The worker stopped the job as the user asked. Call inside `tasks.fenced`."""
    tasks.finish(session, lease, outcome="cancelled", exit_=exit_)
    job = _lock(session, lease.subject_id)
    _move(session, job, "cancelled", message="Fine-tuning job cancelled")


def pause(session: Session, lease: Lease, *, exit_: dict[str, Any] | None = None) -> None:
    """The worker stopped the job for a pause; the attempt does not count. Call inside `tasks.fenced`."""
    tasks.requeue(session, lease, outcome="stopped", charge=False, exit_=exit_)
    _hold(session, _lock(session, lease.subject_id))


def give_back(
    session: Session, lease: Lease, *, exit_: dict[str, Any] | None, charge: bool, why: str
) -> None:
    """Put the job back into the queue after an interruption, or end it when no attempt is left.

    `charge=False` for interruptions that the service itself made. Call inside `tasks.fenced`.
    """
    outcome = "failed" if charge else "stopped"
    delay_s = 5.0 if charge else 0.0
    again = tasks.requeue(session, lease, outcome=outcome, charge=charge, delay_s=delay_s, exit_=exit_)
    after_interruption(session, lease, again=again, why=why)


def go_on_smaller(
    session: Session, lease: Lease, *, exit_: dict[str, Any] | None, micro_batch_size: int
) -> None:
    """Put a job that had too little memory back into the queue, with fewer rows at once and the same batch.

    The attempt does not count: there are only so many halves. Call inside `tasks.fenced`.
    """
    job = _lock(session, lease.subject_id)
    resolved = job.resolved or {}
    job.resolved = resolved | {"micro_batch_size": micro_batch_size}
    session.flush()
    why = (
        f"Too little memory for passes of {resolved['micro_batch_size']} rows: it goes on with "
        f"{micro_batch_size}, and a batch stays {resolved['batch_size']} rows"
    )
    give_back(session, lease, exit_=exit_, charge=False, why=why)


def after_interruption(session: Session, lease: Lease, *, again: bool, why: str) -> None:
    """What a lost or returned train or merge task means for its job."""
    job = _lock(session, lease.subject_id)
    if job.cancel_requested_at is not None:
        tasks.close_waiting(session, kind=lease.kind, subject_id=job.id)
        _move(session, job, "cancelled", message="Fine-tuning job cancelled")
    elif not again:
        _fail(
            session,
            job.id,
            {"code": "too_many_attempts", "message": f"{why}; no attempt is left.", "param": None},
        )
    elif lease.kind == "train" and job.pause_requested_at is not None:
        _hold(session, job)
    elif lease.kind == "train" and job.status != "queued":
        _move(session, job, "queued", message=f"{why}; the job waits for another attempt", level="warn")
    else:  # the worker was lost before it started the job, or in the merge
        events.add(session, job, f"{why}; the {lease.kind} task is tried again", level="warn")


def _own(session: Session, job_id: str, *, org_id: str) -> Job:
    job = session.scalar(_locked(scoped(Job, org_id).where(Job.id == job_id)))
    if job is None:
        raise NotFound("fine-tuning job", job_id)
    return job


def _locked(select_: Select[Job]) -> Select[Job]:
    # An unlocked read earlier in the same session must not hide what was written since.
    return select_.with_for_update().execution_options(populate_existing=True)


def _lock(session: Session, job_id: str) -> Job:
    return session.scalars(_locked(select(Job).where(Job.id == job_id))).one()


def lock_all(session: Session, job_ids: Iterable[str]) -> list[Job]:
    """Keep jobs from changing until the commit: all of them before any changes, in the order of `stages`."""
    return [_lock(session, job_id) for job_id in sorted(job_ids)]


def _hold(session: Session, job: Job) -> None:
    tasks.close_waiting(session, kind="train", subject_id=job.id)
    job.pause_requested_at = None
    _move(session, job, "paused", message="Fine-tuning job paused")


def _fail(session: Session, job_id: str, error: dict[str, Any]) -> None:
    job = _lock(session, job_id)
    _move(session, job, "failed", message=f"Job failed: {error['message']}", level="error", error=error)


def _admit(session: Session, job: Job) -> None:
    """The model of a job is there: it waits for its files, or else for a device."""
    checked = job_files.all_checked(session, job)
    mixed = [part["file"] for part in job_files.mixture_of(job)]
    named = f"Validating training file: {job.training_file}"
    if mixed:
        named = f"Validating training files: {', '.join(mixed)}"
    if job.validation_file is not None:
        named += f" and validation file: {job.validation_file}"
    if job.status == "waiting" and not checked:
        _move(session, job, "validating_files", message=named)
    else:
        events.add(session, job, named)
    if checked:
        _queue(session, job)


def _queue(session: Session, job: Job) -> None:
    tasks.enqueue(
        session,
        kind="train",
        subject_id=job.id,
        org_id=job.org_id,
        priority=job.priority,
        devices_needed=int(job.resources["nproc_per_node"]),
        nodes_needed=int(job.resources.get("nnodes", 1)),
    )
    _move(session, job, "queued", message="Files validated, moving job to queued state")


def _move(
    session: Session,
    job: Job,
    following: str,
    *,
    message: str,
    level: str = "info",
    error: dict[str, Any] | None = None,
    **values: Any,
) -> None:
    current = job.status
    if not check_job_transition(current, following):
        raise IllegalTransition(f"job {job.id}: {current} -> {following}")
    session.flush()
    values["status"] = following
    if following in JOB_TERMINAL:
        values |= {"finished_at": timestamp(session), "error": error, "phase": None}
    elif following in ("queued", "paused"):
        values["phase"] = None
    moved = update(Job).where(Job.id == job.id, Job.status == current).values(**values).returning(Job)
    if not session.scalars(moved, execution_options={"populate_existing": True}).all():
        raise IllegalTransition(f"job {job.id}: no longer {current}")
    data = {"status": following} | ({"error": error} if error else {})
    events.add(session, job, message, level=level, data=data, locked=True)  # by the update
    if following in JOB_TERMINAL and job.pipeline_id is not None:
        _tell_dependents(session, job)


def _tell_dependents(session: Session, job: Job) -> None:
    """What the end of a stage means for those that wait for it."""
    if job.status == "succeeded":
        stages.record_inputs(session, job)
        ids = stages.find_dependents(session, job, indirect=False)
        job_files.hold_all(session, ids)  # the check of a file holds it before it locks jobs
        for waiting in lock_all(session, ids):
            if waiting.status == "waiting" and stages.take_output(session, waiting, upstream=job):
                _admit(session, waiting)
        return
    # The last first: each then finds nobody that waits for it, and all name the stage at fault.
    for waiting in reversed(lock_all(session, stages.find_dependents(session, job, indirect=True))):
        if waiting.status != "waiting":
            continue
        if job.status == "cancelled":
            _move(session, waiting, "cancelled", message=f"Cancelled with the stage '{job.stage}'")
        else:
            message = f"The stage '{job.stage}', which this one needs, failed: {(job.error or {})['message']}"
            _fail(session, waiting.id, {"code": "upstream_failed", "message": message, "param": None})
