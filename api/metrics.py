"""/metrics: how the service does, in the text form that Prometheus reads.

What the tables tell is read when somebody asks, so it is the same whichever process answers. Requests are
counted where they are served: by the process alone, or by all processes of `python -m api.server` together.
"""

import hmac
from collections.abc import Iterable, Iterator
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response, Security
from fastapi.security import HTTPAuthorizationCredentials
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError

from api.auth import authenticate, bearer, require_admin
from api.deps import DatabaseDep, SettingsDep
from api.health import broker_answers
from api.instruments import PREFIX, requests_of_all
from api.nodes import require_host_admin
from db import measures
from db.session import Database

router = APIRouter(tags=["Health"])


def require_scraper(
    request: Request,
    database: DatabaseDep,
    settings: SettingsDep,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)],
) -> None:
    """The token of RESIDENCY_METRICS_TOKEN, or a key of an admin of the host. Raises ApiError (401, 403)."""
    token = settings.metrics_token.get_secret_value()
    if token and credentials is not None:
        if hmac.compare_digest(credentials.credentials.encode(), token.encode()):
            return
    require_host_admin(require_admin(authenticate(request, database, settings, credentials)))


@router.get(
    "/metrics",
    summary="Read metrics",
    response_class=Response,
    dependencies=[Depends(require_scraper)],
    responses={200: {"content": {"text/plain": {}}, "description": "In the text form of Prometheus."}},
)
def read_metrics(database: DatabaseDep) -> Response:
    """Numbers about queue, work, machines, engines and requests; docs/observability.md lists them."""
    registry = CollectorRegistry()
    registry.register(_Service(database))
    text = generate_latest(registry) + generate_latest(requests_of_all())
    return Response(text, media_type=CONTENT_TYPE_LATEST)


class _Service(Collector):
    """What the tables tell, and whether database and broker answer: the one thing told while they do not."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def collect(self) -> Iterable[Metric]:
        """Everything, at one moment."""
        broker = float(broker_answers())
        yield GaugeMetricFamily(f"{PREFIX}broker_up", "Whether the broker answers.", broker)
        try:
            found = list(self._read())
        except SQLAlchemyError:
            found = []
        up = float(bool(found))
        yield GaugeMetricFamily(f"{PREFIX}database_up", "Whether the database answers.", up)
        yield from found

    def _read(self) -> Iterator[Metric]:
        with self._database.read() as session:
            for measure, values in measures.read_all(session):
                family = CounterMetricFamily if measure.is_total else GaugeMetricFamily
                metric = family(PREFIX + measure.name, measure.help, labels=measure.labels)
                for labels, value in sorted(values.items()):
                    metric.add_metric(labels, value)
                yield metric
