"""Curves of jobs as lines of charts, and which of them belong into one chart."""

from typing import Any

from api.dashboard.charts import Points
from api.dashboard.client import Api
from api.dashboard.job_words import url_of

_TWIN = "full_valid_"  # OpenAI's name for what is `valid_` here
_PREFIXES = ("train_", "valid_", "eval_")
_TITLES = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_s": "Tokens per second",
    "kl": "KL",
}
_FIRST, _LAST = ("loss",), ("learning_rate", "grad_norm", "tokens_per_s")
_LEFT_OUT = ("epoch", "step_time_s")


async def fetch_curves(api: Api, job_id: str, *, max_points: int = 500) -> dict[str, Any]:
    """What `GET …/curves` says: `series` by name, each with `steps` and `values`."""
    return await api.get(url_of(job_id, "curves"), max_points=max_points)


def names_of(curves: dict[str, Any]) -> list[str]:
    """The names of the series, without those that say nothing over steps."""
    series = curves.get("series", {})
    return [
        name
        for name in series
        if name not in _LEFT_OUT and name.replace(_TWIN, "valid_", 1) not in series.keys() - {name}
    ]


def lines_of(curves: dict[str, Any]) -> dict[str, Points]:
    """Each series as (step, value) pairs."""
    return {
        name: list(zip(curves["series"][name]["steps"], curves["series"][name]["values"], strict=True))
        for name in names_of(curves)
    }


def group(lines: dict[str, Points]) -> dict[str, dict[str, Points]]:
    """The lines of each chart by its title: train and valid of one measure share one, loss is first."""
    charts: dict[str, dict[str, Points]] = {}
    for name, points in lines.items():
        measure = _measure(name)
        label = name.removesuffix(f"_{measure}").replace("_", " ")
        charts.setdefault(measure, {})[label] = points
    ordered = sorted(charts, key=lambda measure: (_rank(measure), measure))
    return {title_of(measure): charts[measure] for measure in ordered}


def title_of(measure: str) -> str:
    """What a chart of this measure is called."""
    return _TITLES.get(measure) or measure.replace("_", " ").capitalize()


def _measure(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _rank(measure: str) -> int:
    if measure in _FIRST:
        return 0
    return 2 + _LAST.index(measure) if measure in _LAST else 1
