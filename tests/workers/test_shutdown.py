"""SIGTERM to a child of the pool: a request while it works, its end while it is idle."""

import signal
import subprocess
import sys

from workers import shutdown

CHILD = """
import signal, sys
from workers import ring, shutdown

with shutdown.listening():
    if sys.argv[1] == "works":
        signal.raise_signal(signal.SIGTERM)
        print("asked to stop" if shutdown.requested() else "not told", flush=True)
# What is rung now finds no database at this address, and would say so.
ring.answer("train")
print("took no more work", flush=True)
signal.raise_signal(signal.SIGTERM)
print("outlived the signal", flush=True)
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", CHILD, *words]
    env = {"RESIDENCY_DATABASE_URL": "sqlite:////nowhere/residency.db"}
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_a_child_that_works_takes_sigterm_as_a_request_and_then_no_more_work() -> None:
    child = run("works")
    assert child.stdout.splitlines() == ["asked to stop", "took no more work"], child.stderr


def test_an_idle_child_looks_for_work_when_it_is_rung() -> None:
    assert "unable to open database file" in run("idles").stderr


def test_sigterm_ends_an_idle_child_at_once() -> None:
    assert run("works").returncode == -signal.SIGTERM


def test_the_drain_of_a_node_stops_the_work_at_hand_and_not_the_next() -> None:
    with shutdown.listening():
        shutdown.request()
        assert shutdown.requested()
    with shutdown.listening():
        assert not shutdown.requested()
