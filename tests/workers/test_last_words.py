"""What is known of a trainer that could not say why it ended."""

import os
import subprocess
from pathlib import Path

import pytest

from workers import processes
from workers.last_words import read_exit


@pytest.mark.parametrize(("nproc", "name"), [(1, "SIGSEGV"), (2, "SIGKILL")])
def test_the_signal_that_ended_a_rank_is_read_from_the_log_of_torchrun(
    tmp_path: Path, nproc: int, name: str
) -> None:
    script = tmp_path / "crash.py"
    script.write_text(
        "import os, signal, time\n"
        f"os.kill(os.getpid(), signal.{name}) if os.environ['RANK'] == '0' else time.sleep(100)\n"
    )
    argv = processes.module_command(
        "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}", str(script)
    )
    env = processes.child_environment("test", PATH=os.environ["PATH"])
    child: subprocess.Popen[bytes] = processes.spawn(
        argv, env=env, cwd=tmp_path, log_path=tmp_path / "log.txt"
    )
    assert child.wait(timeout=120) != 0
    message = f"The trainer was killed by {name}"
    assert read_exit(tmp_path) == {"reason": "killed", "message": message, "signal": name}


@pytest.mark.parametrize("log", ["log.txt", "log-1.txt"])
def test_a_watchdog_that_aborts_the_process_is_a_timeout_of_the_collective(tmp_path: Path, log: str) -> None:
    # What the first node of a gang says of another's end. The line of that one counts.
    (tmp_path / "log.txt").write_text("failed (exitcode: -15) local_rank: 0 (pid: 6) of binary: python\n")
    # As torch 2.11 writes it, shortened.
    (tmp_path / log).write_text(
        "[rank1]:[E ProcessGroupNCCL.cpp:688] [Rank 1] Watchdog caught collective operation timeout: "
        "WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran for 1800019 milliseconds before timing out.\n"
        "E torch/distributed/elastic: failed (exitcode: -6) local_rank: 1 (pid: 7) of binary: python\n"
    )
    found = read_exit(tmp_path)
    assert found is not None
    assert found["reason"] == "nccl_timeout"


def test_what_the_trainer_wrote_itself_counts(tmp_path: Path) -> None:
    assert read_exit(tmp_path) is None
    (tmp_path / "log.txt").write_text("failed (exitcode: -9) local_rank: 0\n")
    (tmp_path / "exit.json").write_text('{"reason": "cuda_oom", "message": "m"}')
    assert read_exit(tmp_path) == {"reason": "cuda_oom", "message": "m"}
