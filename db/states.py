"""The legal states of everything and the legal transitions of jobs, which only `db.jobs` applies."""

JOB_TRANSITIONS: dict[str, frozenset[str]] = {
    # for another stage of its pipeline
    "waiting": frozenset({"validating_files", "queued", "failed", "cancelled"}),
    "validating_files": frozenset({"queued", "failed", "cancelled"}),
    "queued": frozenset({"running", "paused", "failed", "cancelled"}),
    # back to `queued`: the worker died or was told to stop, and the work goes on elsewhere
    "running": frozenset({"queued", "paused", "succeeded", "failed", "cancelled"}),
    "paused": frozenset({"queued", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
JOB_STATES = tuple(JOB_TRANSITIONS)
JOB_TERMINAL = frozenset(state for state, following in JOB_TRANSITIONS.items() if not following)
# What a job does when it has too little memory, instead of failing.
OOM_ANSWERS = ("halve_batch",)
# Finer progress of a running job; never a status.
JOB_PHASES = ("preparing", "loading", "training", "evaluating", "saving", "merging")

FILE_STATES = ("uploaded", "processed", "error")
UPLOAD_STATES = ("pending", "completed", "cancelled", "expired")
MODEL_KINDS = ("base", "merged", "checkpoint")
MODEL_STATES = ("importing", "ready", "failed")
DEPLOYMENT_STATES = ("pending", "loading", "ready", "failed", "stopped")
TASK_STATES = ("queued", "leased", "closed")
TASK_QUEUES = {"train": "train", "validate": "cpu", "import": "cpu", "merge": "cpu", "preview": "cpu"}
PREVIEW_KINDS = ("rows", "tokens")
NODE_STATES = ("active", "draining")
MEMBER_STATES = ("called", "running", "leaving", "left", "done", "failed")
ATTEMPT_OUTCOMES = ("done", "failed", "stopped", "cancelled", "lost")


def check_job_transition(current: str, following: str) -> bool:
    """Whether a job may go from `current` to `following`."""
    return following in JOB_TRANSITIONS[current]
