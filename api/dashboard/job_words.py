"""Jobs in words: what one is called, how far it is, when it ends, why it waits."""

from typing import Any

from api.dashboard.client import Api, locate
from api.dashboard.formats import UNKNOWN, ago, duration, moment, number, size
from api.dashboard.table import text_cell

Job = dict[str, Any]
OVER = ("succeeded", "failed", "cancelled")
WAITING = ("queued", "waiting", "validating_files", "paused")


def path_of(job_id: str) -> str:
    """Its page."""
    return f"/jobs/{job_id}"


def url_of(job_id: str, *more: str) -> str:
    """Its resource in the API."""
    return locate("fine_tuning", "jobs", job_id, *more)


def name_of(job: Job) -> str:
    """What its owner called it, else its id."""
    return job.get("user_provided_suffix") or job["id"]


def name_cell(job: Job) -> dict[str, Any]:
    """Its name, linked to its page, with its id below; what has no name, by the begin of its id."""
    name, job_id = job.get("user_provided_suffix"), job["id"]
    short = f"{job_id[:12]}…"
    return text_cell(name or short, href=path_of(job_id), note=short if name else "", title=job_id)


def id_cell(job_id: str) -> dict[str, Any]:
    """A job of which only the id is known, linked to its page."""
    return text_cell(f"{job_id[:12]}…", href=path_of(job_id), title=job_id)


def method_of(job: Job) -> str:
    """How it trains."""
    return job["method"]["type"]


def progress_cell(job: Job) -> dict[str, Any]:
    """How far it is, with what it is busy with."""
    progress = job.get("progress") or {}
    percent, phase = progress.get("percent"), job.get("phase")
    if percent is None:
        return text_cell(phase or "starting", bar=0.0)
    step, total = number(progress.get("step")), number(progress.get("total_steps"))
    doing = "" if phase in (None, "training") else f" · {phase}"
    return text_cell(f"{step} of {total}{doing}", bar=percent / 100, title=f"{percent} %")


def steps_cell(job: Job) -> dict[str, Any] | str:
    """How far it came."""
    progress = job.get("progress") or {}
    if progress.get("step") is None:
        return UNKNOWN
    return f"{number(progress['step'])} of {number(progress.get('total_steps'))}"


def left(job: Job) -> str:
    """How long it will still take."""
    eta_s = (job.get("progress") or {}).get("eta_seconds")
    return UNKNOWN if eta_s is None else f"about {duration(eta_s)}"


def speed_of(job: Job) -> str:
    """Tokens a second."""
    speed = (job.get("progress") or {}).get("tokens_per_s")
    return UNKNOWN if speed is None else f"{number(round(speed))} tokens/s"


def took(job: Job) -> str:
    """From its submission to its end."""
    ended = job.get("finished_at")
    return UNKNOWN if ended is None else duration(ended - job["created_at"])


def why_waiting(job: Job) -> str:
    """What has to happen before it starts, most telling first."""
    return "; ".join(_reason(reason) for reason in job.get("blocked_by") or []) or UNKNOWN


def _reason(blocked: dict[str, Any]) -> str:
    match blocked["reason"]:
        case "stage":
            return f"stage {blocked['name']} is {blocked['status'].replace('_', ' ')}"
        case "file":
            return f"{blocked['id']} is being checked"
        case "earlier_jobs":
            count = blocked["count"]
            return f"{count} job{'s' if count > 1 else ''} before it"
        case "devices":
            return f"needs {blocked['needed']} device{'s' if blocked['needed'] > 1 else ''}, others hold them"
        case "pause_after_failure":
            return f"tries again {ago(blocked['until'])}"
        case "paused":
            return "paused, goes on when resumed"
        case "worker":
            return "no worker has taken it yet"
        case "too_few_devices":
            return f"needs {blocked['needed']} devices, no machine has more than {blocked['most']}"
        case "too_few_nodes":
            return f"needs {blocked['needed']} machines, {blocked['there']} could take a part"
        case "draining":
            return f"{', '.join(blocked['nodes'])}: no new work there until undrained"
        case "quarantined":
            return "the devices that it needs are kept from use; see Admin"
        case "disk":
            return f"needs {size(blocked['needed_bytes'])} of disk, {size(blocked['free_bytes'])} are free"
        case other:
            return str(other).replace("_", " ")


def position_of(job: Job) -> str:
    """Its place in the queue, from 1."""
    position = job.get("queue_position")
    return UNKNOWN if position is None else f"{position + 1}"


def when_cell(moment_s: float | None) -> dict[str, Any]:
    """A moment as a distance; pointing at it shows it in full."""
    return text_cell(ago(moment_s), title=moment(moment_s))


def memory_cell(used_bytes: int | None, all_bytes: int | None) -> dict[str, Any]:
    """Memory in use, of how much."""
    if used_bytes is None or not all_bytes:
        return text_cell(size(all_bytes))
    return text_cell(f"{size(used_bytes)} of {size(all_bytes)}", bar=used_bytes / all_bytes)


async def in_detail(api: Api, jobs: list[Job]) -> list[Job]:
    """The jobs as single ones, with what lists leave out."""
    return [await api.get(url_of(job["id"])) for job in jobs]
