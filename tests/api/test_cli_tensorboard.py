"""`residency tensorboard`: the real program shows the runs of the jobs that were named, and ends with us."""

import os
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from torch.utils.tensorboard import SummaryWriter

from tests.api.cli_peer import run
from tests.stack import processes_of, wait_for

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for run_dir in ("ftjob-a/1", "ftjob-a/2", "ftjob-b/1", "ftjob-c/1"):
        writer = SummaryWriter(str(tmp_path / "runs" / run_dir / "tensorboard"))  # as training does
        writer.add_scalar("loss", 2.0, 1)
        writer.close()
    (tmp_path / "runs" / "ftjob-waits" / "1").mkdir(parents=True)
    return tmp_path


@contextmanager
def started(home: Path, *jobs: str) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "api.cli", "tensorboard", *jobs, "--home", str(home), "--port", port]
    scratch = home / "scratch"  # the folder of links is made here
    scratch.mkdir()
    process = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(scratch)}, cwd=ROOT)
    try:
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        wait_for(lambda: not processes_of(home), within_s=30, what="TensorBoard ends with the command")
        assert list(scratch.glob("residency-*")) == []
    finally:
        for one in processes_of(home):
            one.kill()
        process.wait()


def runs_at(url: str) -> list[str]:
    try:
        return httpx.get(f"{url}/data/runs", timeout=10).json()
    except httpx.TransportError:
        return []


@pytest.mark.parametrize(
    ("jobs", "shown"),
    [
        ((), ["ftjob-a/1", "ftjob-a/2", "ftjob-b/1", "ftjob-c/1"]),
        (("ftjob-a", "ftjob-b"), ["ftjob-a/1", "ftjob-a/2", "ftjob-b/1"]),
    ],
)
def test_it_lists_the_runs_of_these_jobs(home: Path, jobs: tuple[str, ...], shown: list[str]) -> None:
    with started(home, *jobs) as url:
        expected = [f"{name}/tensorboard" for name in shown]
        wait_for(lambda: sorted(runs_at(url)) == expected, within_s=120, what=f"runs {expected}")


@pytest.mark.parametrize("job", ["ftjob-waits", "ftjob-unknown", "../runs/ftjob-a"])
def test_a_job_without_event_files_is_named(home: Path, job: str) -> None:
    told = run("tensorboard", "ftjob-a", job, "--home", str(home))
    assert told.exit_code == 1
    assert f"of: {job}." in " ".join(told.stderr.split())


def test_a_home_without_event_files_is_told(tmp_path: Path) -> None:
    told = run("tensorboard", "--home", str(tmp_path))
    assert told.exit_code == 1
    assert "No job has written event files" in told.stderr


def test_without_tensorboard_it_says_what_to_install(home: Path) -> None:
    packages = home / "packages"
    packages.mkdir()
    for there in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not there.name.startswith("tensorboard"):
            (packages / there.name).symlink_to(there)
    told = subprocess.run(
        [sys.executable, "-S", "-m", "api.cli", "tensorboard", "--home", str(home)],
        env=os.environ | {"PYTHONPATH": f"{packages}{os.pathsep}{ROOT}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert told.returncode == 1, told.stderr
    assert "pip install 'residency[train]'" in " ".join(told.stderr.split())
