"""The application: all routes, what surrounds them, and what starts with them. `api.server` serves it."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.concurrency import run_in_threadpool
from starlette.middleware.exceptions import ExceptionMiddleware

from api import (
    api_docs,
    artifacts,
    chat,
    curves,
    dashboard_link,
    deployments,
    errors,
    event_stream,
    files,
    health,
    history,
    jobs,
    keys,
    log_stream,
    methods,
    metrics,
    model_files,
    models,
    nodes,
    pipelines,
    prepared,
    previews,
    retries,
    storage,
    uploads,
    votes,
    watch,
)
from api.auth import KeyFirst, authenticate
from api.deps import refuse_unknown_query
from api.key_uses import KeyUses
from api.middleware import BodyRules, RequestFrame
from api.schemas.common import ErrorBody
from api.settings import ApiSettings
from db.migrate import upgrade
from db.session import Database

logger = logging.getLogger(__name__)
_PEPPER_MIN_CHARS = 32
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is at fault."},
    "5XX": {"model": ErrorBody, "description": "The service is at fault."},
}


def create_app(settings: ApiSettings | None = None, database: Database | None = None) -> FastAPI:
    """The HTTP layer over `database`. Both arguments default to what `RESIDENCY_*` says."""
    settings = settings or ApiSettings()
    app = FastAPI(
        title="Residency",
        summary="Training as a service behind OpenAI's fine-tuning API.",
        lifespan=_lifespan,
        docs_url=None,  # the framework's own asks a CDN for its scripts
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.settings = settings
    app.state.database = database or Database(settings.url)
    app.state.owns_database = database is None
    app.state.storage = storage.Meter(settings.home_dir)
    app.state.key_uses = KeyUses(app.state.database)
    errors.install(app)
    # The last one is the outermost. What the first one refuses is worded as everywhere by the second.
    app.add_middleware(KeyFirst)
    app.add_middleware(ExceptionMiddleware, handlers=app.exception_handlers)
    rules = BodyRules(settings.max_body_bytes, settings.body_idle_s, settings.body_min_bytes_per_s)
    app.add_middleware(RequestFrame, rules=rules)
    # One place decides that everything below /v1 needs a key.
    v1 = APIRouter(
        prefix="/v1", dependencies=[Depends(authenticate), Depends(refuse_unknown_query)], responses=_ERRORS
    )
    data = (files, uploads, previews, prepared)
    work = (jobs, retries, pipelines, history, curves, event_stream, log_stream, artifacts, methods)
    for resource in (*data, *work, model_files, models, deployments, chat, votes, keys, nodes, storage):
        v1.include_router(resource.router)
    app.include_router(v1)
    app.include_router(health.router)
    app.include_router(metrics.router)
    app.include_router(dashboard_link.router)
    app.include_router(api_docs.router)
    app.mount(api_docs.ASSETS_PATH, api_docs.assets)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: ApiSettings = app.state.settings
    if len(settings.key_pepper.get_secret_value()) < _PEPPER_MIN_CHARS:
        raise ValueError(f"RESIDENCY_KEY_PEPPER must have at least {_PEPPER_MIN_CHARS} characters")
    settings.home_dir.mkdir(parents=True, exist_ok=True)
    await run_in_threadpool(upgrade, app.state.database)
    async with (
        chat.new_client() as app.state.engines,
        watch.watching(app.state.database) as app.state.watch,
    ):
        yield
    await run_in_threadpool(app.state.key_uses.close)
    if app.state.owns_database:
        app.state.database.dispose()
