"""A library that ends its process over a file is a finding; a process that others end is not."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.parquet import write_crashing
from tests.stack import wait_for


def validate(path: Path, report: Path) -> list[str]:
    return [sys.executable, "-m", "trainers.validate", str(path), f"--report={report}"]


def test_a_file_that_its_reader_crashes_on_is_unreadable(tmp_path: Path) -> None:
    path, report = tmp_path / "rows.parquet", tmp_path / "report.json"
    path.write_bytes(write_crashing())
    read = f"from pyarrow import parquet; parquet.read_metadata({str(path)!r}).row_group(0).column(1)"
    crashed = subprocess.run([sys.executable, "-c", read], capture_output=True, check=False)
    assert crashed.returncode == -signal.SIGABRT, "it no longer is such a file"

    done = subprocess.run(validate(path, report), capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_bytes())
    assert found["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (found["accepted"], found["whole"], found["rows"]) == (False, False, 0)
    message = "the file is not whole Parquet: its reader crashed on it (SIGABRT)"
    assert found["errors"] == [{"line": 1, "code": "unreadable", "message": message}]
    assert found["reasons"] == {"unreadable": 1}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_reader_that_others_end_finds_nothing(tmp_path: Path, number: signal.Signals) -> None:
    path, report = tmp_path / "rows.parquet", tmp_path / "report.json"
    os.mkfifo(path)  # its reader waits until somebody writes
    with subprocess.Popen(validate(path, report), stderr=subprocess.PIPE, text=True) as checking:
        parent = psutil.Process(checking.pid)

        def find_reader() -> psutil.Process | None:
            started = [child for child in parent.children() if "spawn_main" in " ".join(child.cmdline())]
            return next(iter(started), None)

        try:
            reader = wait_for(find_reader, within_s=30, what="a process that reads")
            reader.send_signal(number)
            _, said = checking.communicate(timeout=30)
        finally:
            checking.kill()
    assert checking.returncode == 1
    assert f"exit status -{number}" in said
    assert not report.exists()
