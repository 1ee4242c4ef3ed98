"""Why a job failed, from what its last attempt left behind, and what could be done about it."""

import os
from pathlib import Path
from typing import Any

from api.diagnosis_schemas import Diagnosis, Suggestion
from api.run_files import newest_attempt
from db.failures import Failure
from db.models import Job
from trainers.specs import halve_micro_batch

_TAIL_LINES = 50
_TAIL_BYTES = 64 * 1024
# Codes of `error`, which are OpenAI's or like them, and ours of the same thing.
_OF_ERRORS = {"cuda_out_of_memory": "cuda_oom", "out_of_memory": "cpu_oom"}
# Why attempts failed that were made until none was left.
_OF_REASONS = {
    "nccl_timeout": "nccl_timeout",
    "bad_checkpoint": "bad_checkpoint",
    "killed": "trainer_killed",
    "error": "trainer_error",
}
_RETRYABLE = {"disk_full", "nccl_timeout", "trainer_killed", "worker_lost"}
_BAD_FILE = ("invalid_training_file", "invalid_validation_file")
_TEXTS = {
    "nccl_timeout": "A process stood still, or could not be reached. Try again; if it happens again, look at "
    "the log of the process that the others waited for, or use one process.",
    "disk_full": "Free space on the disk of the service, or keep fewer checkpoints, then try again.",
    "bad_checkpoint": "The checkpoint belongs to other settings or other weights. Submit the job anew.",
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


def _change(job: Job, **hyperparameters: Any) -> dict[str, Any]:
    return {f"method.{job.method}.hyperparameters.{name}": value for name, value in hyperparameters.items()}


def _read_tail(job: Job, failure: Failure, *, runs_dir: Path) -> list[str]:
    """The last lines of the log; none where there is no log any more."""
    folder = runs_dir / job.id
    merging = failure.kind == "merge"
    attempt = job.trained_attempt if merging else newest_attempt(folder)
    path = folder / str(attempt) / ("merge.log" if merging else "log.txt")
    try:
        with path.open("rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - _TAIL_BYTES))
            text = log.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return text.splitlines()[-_TAIL_LINES:]
