"""No process outlives its owner: the probes of torchrun's orphans, made into tests."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from workers import processes

RANK = """
    import os, subprocess, sys
    # a data loader's child that leaves the session, as ranks themselves do
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    open(os.path.join(sys.argv[1], f"rank{os.environ['RANK']}"), "w").write(f"{os.getpid()} {child.pid}")
    child.wait()
"""


def wait_until(condition: Callable[[], bool], *, within_s: float, what: str) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture
def marker() -> str:
    return f"test/{uuid.uuid4().hex}"


def start_torchrun(folder: Path, marker: str) -> subprocess.Popen[bytes]:
    script = folder / "rank.py"
    script.write_text(textwrap.dedent(RANK))
    argv = processes.module_command(
        "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), str(folder)
    )
    env = processes.child_environment(marker, OMP_NUM_THREADS="1")
    process = processes.spawn(argv, env=env, cwd=folder, log_path=folder / "log.txt")
    wait_until(
        lambda: all((folder / f"rank{rank}").is_file() for rank in (0, 1)),
        within_s=150,
        what=processes.tail(folder / "log.txt"),
    )
    return process


def test_sweep_kills_ranks_and_their_children_after_the_agent_died(tmp_path: Path, marker: str) -> None:
    agent = start_torchrun(tmp_path, marker)
    agent.kill()
    agent.wait()
    orphans = processes.carrying(marker)
    assert len(orphans) >= 4, "torchrun's ranks and their children live on after kill -9 of the agent"

    assert processes.sweep(marker)

    assert processes.carrying(marker) == []
    assert not any(orphan.is_running() and orphan.status() != "zombie" for orphan in orphans)


def test_the_agent_dies_with_the_process_that_spawned_it(tmp_path: Path, marker: str) -> None:
    spawner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(
                f"""
                import time
                from pathlib import Path
                from workers import processes
                child = processes.spawn(
                    processes.module_command("http.server", "0"),
                    env=processes.child_environment({marker!r}),
                    cwd=Path({str(tmp_path)!r}),
                    log_path=Path({str(tmp_path / "log.txt")!r}),
                )
                print(child.pid, flush=True)
                time.sleep(600)
                """
            ),
        ],
        stdout=subprocess.PIPE,
    )
    assert spawner.stdout is not None
    child = psutil.Process(int(spawner.stdout.readline()))

    # The signal is set before the exec; a parent that dies earlier still is the sweep's case.
    def is_itself() -> bool:
        line = child.cmdline()  # empty in the midst of the exec
        return bool(line) and "setpriv" not in line[0]

    wait_until(is_itself, within_s=5, what="setpriv did not exec")
    spawner.kill()
    spawner.wait()
    wait_until(lambda: not child.is_running(), within_s=5, what="the child outlived its parent")


def test_supervise_leaves_nothing_behind_when_the_beat_raises(tmp_path: Path, marker: str) -> None:
    process = processes.spawn(
        [sys.executable, "-c", RANK_IN_SHORT],
        env=processes.child_environment(marker),
        cwd=tmp_path,
        log_path=tmp_path / "log.txt",
    )
    wait_until(lambda: len(processes.carrying(marker)) == 2, within_s=20, what="two processes should run")

    def lost() -> bool:
        raise RuntimeError("lease lost")

    with pytest.raises(RuntimeError, match="lease lost"):
        processes.supervise(process, marker=marker, on_beat=lost, beat_s=0.05, grace_s=5)
    assert processes.carrying(marker) == []


RANK_IN_SHORT = (
    "import subprocess, sys; "
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True).wait()"
)


def test_a_stop_is_graceful_first_and_final_after_the_grace(tmp_path: Path, marker: str) -> None:
    stubborn = (
        "import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        " pathlib.Path('deaf').touch(); time.sleep(600)"
    )
    process = processes.spawn(
        [sys.executable, "-c", stubborn],
        env=processes.child_environment(marker),
        cwd=tmp_path,
        log_path=tmp_path / "log.txt",
    )
    asked_at: list[float] = []

    def wants_stop() -> bool:
        if (tmp_path / "deaf").exists():
            asked_at.append(time.monotonic())
        return bool(asked_at)

    processes.supervise(process, marker=marker, on_beat=wants_stop, beat_s=0.05, grace_s=1.0)
    assert time.monotonic() - asked_at[0] >= 1.0
    assert process.returncode == -signal.SIGKILL
    assert processes.carrying(marker) == []


def test_children_inherit_an_allow_list_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RESIDENCY_DATABASE_URL", "RESIDENCY_REDIS_URL", "RESIDENCY_KEY_PEPPER", "HF_TOKEN"):
        monkeypatch.setenv(name, "canary-7f3a")
    env = processes.child_environment("m")
    assert "canary-7f3a" not in env.values()
    assert env["HF_HUB_OFFLINE"] == "1"
    assert env["PATH"] == os.environ["PATH"]


@pytest.fixture
def child() -> Iterator[psutil.Process]:
    """A process of ours that waits to be killed."""
    popen = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    yield psutil.Process(popen.pid)
    popen.communicate()


@pytest.fixture
def step_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the machine's wall clock, as psutil and whoever asks it see it: the boot's time moves along."""
    booted_at = psutil.boot_time()

    def step(by_s: float) -> None:
        monkeypatch.setattr("psutil._pslinux.boot_time", lambda: booted_at + by_s)

    return step


def test_a_recycled_pid_is_not_the_same_process(child: psutil.Process) -> None:
    pid, started_at = processes.identity(child.pid)
    assert pid == child.pid
    assert processes.is_alive(pid, started_at=started_at)
    for other in (started_at - 100, started_at - 0.01, started_at + 0.01):
        assert not processes.is_alive(pid, started_at=other)
    assert not processes.is_alive(2**22 - 1, started_at=started_at)


@pytest.mark.parametrize("by_s", [2.0, -2.0, 86400.0])
def test_a_process_lives_on_whatever_the_wall_clock_does(
    child: psutil.Process, step_clock: Callable[[float], None], by_s: float
) -> None:
    of_child, own = processes.identity(child.pid), processes.identity()
    step_clock(by_s)
    assert processes.is_alive(of_child[0], started_at=of_child[1])
    assert processes.is_alive(own[0], started_at=own[1])
    assert processes.identity() == own, "a lease of its own must be known again"


def test_a_process_that_ended_is_dead_also_before_it_is_reaped() -> None:
    ended = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    pid, started_at = processes.identity(ended.pid)
    ended.kill()
    wait_until(lambda: not processes.is_alive(pid, started_at=started_at), within_s=5, what="a zombie")
    ended.communicate()
    assert not processes.is_alive(pid, started_at=started_at)


def test_what_earlier_releases_stored_is_compared_by_the_wall_clock(
    child: psutil.Process, step_clock: Callable[[float], None]
) -> None:
    stored = child.create_time()  # Unix seconds
    assert processes.is_alive(child.pid, started_at=stored)
    assert not processes.is_alive(child.pid, started_at=stored - 100)
    step_clock(2.0)
    assert processes.is_alive(child.pid, started_at=stored)
