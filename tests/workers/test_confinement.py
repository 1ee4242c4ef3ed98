"""What a child of a worker may change: its own folders, and nothing else on the machine (G31)."""

import json
import os
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import pytest

from tests.stack import Stack, wait_for
from workers import processes

pytestmark = pytest.mark.faults(g=31, everyday=True)
# Each line of what it prints: [what was tried, whether it could be done].
TRIES = """
    import json, os, shutil, signal, sys, tempfile
    from pathlib import Path

    own, other, parent = Path.cwd(), Path(sys.argv[1]), int(sys.argv[2])
    tries = {
        "read another's": lambda: (other / "kept").read_bytes(),
        "write its own": lambda: (own / "new").write_bytes(b"x"),
        "move its own": lambda: (own / "new").rename(own / "folder" / "moved"),
        "write a given one": lambda: (Path(sys.argv[3]) / "new").write_bytes(b"x"),
        "write a temporary file": lambda: tempfile.NamedTemporaryFile().write(b"x"),
        "share memory": lambda: tempfile.NamedTemporaryFile(dir="/dev/shm").write(b"x"),
        "discard": lambda: Path("/dev/null").write_bytes(b"x"),
        "signal itself": lambda: os.kill(os.getpid(), 0),
        "overwrite another's": lambda: (other / "kept").write_bytes(b"x"),
        "append to another's": lambda: open(other / "kept", "ab"),
        "truncate another's": lambda: os.truncate(other / "kept", 0),
        "remove another's": lambda: (other / "kept").unlink(),
        "make another's": lambda: (other / "made").touch(),
        "link into another's": lambda: os.symlink("/", other / "link"),
        "move in another's": lambda: (other / "kept").rename(other / "moved"),
        "move its own out": lambda: (own / "folder" / "moved").rename(other / "moved"),
        "make a folder beside its own": lambda: (own.parent / "beside").mkdir(),
        "signal the worker": lambda: os.kill(parent, 0),
        "read the worker's environment": lambda: Path(f"/proc/{parent}/environ").read_bytes(),
    }
    (own / "folder").mkdir()
    for name, attempt in tries.items():
        try:
            attempt()
        except PermissionError:
            print(json.dumps([name, False]))
        else:
            print(json.dumps([name, True]))
"""
ALLOWED = {
    "read another's",
    "write its own",
    "move its own",
    "write a given one",
    "write a temporary file",
    "share memory",
    "discard",
    "signal itself",
}


CAP_IPC_LOCK = 14
_SETS = ("CapInh:", "CapPrm:", "CapEff:", "CapAmb:")


def capabilities_in(status: str) -> set[int]:
    """The numbers of all capabilities that a process has or could get, from its /proc/PID/status."""
    sets = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(_SETS)]
    assert len(sets) == 4
    return {bit for bit in range(64) if any(held >> bit & 1 for held in sets)}


@pytest.fixture
def marker() -> str:
    return f"test/{uuid.uuid4().hex}"


def run(argv: list[str], folder: Path, marker: str, *, writable: tuple[Path, ...] = ()) -> str:
    log = folder / "log.txt"
    child = processes.spawn(
        argv, env=processes.child_environment(marker), cwd=folder, log_path=log, writable=writable
    )
    processes.supervise(child, marker=marker, on_beat=lambda: False, beat_s=0.1, grace_s=1.0)
    assert child.returncode == 0, log.read_text()
    return log.read_text()


def test_a_child_changes_only_what_is_its_own(tmp_path: Path, marker: str) -> None:
    own, other, given = (tmp_path / name for name in ("own", "other", "given"))
    for folder in (own, other, given):
        folder.mkdir()
    (other / "kept").write_bytes(b"kept")
    argv = [sys.executable, "-c", textwrap.dedent(TRIES), str(other), str(os.getpid()), str(given)]
    lines = run(argv, own, marker, writable=(given,)).splitlines()
    could = {name for name, done in map(json.loads, lines) if done}
    assert len(lines) == 19
    assert could == ALLOWED
    assert (other / "kept").read_bytes() == b"kept"
    assert [path.name for path in other.iterdir()] == ["kept"]


def test_a_child_of_root_has_no_rights_of_root_and_what_it_starts_gains_none(
    tmp_path: Path, marker: str
) -> None:
    status = run(["sh", "-c", "cat /proc/self/status"], tmp_path, marker)
    assert capabilities_in(status) <= {CAP_IPC_LOCK}


def test_what_a_child_starts_is_held_too_and_leaves_no_temporary_file(tmp_path: Path, marker: str) -> None:
    own = tmp_path / "own"
    own.mkdir()
    inner = f"import tempfile; print(tempfile.mkdtemp()); open({str(tmp_path / 'out')!r}, 'w')"
    outer = f"import subprocess, sys; print(subprocess.run([sys.executable, '-c', {inner!r}]).returncode)"
    made, *_, status = run([sys.executable, "-c", outer], own, marker).splitlines()
    assert status == "1"
    assert not (tmp_path / "out").exists()
    assert Path(made).parent.name.startswith("residency-")
    assert not Path(made).parent.exists()


def test_every_process_of_a_job_and_its_engine_is_held(stack: Stack, chat_file: Path) -> None:
    client = stack.sdk()
    with chat_file.open("rb") as source:
        file = client.files.create(file=source, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"max_steps": 5000, "batch_size": 2}},  # type: ignore[typeddict-item]
        },
    )
    attempt = f"/{job.id}/1"

    def ranks() -> list[str]:
        found = subprocess.run(["pgrep", "-f", f"trainers.run .*{attempt}"], capture_output=True, text=True)  # noqa: S607
        return found.stdout.split()

    pids = wait_for(lambda: found if len(found := ranks()) > 1 else None, within_s=200, what="the ranks")
    for pid in pids:
        status = Path(f"/proc/{pid}/status").read_text()
        assert "NoNewPrivs:\t1" in status
        assert capabilities_in(status) <= {CAP_IPC_LOCK}
    client.fine_tuning.jobs.cancel(job.id)
