"""/v1/fine_tuning/jobs/{id}/curves: what training measured, thinned out to what a chart can show."""

import math
from collections.abc import Iterable
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response
from pydantic_core import from_json

from api.auth import CallerDep
from api.deps import DatabaseDep
from api.schemas.jobs import Curve, CurvesObject
from db import events, jobs

router = APIRouter(prefix="/fine_tuning/jobs/{job_id}", tags=["Fine-tuning"])

_NOT_MEASURED = ("step", "total_steps")
Point = tuple[int, float]


@router.get(
    "/curves",
    summary="Retrieve fine-tuning curves",
    response_model=CurvesObject,
    responses={304: {"description": "Nothing has happened since the answer with this ETag."}},
)
def retrieve_curves(
    job_id: str,
    caller: CallerDep,
    database: DatabaseDep,
    response: Response,
    max_points: Annotated[
        int, Query(ge=4, le=10_000, description="Of each series; the first, the last and all peaks are kept.")
    ] = 500,
    if_none_match: Annotated[
        str | None, Header(description="The `etag` of an earlier answer: 304 when there is nothing new.")
    ] = None,
) -> Response | CurvesObject:
    """Every number that training reports of its steps, as series."""
    with database.read() as session:
        job = jobs.get(session, job_id, org_id=caller.org_id)
        # Read before the metrics: what comes in between is news to whoever asks with this tag.
        tag = f'W/"{events.latest(session, {job.id}).get(job.id, 0)}-{max_points}"'
        if tag in (if_none_match or "").split(", "):
            return Response(status_code=304, headers={"etag": tag})
        texts = events.metrics_texts(session, job.id)
    response.headers["etag"] = tag
    return _curves(job.id, [from_json(text) for text in texts], max_points=max_points)


def _curves(job_id: str, records: list[dict[str, Any]], *, max_points: int) -> CurvesObject:
    thinned = {name: thin(points, max_points=max_points) for name, points in read_series(records).items()}
    return CurvesObject(
        job_id=job_id,
        last_step=max((record["step"] for record in records), default=None),
        total_steps=records[-1]["total_steps"] if records else None,
        series={
            name: Curve(steps=[step for step, _ in points], values=[value for _, value in points])
            for name, points in thinned.items()
        },
    )


def read_series(records: Iterable[dict[str, Any]]) -> dict[str, list[Point]]:
    """The numbers of metrics records by name, each series by rising step.

    What is no number (a loss that ran away is none) is no point. A step that was trained again after an
    interruption counts as it went the last time.
    """
    found: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and name not in _NOT_MEASURED and math.isfinite(value):
                found.setdefault(name, {})[record["step"]] = value
    return {name: sorted(found[name].items()) for name in sorted(found)}


def thin(points: list[Point], *, max_points: int) -> list[Point]:
    """At most `max_points` (4 or more) of `points`, in order.

    The first and the last are kept, and the lowest and the highest of each of equal parts between them: no
    peak is lost.
    """
    if len(points) <= max_points:
        return points
    inner, parts = points[1:-1], (max_points - 2) // 2
    kept = [points[0]]
    for part in range(parts):
        some = inner[part * len(inner) // parts : (part + 1) * len(inner) // parts]
        kept += sorted({min(some, key=_value), max(some, key=_value)})
    return [*kept, points[-1]]


def _value(point: Point) -> float:
    return point[1]
