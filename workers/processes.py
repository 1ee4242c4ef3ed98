"""Child processes that cannot outlive us: parent-death signal, environment marker, sweep.

torchrun puts each rank into a session of its own, so killing the agent, or its process group, leaves the
ranks alive. Three things together leave none: `setpriv --pdeathsig` on the agent, the same call in each rank,
and a sweep of /proc for the marker that every descendant inherits.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from workers import confine

MARKER = "RESIDENCY_ATTEMPT"
# What a child may inherit. Everything else, database and broker addresses above all, stays here.
_INHERITED = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "CUDA_HOME")
# How this machine's GPUs and its network may be used is its operator's decision.
_INHERITED_PREFIXES = ("NCCL_", "GLOO_", "NVSHMEM_", "TORCH_SYMM_MEM_")
_POLL_S = 0.05
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# Times of start from here on are Unix seconds (2001), not seconds since a boot.
_UNIX_FROM_S = 1e9
_UNIX_TOLERANCE_S = 60.0


def marker_of(database_url: str, kind: str, subject_id: str, token: int) -> str:
    """Text that names one attempt among all installations of this machine."""
    installation = hashlib.sha256(database_url.encode()).hexdigest()[:12]
    return f"{installation}/{kind}/{subject_id}/{token}"


def is_ours(database_url: str) -> Callable[[int], bool]:
    """Tells processes that this installation started from all others."""
    installation = hashlib.sha256(database_url.encode()).hexdigest()[:12]
    prefix = f"{MARKER}={installation}/".encode()

    def check(pid: int) -> bool:
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # of another container, or gone
            return False
        return any(variable.startswith(prefix) for variable in variables)

    return check


def child_environment(marker: str, **extra: str) -> dict[str, str]:
    """The environment of a trainer, merge, import or engine process."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name in _INHERITED or name.startswith(_INHERITED_PREFIXES)
    }
    return inherited | {
        MARKER: marker,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # A folder named `trainers` in the working directory would be imported instead of ours.
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(n_cpus()),
        "CUDA_VISIBLE_DEVICES": "",
        **extra,
    }


def n_cpus() -> int:
    """Cores for processes of this one: a container or `taskset` may give it some of the machine's."""
    return len(os.sched_getaffinity(0))


def spawn(
    argv: list[str], *, env: dict[str, str], cwd: Path, log_path: Path, writable: Sequence[Path] = ()
) -> subprocess.Popen[bytes]:
    """Start `argv` so that it dies with this thread's process; its output is appended to `log_path`.

    It can write below `cwd` and `writable`, and into a home for temporary files that `sweep` removes.
    `setpriv` sets the signal by exec; a `preexec_fn` can deadlock in a parent that has threads.
    """
    own = _own_folder(env[MARKER])
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(mode=0o700)
    folders = [str(folder) for folder in (cwd, own, *writable)]
    confined = [sys.executable, "-ISB", confine.__file__, *folders, "--", *argv]
    with log_path.open("ab") as log:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *confined],  # noqa: S607 (part of util-linux)
            env=env | {"HOME": str(own), "TMPDIR": str(own)},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def module_command(module: str, *arguments: str) -> list[str]:
    """The command line of `python -m module` under this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def supervise(
    process: subprocess.Popen[bytes],
    *,
    marker: str,
    on_beat: Callable[[], bool],
    beat_s: float,
    grace_s: float,
) -> None:
    """Wait for the end of `process`, calling `on_beat` every `beat_s`; True from it asks for a graceful stop.

    However this returns or raises, no process that carries the marker is left that can be killed.
    """
    try:
        stop_deadline: float | None = None
        while not _ended(process, timeout_s=beat_s):
            wants_stop = on_beat()
            if wants_stop and stop_deadline is None:
                process.terminate()
                stop_deadline = _now() + grace_s
            if stop_deadline is not None and _now() > stop_deadline:
                return
    finally:
        if sweep(marker):  # else its end may never come
            process.wait()


def sweep(marker: str, *, wait_s: float = 15.0) -> bool:
    """SIGKILL every process that carries `marker`. True when none is left, nor their temporary files."""
    deadline = _now() + wait_s
    while True:
        survivors = carrying(marker)
        if not survivors:
            shutil.rmtree(_own_folder(marker), ignore_errors=True)
            return True
        for process in survivors:
            _kill(process)
        if _now() > deadline:
            return False
        # Not psutil's wait: it would reap our own children, and their exit status would be lost.
        time.sleep(_POLL_S)


def carrying(marker: str) -> list[psutil.Process]:
    """Living processes whose environment holds the marker."""
    entry = f"{MARKER}={marker}".encode()
    found = []
    for process in psutil.process_iter():
        try:
            environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            if entry in environment and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (OSError, psutil.NoSuchProcess):
            continue  # it ended meanwhile, or belongs to somebody else
    return found


def is_alive(pid: int, *, started_at: float) -> bool:
    """Whether the process that started at `started_at` still runs; a pid alone may be another's by now.

    started_at: as `identity` has it, or Unix seconds, as earlier releases stored it. Those move with the
    wall clock, so that a minute more or less is let pass: the dead, taken for alive, lose their lease when it
    ends.
    """
    found = _look_at(pid)
    if found is None:
        return False
    if started_at < _UNIX_FROM_S:
        return found == started_at
    return abs(psutil.boot_time() + found - started_at) < _UNIX_TOLERANCE_S


def identity(pid: int | None = None) -> tuple[int, float]:
    """The pid and the start time of a process, of this one if none is given.

    The time is in seconds since the machine's boot, in whole ticks of the kernel: no step of the wall clock
    moves it. Raises `psutil.NoSuchProcess`.
    """
    pid = pid or os.getpid()
    started_at = _look_at(pid)
    if started_at is None:
        raise psutil.NoSuchProcess(pid)
    return pid, started_at


def _look_at(pid: int) -> float | None:
    """When a process that runs was started, in seconds since boot; None if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field, the command, may hold anything. After it comes field 3, the state; 22 is the start.
    state, *fields = stat.rpartition(b")")[2].split()
    return None if state in (b"Z", b"X") else int(fields[18]) / _TICKS_PER_S


def tail(path: Path, *, max_bytes: int = 4000) -> str:
    """The end of a log, for error messages."""
    if not path.is_file():
        return ""
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - max_bytes))
        return log.read().decode(errors="replace")


def _own_folder(marker: str) -> Path:
    """Not in the attempt's folder: the paths of sockets end at 107 bytes."""
    return Path(tempfile.gettempdir()) / f"residency-{hashlib.sha256(marker.encode()).hexdigest()[:16]}"


def _ended(process: subprocess.Popen[bytes], *, timeout_s: float) -> bool:
    try:
        process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def _kill(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return


def _now() -> float:
    return time.monotonic()
