"""Models in words: what kind one is, whether it answers, and where its page and its files are."""

from typing import Any
from urllib.parse import quote, urlencode

from api.dashboard.client import Api, locate
from api.dashboard.table import text_cell

Model = dict[str, Any]
Deployment = dict[str, Any]
NOT_DEPLOYED = "not deployed"
_KINDS = {"base": "base model", "merged": "trained here", "checkpoint": "checkpoint of a job"}
# A deployment that failed is still there: another try takes its place.
LIVE = ("pending", "loading", "ready", "failed")
_MOST_DEPLOYMENTS = 1000


def path_of(model_id: str) -> str:
    """Its page."""
    return f"/models/{quote(model_id, safe='')}"


def url_of(model_id: str, *more: str) -> str:
    """Its resource in the API."""
    return locate("models", model_id, *more)


def chat_path(model_id: str) -> str:
    """The playground with this model chosen."""
    return f"/playground?{urlencode({'model': model_id})}"


def file_path(model_id: str, name: str) -> str:
    """Where the browser gets one of its files."""
    return f"/download/model?{urlencode({'model': model_id, 'name': name})}"


def kind_of(model: Model) -> str:
    """Imported, trained, or saved on the way."""
    return _KINDS.get(model["kind"], str(model["kind"]))


def name_cell(model: Model) -> dict[str, Any]:
    """Its id, linked to its page."""
    problem = (model.get("error") or {}).get("message", "")
    return text_cell(model["id"], href=path_of(model["id"]), note=problem)


async def read_deployments(api: Api) -> dict[str, Deployment]:
    """The live deployment of each model that has one, failed ones too."""
    found = await api.list_all("/v1/deployments", at_most=_MOST_DEPLOYMENTS, limit=_MOST_DEPLOYMENTS)
    live: dict[str, Deployment] = {}
    for deployment in found:  # the newest first
        if deployment["status"] in LIVE:
            live.setdefault(deployment["model"], deployment)
    return live


def state_of(deployment: Deployment | None) -> str:
    """Whether a model answers, in one word or two."""
    return NOT_DEPLOYED if deployment is None else deployment["status"]
