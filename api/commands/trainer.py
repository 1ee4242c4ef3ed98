"""Trainers of this machine, each a process of its own: only they read rows, and they need no server."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from api.client import ClientError
from api.commands.files import read_columns


def describe_layout(
    path: Path, *, format: str | None, column: list[str] | None, max_invalid: float | None = None
) -> dict[str, Any]:
    """How the rows of a file are to be read, as trainers take it. Raises ClientError for what cannot be."""
    from trainers.specs import Layout, SpecError  # slow to import, and few commands need it

    fraction = max_invalid or 0.0
    if not 0 <= fraction < 1:
        raise ClientError("--max-invalid-fraction must be a number from 0 up to 1, which is left out.")
    try:
        layout = Layout.of(path.name, format, read_columns(column), max_invalid_fraction=fraction)
    except SpecError as error:
        raise ClientError(f"{path}: {error.message}") from None
    return dataclasses.asdict(layout)


def ask_trainer(module: str, *arguments: str) -> dict[str, Any]:
    """The report of `python -m module`. Raises ClientError when there is none."""
    with tempfile.TemporaryDirectory(prefix="residency-") as folder:
        report = Path(folder, "report.json")
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments, f"--report={report}"],
            # A folder named `trainers` in the working directory would be imported instead of ours.
            env=os.environ
            | {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""}
            | {"ARROW_DEFAULT_MEMORY_POOL": "system"},  # so that what it decodes can be limited
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            raise ClientError(f"The file could not be looked at: {last[0]}")
        return json.loads(report.read_bytes())


def look_with_model(module: str, path: Path, *, model: str, **asked: Any) -> dict[str, Any]:
    """What a model folder of this machine makes of a file, as `trainers.preview` is asked.

    Raises ClientError.
    """
    if not Path(model).is_dir():
        raise ClientError(
            f"{path} is a file of this machine, and --model is no model folder of it: {model}. "
            "To look with a model of the server, upload the file and give its id."
        )
    request = {"model_dir": str(Path(model).absolute()), "file": str(path.absolute()), **asked}
    with tempfile.TemporaryDirectory(prefix="residency-") as folder:
        written = Path(folder, "request.json")
        written.write_text(json.dumps(request))
        found = ask_trainer(module, str(written))
    if "error" in found:
        raise ClientError(found["error"]["message"])
    return found
