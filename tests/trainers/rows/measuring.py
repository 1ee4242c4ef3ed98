"""How much memory a piece of code takes, in a process of its own and, if wished, under a limit."""

import resource
import subprocess
import sys

# What `getrusage` and `wait4` tell of the peak begins with the memory of whoever forked the process.
_PEAK = """
import sys
from pathlib import Path
def peak():
    told = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in told if line.startswith("VmHWM")).split()[1]) * 1024
"""


def run_limited(argv: list[str], *, data_bytes: int | None = None) -> subprocess.CompletedProcess[str]:
    """The end of a process that may have no more than `data_bytes` of memory of its own."""

    def limit_memory() -> None:
        if data_bytes is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (data_bytes, data_bytes))

    return subprocess.run(
        argv, preexec_fn=limit_memory, capture_output=True, text=True, check=False, timeout=300
    )


def measure(setup: str, code: str, *arguments: str, data_bytes: int | None = None) -> tuple[list[str], int]:
    """The words that `code` prints, and by how many bytes it raises the peak that there was after `setup`."""
    lines = [_PEAK, setup, "before = peak()", code, "print(peak() - before)"]
    done = run_limited([sys.executable, "-c", "\n".join(lines), *arguments], data_bytes=data_bytes)
    assert done.returncode == 0, done.stderr
    *words, growth = done.stdout.split()
    return words, int(growth)
