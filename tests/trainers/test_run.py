"""Real processes: torchrun, signals, lost ranks."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from tests.trainers.test_evaluation import steps_of
from tests.trainers.test_reward import pairs
from trainers.folders.checkpoints import Checkpoint, list_checkpoints, verify
from trainers.folders.exits import DataError, Outcome, explain, write_exit

LIMIT_S = 300


def plain(count: int) -> list[dict]:
    return [{"text": f"Aspirin thins the blood. Case {n}: {n % 7} tablets."} for n in range(count)]


def launch(run_dir: Path, *, nproc: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
    return subprocess.Popen(
        [*command, "-m", "trainers.run", run_dir],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=(run_dir / "stderr.log").open("w"),
    )


def wait_for(condition: Callable[[], object], *, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert process is None or process.poll() is None, "the run ended first"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def reached(run_dir: Path, *, step: int) -> bool:
    events = run_dir / "events.jsonl"
    return events.exists() and f'"step": {step},' in events.read_text()


def ranks_of(agent: subprocess.Popen) -> list[psutil.Process]:
    children = psutil.Process(agent.pid).children(recursive=True)
    return [child for child in children if "trainers.run" in child.cmdline()]


def exit_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "exit.json").read_text())


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.long)])
def test_torchrun_trains_to_the_end(make_run, curve_of, nproc: int) -> None:
    run_dir = make_run(nproc=nproc, n_valid=7)
    agent = launch(run_dir, nproc=nproc)
    assert agent.wait(LIMIT_S) == 0, (run_dir / "stderr.log").read_text()[-3000:]
    end = exit_of(run_dir)
    assert (end["reason"], end["step"]) == ("done", 12)
    assert list(curve_of(run_dir)) == list(range(1, 13))
    newest = verify(list_checkpoints(run_dir / "checkpoints")[-1][1])
    assert isinstance(newest, Checkpoint)
    assert newest.manifest["world_size"] == nproc
    rng = [entry["path"] for entry in newest.manifest["files"] if "rng" in entry["path"]]
    assert len(rng) == nproc


@pytest.mark.long
@pytest.mark.parametrize("method", ["supervised", "pretraining", "reward", "dpo"])
def test_two_ranks_see_the_losses_of_one(make_run, curve_of, method: str) -> None:
    """The first batches; later the second rank fills up the last batch of an epoch."""
    data: dict = {
        "supervised": {"n_valid": 7, "eval_prompts": None, "eval_max_tokens": 8},
        "pretraining": {"rows": plain(60), "valid_rows": plain(9), "block_size": 64},
        "reward": {"rows": pairs(24), "valid_rows": pairs(7, seed=1)},
        "dpo": {"rows": pairs(24), "valid_rows": pairs(8, seed=1)},
    }[method]
    ends, known = [], []
    for nproc in (1, 2):
        run_dir = make_run(str(nproc), method=method, nproc=nproc, micro_batch_size=2, max_steps=4, **data)
        assert launch(run_dir, nproc=nproc).wait(LIMIT_S) == 0
        ends.append((curve_of(run_dir), exit_of(run_dir)["metrics"]))
        known.append(steps_of(run_dir / "output"))
    (one, metrics_one), (two, metrics_two) = ends
    assert two == pytest.approx(one, rel=1e-5)
    names = {name for name in metrics_one if name.startswith("valid_")}
    assert {"valid_loss", "valid_loss_before"} < names
    for name in names:
        assert metrics_two[name] == pytest.approx(metrics_one[name], rel=1e-4, abs=1e-6), name
    for step in (0, 4):
        texts = [[answer["answer"] for answer in steps[step].get("answers", ())] for steps in known]
        assert texts[0] == texts[1]
        assert len(texts[0]) == (3 if method == "supervised" else 0)


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.long)])
def test_sigterm_while_the_data_is_prepared_ends_at_once(make_run, nproc: int) -> None:
    run_dir = make_run(method="pretraining", nproc=nproc, rows=plain(600_000), n_valid=0, block_size=64)
    agent = launch(run_dir, nproc=nproc)
    tokenized = Path(json.loads((run_dir / "spec.json").read_text())["cache_dir"]) / "tokenized"
    wait_for(lambda: list(tokenized.glob("*.tmp/*")), process=agent)  # the first rows are written
    agent.send_signal(signal.SIGTERM)
    agent.wait(LIMIT_S)
    end = exit_of(run_dir)
    assert (end["reason"], end["step"]) == ("stopped", 0)
    assert not (run_dir / "prepared.json").exists()
    assert not list(tokenized.glob("*.tmp"))


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.long)])
def test_sigterm_ends_with_a_checkpoint_and_the_next_attempt_goes_on(make_run, curve_of, nproc: int) -> None:
    settings = {"nproc": nproc, "n_epochs": 50, "save_steps": 1000, "eval_steps": 1000}
    first = make_run("1", **settings)
    agent = launch(first, nproc=nproc)
    wait_for(lambda: reached(first, step=5), process=agent)
    agent.send_signal(signal.SIGTERM)
    agent.wait(LIMIT_S)
    end = exit_of(first)
    assert end["reason"] == "stopped"
    ((step, path),) = list_checkpoints(first / "checkpoints")
    assert (step, end["step"]) == (max(curve_of(first)), step)
    assert isinstance(verify(path), Checkpoint)
    second = make_run("2", resume_roots=(first / "checkpoints",), **settings)
    agent = launch(second, nproc=nproc)
    wait_for(lambda: reached(second, step=step + 3), process=agent)
    agent.send_signal(signal.SIGTERM)
    agent.wait(LIMIT_S)
    assert exit_of(second)["resumed_from"] == step
    assert min(curve_of(second)) == step + 1


@pytest.mark.long
def test_a_killed_rank_takes_the_run_with_it_and_blames_nobody(make_run) -> None:
    run_dir = make_run(nproc=2, n_epochs=50, save_steps=1000, eval_steps=1000)
    agent = launch(run_dir, nproc=2)
    wait_for(lambda: reached(run_dir, step=5), process=agent)
    ranks = ranks_of(agent)
    assert len(ranks) == 2
    ranks[1].kill()
    agent.wait(15)
    assert agent.returncode != 0
    assert not (run_dir / "exit.json").exists()
    wait_for(lambda: not any(rank.is_running() for rank in ranks))


def test_ranks_die_with_their_agent(make_run) -> None:
    run_dir = make_run(n_epochs=50, save_steps=1000, eval_steps=1000)
    agent = launch(run_dir, nproc=1)
    wait_for(lambda: reached(run_dir, step=5), process=agent)
    ranks = ranks_of(agent)
    assert ranks
    agent.kill()
    agent.wait()
    _, alive = psutil.wait_procs(ranks, timeout=5)
    assert alive == []
    assert not (run_dir / "exit.json").exists()


@pytest.mark.long
def test_bad_data_is_told_by_every_launch(make_run) -> None:
    run_dir = make_run(nproc=2)
    (run_dir / "train").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    assert launch(run_dir, nproc=2).wait(LIMIT_S) != 0
    assert exit_of(run_dir)["reason"] == "bad_data"
    assert "line 1" in exit_of(run_dir)["message"]


@pytest.mark.long
@pytest.mark.skipif(os.getuid() != 0, reason="mounting needs root")
def test_a_full_disk_is_an_error_and_not_damage(make_run) -> None:
    run_dir = make_run(n_epochs=50, save_steps=2, eval_steps=1000, save_total_limit=100)
    disk = run_dir / "checkpoints"
    disk.mkdir()
    mounted = subprocess.run(
        ["/bin/mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", disk], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        assert launch(run_dir, nproc=1).wait(LIMIT_S) != 0
        assert exit_of(run_dir)["reason"] == "disk_full", exit_of(run_dir)
        kept = list_checkpoints(disk)
        assert kept
        assert all(isinstance(verify(path), Checkpoint) for _, path in kept)
        assert list(disk.glob("*.tmp")) == []
    finally:
        subprocess.run(["/bin/umount", disk], check=True)


def test_the_first_reason_stays(tmp_path: Path) -> None:
    assert write_exit(tmp_path, Outcome("cuda_oom", metrics={"train_loss": float("nan")}))
    assert not write_exit(tmp_path, Outcome("error"))
    assert exit_of(tmp_path)["reason"] == "cuda_oom"
    assert exit_of(tmp_path)["metrics"] == {"train_loss": None}
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]


def test_a_rank_that_others_wait_for_in_vain_is_a_timeout_of_the_collective(tmp_path: Path) -> None:
    """Two members of a real group in this process, of which one never comes."""
    from torch import distributed, ones

    met, over = threading.Barrier(2), threading.Event()

    def join(member: int) -> distributed.ProcessGroupGloo:
        store = distributed.FileStore(str(tmp_path / "store"), 2)
        group = distributed.ProcessGroupGloo(store, member, 2, timedelta(seconds=2))
        met.wait()
        return group

    def stay_away() -> None:
        group = join(1)
        over.wait(60)
        del group

    absent = threading.Thread(target=stay_away)
    absent.start()
    group = join(0)
    with pytest.raises(RuntimeError) as timeout:
        group.allreduce([ones(3)]).wait()
    over.set()
    absent.join()
    assert explain(timeout.value, run_dir=tmp_path)[0] == "nccl_timeout"


def test_the_row_at_fault_is_told_as_data(tmp_path: Path) -> None:
    outcome = Outcome("error")
    outcome.blame(DataError("training_files.1, line 5: bad", line=5, position=1), run_dir=tmp_path)
    write_exit(tmp_path, outcome)
    end = exit_of(tmp_path)
    assert (end["reason"], end["line"], end["position"]) == ("bad_data", 5, 1)


# What torch raises where its own allocator, which has a class for it, was not the one that asked.
OUT_OF_GPU_MEMORY = [
    "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/cuda/",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error, NCCL version 2.28.9\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nFailed to CUDA malloc 6291456 bytes",
    "NCCL error in: NCCLUtils.cpp:93, unhandled cuda error\nLast error:\nFailed to CUDA calloc async 608 B",
    "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
]
GPU_FAULT = "CUDA error: an illegal memory access was encountered"


def test_exceptions_have_reasons(tmp_path: Path) -> None:
    import torch

    assert explain(torch.cuda.OutOfMemoryError("CUDA out of memory"), run_dir=tmp_path)[0] == "cuda_oom"
    assert explain(OSError(28, "No space left on device"), run_dir=tmp_path)[0] == "disk_full"
    for message in OUT_OF_GPU_MEMORY:
        assert explain(RuntimeError(message), run_dir=tmp_path)[0] == "cuda_oom", message
    assert explain(RuntimeError(GPU_FAULT), run_dir=tmp_path)[0] == "error"
    assert explain(torch.AcceleratorError(OUT_OF_GPU_MEMORY[0]), run_dir=tmp_path)[0] == "cuda_oom"
    assert explain(ValueError("out of memory"), run_dir=tmp_path)[0] == "error"
    with pytest.raises(RuntimeError) as too_large:
        torch.empty(1 << 50)
    assert explain(too_large.value, run_dir=tmp_path)[0] == "cpu_oom"
    assert explain(MemoryError(), run_dir=tmp_path)[0] == "cpu_oom"
    assert explain(OSError(2, "No such file"), run_dir=tmp_path)[0] == "error"
    assert explain(ZeroDivisionError("x"), run_dir=tmp_path) == ("error", "ZeroDivisionError: x")
