"""SIGTERM to a child of the pool: a request while it works, its end once it has nothing more to do."""

import subprocess
import sys

CHILD = """
import signal, sys
from celery import signals
from workers import ring, shutdown

shutdown.listen()
signal.raise_signal(signal.SIGTERM)
print("works on" if shutdown.requested() else "not told", flush=True)
# As billiard's Worker does on its way out, before it tells the pool and waits for the pool's SIGTERM.
if sys.argv[1] == "leaves":
    signals.worker_process_shutdown.send(sender=None, pid=1, exitcode=155)
signal.raise_signal(signal.SIGTERM)
print("is still there", flush=True)
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", CHILD, *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


def test_a_child_that_works_takes_sigterm_as_a_request() -> None:
    child = run("stays")
    assert child.stdout.splitlines() == ["works on", "is still there"], child.stderr
    assert child.returncode == 0


def test_a_child_that_leaves_ends_at_the_pools_word() -> None:
    """Not a second later: nothing else runs on its slot until it is gone."""
    child = run("leaves")
    assert child.stdout.splitlines() == ["works on"], child.stderr
    assert child.returncode == 155
