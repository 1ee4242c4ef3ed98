"""Imports models: fetched if need be, copied or converted, digested and checked by trainer processes."""

import contextlib
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from db import adapters, registry, sources, tasks
from db.errors import Conflict, LeaseLost, NotFound
from db.models import Model
from db.session import Database
from db.settings import DatabaseSettings
from db.tasks import Lease
from workers import children, hub, leases, processes
from workers.leases import Heartbeat
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)
Report = dict[str, Any]


@dataclass(frozen=True)
class _Import:
    """What is imported, from where to where."""

    sources: list[str]
    trained: dict[str, Path]  # the adapters of those sources that are jobs
    base_arguments: list[str]
    target: Path
    scratch: Path
    marker: str


def run(database: Database, lease: Lease, settings: WorkerSettings) -> None:
    """Carry out the import behind `lease`."""
    with contextlib.suppress(LeaseLost):
        _run(database, lease, settings)


def _run(database: Database, lease: Lease, settings: WorkerSettings) -> None:
    heartbeat = leases.Heartbeat(database, lease, settings)
    model_pk = int(lease.subject_id)
    paths = DatabaseSettings()
    target = paths.models_dir / f"base-{model_pk}-{lease.token}"
    scratch = paths.home_dir / "scratch" / f"import-{model_pk}-{lease.token}"
    for folder in (target.parent, scratch):
        folder.mkdir(parents=True, exist_ok=True)
    report: Report | None
    try:
        with database.read() as session:
            model = session.get_one(Model, model_pk)
            work = _Import(
                sources=sources.split(model.source),
                trained=_find_trained(session, model),
                base_arguments=_describe_base(session, model),
                target=target,
                scratch=scratch,
                marker=leases.marker(database, lease),
            )
        report = _import(work, heartbeat, settings)
    except (NotFound, Conflict) as error:
        report = {"error": {"code": "base_gone", "message": f"The adapter or its base is gone: {error}"}}
    except children.ChildFailed as failure:
        logger.error("import of model %s broke: %s", model_pk, failure)
        report = {"error": {"code": "import_failed", "message": f"The import broke: {failure}"}}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    heartbeat.settle(lambda session: _record(session, lease, model_pk, report=report, target=target))


def _describe_base(session: Session, model: Model) -> list[str]:
    """The arguments that tell the importer of an adapter's base; none for a whole model."""
    if model.parent_id is None:
        return []
    base = registry.get_ready(session, model.parent_id, org_id=model.org_id)
    assert base.path is not None, "a ready model has a folder"  # noqa: S101
    names = {base.id, base.root_id}
    names.add(sources.parse_hub(base.source).repo if sources.is_hub(base.source) else base.source)
    first = sources.split(model.source)[0]
    if sources.is_job(first):  # whose base is this one by its digest, under whatever name
        names.add(adapters.find(session, first, org_id=model.org_id, hold=False)[1].model_id)
    names |= {name.rstrip("/").rpartition("/")[2] for name in names}
    return [f"--base={base.path}", *(f"--base-name={name}" for name in sorted(names) if name)]


def _find_trained(session: Session, model: Model) -> dict[str, Path]:
    """The folders of the adapters that jobs have trained."""
    names = [source for source in sources.split(model.source) if sources.is_job(source)]
    found = {name: adapters.find(session, name, org_id=model.org_id, hold=False)[0] for name in names}
    return {name: Path(str(made.adapter_path)) for name, made in found.items()}


def _import(work: _Import, heartbeat: Heartbeat, settings: WorkerSettings) -> Report | None:
    """The importer's report; None when a shutdown ended it."""
    paths: list[Path] = []
    origins: list[Report] = []
    for position, source in enumerate(work.sources):
        place = work.scratch / f"snapshot-{position}"
        located = _locate(source, work, heartbeat, settings, place=place)
        if located is None or "error" in located:
            return located
        paths.append(located.pop("path"))
        origins.append({"source": source, **located})
    report_path = work.target.with_suffix(".json")
    arguments = [str(paths[0]), str(work.target), "--report", str(report_path), *work.base_arguments]
    report = children.run_for_report(
        processes.module_command("trainers.importer", *arguments, *(f"--then={path}" for path in paths[1:])),
        report_path=report_path,
        marker=work.marker,
        heartbeat=heartbeat,
        log_path=work.target.with_suffix(".log"),
    )
    if report is None or "error" in report:
        return report
    if len(origins) == 1:
        return report | {name: value for name, value in origins[0].items() if name != "source"}
    merged = zip(origins, report["adapters"], strict=True)
    return report | {"adapters": [origin | facts for origin, facts in merged]}


def _locate(
    source: str, work: _Import, heartbeat: Heartbeat, settings: WorkerSettings, *, place: Path
) -> Report | None:
    """Where the files of a source are (`path`), fetched into `place` if need be, and what else is known."""
    if source in work.trained:
        return {"path": work.trained[source]}
    if not sources.is_hub(source):
        if settings.may_import(Path(source)):
            return {"path": Path(source)}
        message = f"'{source}' is not under a folder of RESIDENCY_IMPORT_DIRS on the worker."
        return {"error": {"code": "import_not_allowed", "message": message}}
    if not settings.hub:
        return {"error": hub.DISABLED}
    fetched = hub.fetch_model(
        sources.parse_hub(source), to=place, scratch=work.scratch, marker=work.marker, heartbeat=heartbeat
    )
    if fetched is None or "error" in fetched:
        return fetched
    return {"path": place, "revision": fetched["revision"]}


def _record(session: Session, lease: Lease, model_pk: int, *, report: Report | None, target: Path) -> None:
    if report is None:
        tasks.requeue(session, lease, outcome="stopped", charge=False)
    elif "error" in report:
        tasks.finish(session, lease, outcome="failed", exit_=report)
        error = report["error"]
        registry.fail_import(session, model_pk, code=error["code"], message=error["message"])
    else:
        tasks.finish(session, lease, outcome="done", exit_=report)
        registry.record_import(session, model_pk, path=target, report=report)
