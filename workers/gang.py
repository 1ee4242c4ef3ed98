"""A node's part in an attempt that another node leads: the same torchrun, ended with the attempt."""

import logging
from contextlib import suppress

from sqlalchemy.orm import Session

from db import gangs
from db.errors import LeaseLost
from db.gangs import Member
from db.session import Database
from workers import launch, leases, processes, shutdown
from workers.addresses import address_of
from workers.settings import WorkerSettings
from workers.train import read_nproc, run_dir_of

logger = logging.getLogger(__name__)


def take_part(database: Database, settings: WorkerSettings) -> bool:
    """Carry out this node's part of an attempt that it was called to; False if it was not."""
    with database.write() as session:
        member = gangs.join(session, leases.this_owner(settings), ttl_s=settings.lease_ttl_s)
    if member is None:
        return False
    logger.info("job %s: taking part in attempt %s as node %s", member.subject_id, member.token, member.rank)
    well = False
    with suppress(LeaseLost):
        well = _run(database, member, settings)
    gone = not processes.carrying(leases.marker_of_member(database, member))
    with database.write() as session:
        gangs.leave(session, member, well=well, gone=gone)
    return True


def _run(database: Database, member: Member, settings: WorkerSettings) -> bool:
    run_dir = run_dir_of(member.subject_id, member.token)
    nproc = read_nproc(run_dir)
    marker = leases.marker_of_member(database, member)

    def renew(session: Session) -> None:
        gangs.renew(session, member, ttl_s=settings.lease_ttl_s, leaving=shutdown.requested())

    heartbeat = leases.Heartbeat(database, renew, settings)

    def on_beat() -> bool:
        heartbeat.beat(lambda _: None)
        return shutdown.requested()

    address = address_of(settings)
    argv = launch.torchrun_in_gang(
        run_dir,
        nproc=nproc,
        nodes=member.nodes,
        rank=member.rank,
        rendezvous=member.rendezvous,
        address=address,
    )
    env = launch.environment(marker, member.devices, nproc=nproc, settings=settings, address=address)
    child = launch.spawn(argv, env=env, run_dir=run_dir, log_path=run_dir / f"log-{member.rank}.txt")
    processes.supervise(
        child,
        marker=marker,
        on_beat=on_beat,
        beat_s=heartbeat.interval_s,
        grace_s=settings.stop_grace_s + 10,
    )
    return child.returncode == 0
