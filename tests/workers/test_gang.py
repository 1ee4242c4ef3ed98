"""One job on two nodes: it trains as one, and when a host dies it starts anew as one, from the checkpoint."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.faults.injections import is_gone
from tests.stack import Stack, processes_of, start_stack, wait_for
from tests.workers.test_recovery import RESUMED, messages_of, submit, wait_for_message

OTHER = "host-2"


@pytest.fixture
def two_hosts(tmp_path: Path, tiny_model: Path) -> Iterator[Stack]:
    """A stack as the first host; the tests start the second."""
    stack = start_stack(tmp_path / "home", import_dirs=[tiny_model], RESIDENCY_NODE_ADDRESS="127.0.0.1")
    stack.import_model(tiny_model, model_id="tiny")
    yield stack
    assert stack.stop() == 0
    assert processes_of(stack.home) == []


class Host:
    """A worker with a node's name of its own: what a second machine on the shared folder would run."""

    def __init__(self, stack: Stack) -> None:
        worker = next(p for p in processes_of(stack.home) if "celery" in p.cmdline())
        command = [sys.executable, "-m", "celery", "-A", "workers.app", "worker", "-Q", "train", "-c", "1"]
        command += ["-n", f"train@{OTHER}", "--without-gossip", "--without-mingle", "--loglevel", "INFO"]
        with (stack.home / "logs" / f"{OTHER}.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env=worker.environ() | {"RESIDENCY_NODE": OTHER}, stdout=log, stderr=log
            )

    def tree(self) -> list[psutil.Process]:
        """The worker and all that it started."""
        worker = psutil.Process(self.process.pid)
        return [worker, *worker.children(recursive=True)]

    def kill(self) -> list[psutil.Process]:
        """End the host as a power cut would; the processes that it had."""
        tree = self.tree()
        for process in tree:
            process.kill()
        self.process.wait()
        return tree

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=120)


def node_states(stack: Stack) -> dict[str, list[str | None]]:
    """Who holds the devices of each node."""
    with stack.http() as client:
        nodes = client.get("/nodes").json()["data"]
    return {node["name"]: [device["held_by"] for device in node["devices"]] for node in nodes}


@pytest.mark.long
def test_a_killed_host_ends_the_gang_on_all_hosts_and_it_goes_on_from_the_checkpoint(
    two_hosts: Stack, chat_file: Path
) -> None:
    stack = two_hosts
    with ExitStack() as hosts:
        host = Host(stack)
        hosts.callback(lambda: host.stop())
        wait_for(lambda: OTHER in node_states(stack), within_s=120, what="the second host")
        job_id = submit(stack, chat_file, nodes=2)
        wait_for_message(stack, job_id, "Checkpoint created at step")
        assert node_states(stack) == {os.uname().nodename: [job_id], OTHER: [job_id]}
        first_attempt = f"{stack.home}/runs/{job_id}/1"
        trainers = [p for p in processes_of(stack.home) if first_attempt in p.cmdline()]
        ranks = [p for p in trainers if "torch.distributed.run" not in p.cmdline()]
        assert sorted(p.environ()["RANK"] for p in ranks) == ["0", "1"]

        host.kill()

        wait_for(lambda: all(map(is_gone, trainers)), within_s=30, what="both trees to end")
        wait_for(
            lambda: any(
                m.endswith("; the job waits for another attempt") for m in messages_of(stack, job_id)
            ),
            within_s=200,
            what="the job to wait",
        )
        host = Host(stack)
        wait_for_message(stack, job_id, "Fine-tuning job goes on (attempt 2)")
        wait_for_message(stack, job_id, RESUMED)
        stack.sdk().fine_tuning.jobs.cancel(job_id)
        wait_for_message(stack, job_id, "Fine-tuning job cancelled")
        wait_for(
            lambda: node_states(stack) == {os.uname().nodename: [None], OTHER: [None]},
            within_s=60,
            what="all devices free",
        )
