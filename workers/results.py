"""The result file of a job: its metrics as CSV, in the columns that OpenAI's fine-tuning jobs have."""

import csv
import io
from pathlib import Path

from sqlalchemy.orm import Session

from db import events, files, jobs
from db.blobs import BlobWriter
from db.models import Job

FILENAME = "step_metrics.csv"
_COLUMNS = {
    "step": "step",
    "train_loss": "train_loss",
    "train_accuracy": "train_mean_token_accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_mean_token_accuracy",
}


def write(session: Session, job_id: str, *, blobs_dir: Path) -> None:
    """Store the metrics of a job as a file and name it in the job. Call under the lease."""
    job = session.get_one(Job, job_id)
    with BlobWriter(blobs_dir, job.org_id) as writer:
        writer.write(_to_csv(session, job_id))
        writer.sync()
        file = files.create(
            session, writer, org_id=job.org_id, filename=FILENAME, purpose=files.RESULTS_PURPOSE
        )
    jobs.set_result_files(session, job, [file.id])


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
