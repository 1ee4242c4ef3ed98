"""Why a job failed, from what its last attempt left behind, and what could be done about it."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from api.run_files import newest_attempt
from api.schemas.diagnosis import Diagnosis, Suggestion
from db.failures import Failure
from db.models import Job
from trainers.specs import halve_micro_batch

_TAIL_LINES = 50
_TAIL_LINES_OF_OTHERS = 10
_TAIL_BYTES = 64 * 1024
_LOG_OF_RANK = re.compile(r"log-(\d+)\.txt")  # of each other node of a gang
# Codes of `error`, which are OpenAI's or like them, and ours of the same thing.
_OF_ERRORS = {"cuda_out_of_memory": "cuda_oom", "out_of_memory": "cpu_oom"}
# Why attempts failed that were made until none was left.
_OF_REASONS = {
    "nccl_timeout": "nccl_timeout",
    "bad_checkpoint": "bad_checkpoint",  # of jobs that failed when it still got three
    "killed": "trainer_killed",
    "error": "trainer_error",
}
_RETRYABLE = {"disk_full", "nccl_timeout", "trainer_killed", "worker_lost"}
_BAD_FILE = ("invalid_training_file", "invalid_validation_file")
_TEXTS = {
    "bad_checkpoint": "The checkpoint belongs to other settings, other weights or another number of "
    "processes. Submit the job anew: a retry would take the same checkpoint.",
    "trainer_error": "The log ends with the error, which would come again: it is a fault of the service, or "
    "of the model.",
    "worker_lost": "The machine or its worker went away. Try again once it is back.",
}


def diagnose(job: Job, failure: Failure | None, *, runs_dir: Path) -> Diagnosis | None:
    """Why `job` failed; None unless it has."""
    if failure is None or job.error is None:
        return None
    code = _name_cause(job.error["code"], failure)
    return Diagnosis(
        code=code,
        message=str(job.error["message"]),
        retryable=code in _RETRYABLE,
        attempts=failure.attempts,
        file=failure.file_id,
        line=failure.line,
        suggestion=_advise(code, job, failure),
        log_tail=_read_tail(job, failure, runs_dir=runs_dir),
    )


def _name_cause(error_code: str, failure: Failure) -> str:
    if error_code in _BAD_FILE:
        return "bad_row" if failure.line is not None else "bad_data"
    if error_code != "too_many_attempts":
        return _OF_ERRORS.get(error_code, error_code)
    if failure.outcome == "lost":
        return "worker_lost"
    reason = (failure.exit_ or {}).get("reason")
    return _OF_REASONS.get(str(reason), "trainer_killed")


def _advise(code: str, job: Job, failure: Failure) -> Suggestion | None:
    match code:
        case "cuda_oom" | "cpu_oom":
            return _save_memory(job)
        case "nan_loss":
            return _calm_down(job)
        case "disk_full":
            return _keep_less(job)
        case "nccl_timeout":
            return _spread_less(job)
        case "bad_row":
            where = f"line {failure.line} of {failure.file_id or 'the file'}"
            text = f"Mend {where} and upload it again, or allow a part of the rows to be left out: "
            return Suggestion(text=text + "max_invalid_fraction of the upload.", changes={})
        case "trainer_killed" if (failure.exit_ or {}).get("signal") in (None, "SIGKILL"):
            advice = _save_memory(job)
            advice.text = f"A machine that runs out of memory kills processes. If it was that: {advice.text}"
            return advice
        case "trainer_killed":
            text = "The process crashed. If it does so again, the end of the log tells in which library."
            return Suggestion(text=text, changes={})
    text = _TEXTS.get(code)
    return Suggestion(text=text, changes={}) if text else None


def _save_memory(job: Job) -> Suggestion:
    asked = job.resolved or {}
    micro = asked.get("micro_batch_size")
    half = halve_micro_batch(job.method, micro) if isinstance(micro, int) else None
    if half is not None:
        given = job.spec["method"].get(job.method, {}).get("hyperparameters", {})
        if given.get("gradient_accumulation_steps"):
            batch = {"gradient_accumulation_steps": given["gradient_accumulation_steps"] * micro // half}
        else:
            batch = {"batch_size": asked["batch_size"]}
        return Suggestion(
            text=f"Pass {half} rows at once instead of {micro}, and let more passes make the same batch.",
            changes=_change(job, micro_batch_size=half, **batch),
        )
    if asked.get("gradient_checkpointing") is not True:
        return Suggestion(
            text="Compute activations again instead of keeping them; shorter rows help as well.",
            changes=_change(job, gradient_checkpointing=True),
        )
    return Suggestion(text="Use shorter rows, load_in_4bit, a smaller model, or a larger GPU.", changes={})


def _calm_down(job: Job) -> Suggestion:
    asked = job.resolved or {}
    changes: dict[str, Any] = {}
    if "learning_rate" in asked:
        changes["learning_rate"] = asked["learning_rate"] / 2
    text = "Learn more slowly"
    if asked.get("dtype") == "float16":
        changes["dtype"] = "bfloat16"
        text += ", in bfloat16, which holds larger numbers"
    return Suggestion(text=f"{text}; and look for broken rows.", changes=_change(job, **changes))


def _keep_less(job: Job) -> Suggestion:
    text = "Free space on the disk of the service, then try again: unchanged, it goes on from the last "
    text += "checkpoint"
    kept = (job.resolved or {}).get("save_total_limit")
    if not isinstance(kept, int) or kept <= 1:
        return Suggestion(text=f"{text}.", changes={})
    text += f". One checkpoint kept instead of {kept} needs less space, and begins anew."
    return Suggestion(text=text, changes=_change(job, save_total_limit=1))


def _spread_less(job: Job) -> Suggestion:
    asked = job.resources or {}
    text = (
        "A process stood still, or could not be reached. Try again; if it happens again, look at the log of "
    )
    text += "the process that the others waited for"
    # Between nodes there is a network to blame.
    for name, one in (("nnodes", "one node"), ("nproc_per_node", "one process")):
        if asked.get(name, 1) > 1:
            return Suggestion(text=f"{text}, or use {one}.", changes={f"resources.{name}": 1})
    return Suggestion(text=f"{text}.", changes={})


def _change(job: Job, **hyperparameters: Any) -> dict[str, Any]:
    return {f"method.{job.method}.hyperparameters.{name}": value for name, value in hyperparameters.items()}


def _read_tail(job: Job, failure: Failure, *, runs_dir: Path) -> list[str]:
    """The last lines of the log and of those of a gang's other nodes; none where there is no log any more."""
    folder = runs_dir / job.id
    if failure.kind == "merge":
        return _read_end(folder / str(job.trained_attempt) / "merge.log", n_lines=_TAIL_LINES)
    run_dir = folder / str(newest_attempt(folder))
    lines = _read_end(run_dir / "log.txt", n_lines=_TAIL_LINES)
    for path in _list_logs_of_others(run_dir):
        lines += [f"{path.name}:", *_read_end(path, n_lines=_TAIL_LINES_OF_OTHERS)]
    return lines


def _list_logs_of_others(run_dir: Path) -> Iterator[Path]:
    """By rank."""
    found = {
        int(named[1]): path for path in run_dir.glob("log-*") if (named := _LOG_OF_RANK.fullmatch(path.name))
    }
    yield from (found[rank] for rank in sorted(found))


def _read_end(path: Path, *, n_lines: int) -> list[str]:
    try:
        with path.open("rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - _TAIL_BYTES))
            text = log.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return text.splitlines()[-n_lines:]
