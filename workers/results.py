"""The result files of a job: its metrics as CSV, in OpenAI's columns, and how it was evaluated as JSON."""

import csv
import io
from pathlib import Path

from sqlalchemy.orm import Session

from db import events, files, jobs
from db.blobs import BlobWriter
from db.models import Job

METRICS_FILE = "step_metrics.csv"
EVALUATION_FILE = "evaluation.json"
_COLUMNS = {
    "step": "step",
    "train_loss": "train_loss",
    "train_accuracy": "train_mean_token_accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_mean_token_accuracy",
}


def write(session: Session, job_id: str, *, blobs_dir: Path, output_dir: Path) -> None:
    """Store the metrics of a job, and its evaluation if its output has one, and name the files in the job.

    Call under the lease.
    """
    job = session.get_one(Job, job_id)
    found = {METRICS_FILE: _to_csv(session, job_id)}
    evaluation = output_dir / EVALUATION_FILE
    if evaluation.is_file():
        found[EVALUATION_FILE] = evaluation.read_bytes()
    made = [_store(session, job, name, data, blobs_dir=blobs_dir) for name, data in found.items()]
    jobs.set_result_files(session, job, made)


def _store(session: Session, job: Job, name: str, data: bytes, *, blobs_dir: Path) -> str:
    with BlobWriter(blobs_dir, job.org_id) as writer:
        writer.write(data)
        writer.sync()
        file = files.create(session, writer, org_id=job.org_id, filename=name, purpose=files.RESULTS_PURPOSE)
    return file.id


def _to_csv(session: Session, job_id: str) -> bytes:
    """A line a step; a step that was trained again after an interruption counts as it went the last time."""
    steps: dict[int, dict[str, object]] = {}
    for data in events.all_metrics(session, job_id):
        row = steps.setdefault(data["step"], {"step": data["step"]})
        row |= {column: data[name] for column, name in _COLUMNS.items() if data.get(name) is not None}
    text = io.StringIO()
    table = csv.DictWriter(text, list(_COLUMNS), lineterminator="\n")
    table.writeheader()
    table.writerows(steps[step] for step in sorted(steps))
    return text.getvalue().encode()
