"""The processes of one run: dying with the launcher, stopping together, noticing that one is lost."""

import ctypes
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from trainers.folders.exits import Stopped

_PR_SET_PDEATHSIG = 1
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)
_GRACE_S = 5.0  # for a rank to end by itself once a peer has died


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def die_with_parent() -> None:
    """Asks the kernel to kill this process with its parent: the ranks of a killed torchrun live on."""
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # The parent may have died before the call took effect.
    if os.getppid() != parent or (parent == 1 and not _is_launcher(parent)):
        os._exit(1)


def _is_launcher(pid: int) -> bool:
    """Whether a process is our torchrun: in a container it may be process 1."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return True  # started by hand
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    return b"torchrun" in command or b"torch.distributed" in command


def _kernel() -> str:
    """What tells apart two processes of the same pid: the boot of their machine and their pid namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


class StopRequest:
    """Becomes true when this process is asked to stop; the training loop looks at it once a step."""

    def __init__(self) -> None:
        self.requested = False
        self._at_once = False

    def listen(self) -> None:
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it a request raises Stopped, wherever the process is: for work that can be begun again."""
        self._at_once = True
        try:
            self._raise_if_asked()
            yield
        finally:
            self._at_once = False

    def _note(self, signal_number: int, _frame: FrameType | None) -> None:
        first = not self.requested
        self.requested = True
        name = signal.Signals(signal_number).name
        when = "now" if self._at_once else "after this step"
        # Not through logging: a handler may interrupt the holder of its lock.
        os.write(sys.stderr.fileno(), f"{name}: stopping {when}\n".encode())
        if first:  # what is cleaned up after the first must not be interrupted
            self._raise_if_asked()

    def _raise_if_asked(self) -> None:
        if self.requested and self._at_once:
            raise Stopped("asked to stop before training began")


def join_ranks() -> None:
    """Forms the process group. Collectives on CPU tensors go over gloo, so a flag costs the GPU no wait."""
    import torch
    from torch import distributed

    if world_size() > 1:
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_COLLECTIVE_TIMEOUT)


def leave_ranks() -> None:
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def any_rank(*flags: bool) -> list[bool]:
    """For each flag, whether it is set on any rank. Every rank must call it at the same point."""
    from torch import distributed, tensor

    if world_size() == 1:
        return list(flags)
    values = tensor([int(flag) for flag in flags])
    distributed.all_reduce(values, op=distributed.ReduceOp.MAX)
    return [bool(value) for value in values]


def sum_ranks(values: Any) -> Any:
    """A tensor's sum over the ranks, on every rank; the tensor itself is left as it was."""
    from torch import distributed

    if world_size() == 1:
        return values
    total = values.clone()
    distributed.all_reduce(total)
    return total


def from_first_rank(value: Any) -> Any:
    """The first rank's value, on every rank."""
    import torch
    from torch import distributed

    if world_size() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def barrier() -> None:
    any_rank(False)


class Peers:
    """The other ranks, watched through the kernel: waiting for a dead one must not last until a timeout."""

    def __init__(self) -> None:
        self._fds: list[int] = []
        self._left = threading.Event()
        if world_size() > 1:
            from torch import distributed

            places: list[tuple[str, int]] = [("", 0)] * world_size()
            mine = (_kernel(), os.getpid())
            distributed.all_gather_object(places, mine)
            # Of those on other hosts the broken connection tells, and the supervisor of the gang.
            self._fds = [os.pidfd_open(pid) for host, pid in places if host == mine[0] and pid != mine[1]]
            threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def lost(self, *, within_s: float = 1.0) -> bool:
        """Whether a peer has died, or does so within the time: the likely cause of a failed collective."""
        return bool(self._fds) and bool(self._poll_once(within_s * 1000))

    def part(self) -> None:
        """From here on peers may end: every rank has done its work."""
        barrier()
        self._left.set()

    def _poll_once(self, timeout_ms: float | None) -> list[tuple[int, int]]:
        poll = select.poll()  # one a call: a poll object is not for two threads at once
        for fd in self._fds:
            poll.register(fd, select.POLLIN)
        return poll.poll(timeout_ms)

    def _watch(self) -> None:
        self._poll_once(None)
        if not self._left.wait(_GRACE_S):
            os.write(sys.stderr.fileno(), b"another rank has died: giving up\n")
            os._exit(1)
