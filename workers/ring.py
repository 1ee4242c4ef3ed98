"""The Celery task behind all work: somebody rang, so look whether there is work, and do one piece of it."""

import logging
from typing import Any

from celery.signals import worker_process_init, worker_shutdown, worker_shutting_down
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from db import claims, job_files, jobs, logs, recovery, tasks
from db import nodes as node_table
from db.models import File, Job
from db.nodes import Facts
from db.session import Database
from db.tasks import Lease
from trainers import specs
from workers import datasets, dispatch, gang, importing, leases, merge, nodes, previews, shutdown, tick, train
from workers.app import RING_TASK, app, database, settings
from workers.wakefulness import Wakefulness

logger = logging.getLogger(__name__)
_RUNNERS = {
    "train": train.run,
    "merge": merge.run,
    "validate": datasets.check,
    "import": importing.run,
    "preview": previews.run,
}
_OF_JOBS = ("train", "merge")
_wakefulness = Wakefulness()


@app.task(name=RING_TASK)
def answer(queue: str) -> None:
    """Claim the first waiting task of `queue` that fits on this node and carry it out."""
    with shutdown.listening():
        if not shutdown.requested():
            _answer(database(), queue)


def _answer(db: Database, queue: str) -> None:
    facts = nodes.report(db, settings, trains=queue == "train")
    _recover(db)
    reap(db, _wakefulness, ttl_s=settings.lease_ttl_s)
    if queue == "train" and gang.take_part(db, settings):
        dispatch.ring(queue)
        return
    lease = _claim(db, queue, facts)
    if lease is None:
        return
    _ring_again(db, queue)  # another slot, or another node, may be idle
    subject = "job_id" if lease.kind in _OF_JOBS else "subject_id"
    with logs.bound(task=lease.kind, attempt=lease.token, **{subject: lease.subject_id}):
        logger.info("claimed")
        try:
            _RUNNERS[lease.kind](db, lease, settings)
        finally:
            _recover(db)  # if it broke
        logger.info("done with it")
    _ring_again(db, queue)


def reap(db: Database, wakefulness: Wakefulness, *, ttl_s: float) -> None:
    """Take expired leases away, unless this machine slept and their owners had no time yet to renew them."""
    if wakefulness.has_lasted(ttl_s):
        recovery.reap(db, ttl_s=ttl_s)


def _recover(db: Database) -> None:
    """Give back what dead workers held, and what this process holds, which is not at work on anything."""
    idle = leases.this_owner(settings)
    leases.recover_node(db, settings.node, idle=idle, unkillable_s=settings.unkillable_s)


def _ring_again(db: Database, queue: str) -> None:
    """Ring if anything waits."""
    with db.read() as session:
        more = tasks.waiting(session, queue)
    if more:
        dispatch.ring(queue)


def _claim(db: Database, queue: str, facts: Facts) -> Lease | None:
    if queue == "train" and facts.free_bytes < settings.min_free_bytes:
        logger.warning("%d bytes of disk are free: too few to train", facts.free_bytes)
        return None
    devices, shared_slot = settings.devices()
    nodes.keep_from_strangers(db, settings.node, devices)
    with db.write() as session:
        lease = claims.claim(
            session,
            queue=queue,
            owner=leases.this_owner(settings),
            devices=devices,
            shared_slot=shared_slot,
            ttl_s=settings.lease_ttl_s,
            passing_s=settings.passing_s,
            free_bytes=facts.free_bytes,
        )
        if lease is not None and lease.kind == "train":
            return lease if _start_job(session, lease) else None
        return lease


def _start_job(session: Session, lease: Lease) -> bool:
    try:
        job = session.get_one(Job, lease.subject_id)
        resolved = job.resolved or _resolve(session, job)  # once: an attempt may have changed it since
    except specs.SpecError as error:  # only the number of rows, known since the check, can cause this
        jobs.start(session, lease, resolved={})
        described = {"code": error.code, "message": error.message, "param": error.param}
        jobs.fail(session, lease, error=described)
        return False
    jobs.start(session, lease, resolved=resolved)
    return True


def _resolve(session: Session, job: Job) -> dict[str, Any]:
    """The hyperparameters with every "auto" replaced."""
    return specs.resolve(
        specs.parse_method(job.spec["method"], None),
        n_examples=_count_examples(session, job),
        seed=job.seed,
        nproc_per_node=specs.Resources.model_validate(job.resources).processes,
    )


def _count_examples(session: Session, job: Job) -> int:
    """Rows of the training file; of several, those that the mixture takes."""

    def count(file_id: str) -> int:
        return session.get_one(File, file_id).rows or 1

    mixture = job_files.mixture_of(job)
    if not mixture:
        return count(job.training_file)
    shares = [specs.Share.model_validate({k: v for k, v in part.items() if k != "file"}) for part in mixture]
    return sum(specs.count_mixed([count(part["file"]) for part in mixture], shares))


@worker_shutdown.connect
def _say_goodbye(**_: object) -> None:
    """The last word of a worker that was told to stop in order: no gang is to count on its node."""
    if "train" in app.amqp.queues.consume_from:
        try:
            with database().write() as session:
                node_table.leave(session, settings.node)
        except OperationalError as error:
            logger.warning("the database cannot be told that this worker stops: %s", error)


app.steps["worker"].add(tick.Ticks)  # pyright: ignore[reportOptionalSubscript] (never None)
worker_process_init.connect(shutdown.die_with_parent)
worker_shutting_down.connect(shutdown.tell_children)
