"""How a run ends: exit.json, written once and last, with the reason as data."""

import errno
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainers.folders.events import drop_nonfinite
from trainers.specs import SpecError

Reason = Literal[
    "done",
    "stopped",
    "bad_data",
    "cuda_oom",
    "cpu_oom",
    "nan_loss",
    "nccl_timeout",
    "disk_full",
    "bad_checkpoint",
    "error",
]
BAD_DATA_EXIT = 3
_NEARLY_FULL_BYTES = 16 << 20
# c10/cuda/CUDAException.cpp, ATen/cuda/Exceptions.h and, of NCCL, include/alloc.h and include/checks.h.
_NO_GPU_MEMORY = re.compile(
    r"CUDA error: out of memory|CU(BLAS|SPARSE|SOLVER|DNN)_STATUS_ALLOC_FAILED"
    r"|Failed to CUDA (malloc|calloc)|Cuda failure \d* ?'out of memory'"
)


class DataError(ValueError):
    """The training data cannot be used, for a reason its owner can mend.

    line: of the row at fault, counted from 1; position: of its file, where the job trains on several.
    """

    def __init__(self, message: str, *, line: int | None = None, position: int | None = None):
        super().__init__(message)
        self.line, self.position = line, position


class ChangedBytes(DataError):
    """A file is not what was uploaded: the disk has changed it, or somebody has."""


class NanLoss(ArithmeticError):
    """The loss stopped being a number; the weights of the last checkpoint are still good."""


class BadCheckpoint(RuntimeError):
    """A checkpoint that cannot be resumed from."""


class Stopped(Exception):
    """The run was asked to stop before it had anything to save."""


class PeerLost(RuntimeError):
    """Another rank died. What killed it is for the supervisor to find out, so no exit.json is written."""


@dataclass
class Outcome:
    reason: Reason
    message: str = ""
    step: int = 0
    trained_tokens: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    resumed_from: int | None = None
    line: int | None = None  # of the row at fault
    position: int | None = None  # of its file among several

    def blame(self, error: BaseException, *, run_dir: Path) -> None:
        """Takes the reason from the exception that ended the run."""
        self.reason, self.message = explain(error, run_dir=run_dir)
        if isinstance(error, DataError):
            self.line, self.position = error.line, error.position


def write_exit(run_dir: Path, outcome: Outcome) -> bool:
    """Publishes exit.json whole. The first rank wins: its reason is the cause, the others' a consequence."""
    body = {**outcome.__dict__, "metrics": drop_nonfinite(outcome.metrics)}
    temporary = run_dir / f"exit.json.{os.getpid()}.tmp"
    with temporary.open("w") as file:
        json.dump(body, file, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, run_dir / "exit.json")
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def explain(error: BaseException, *, run_dir: Path) -> tuple[Reason, str]:
    """The reason and the message for an exception that ended a run."""
    if isinstance(error, NanLoss):
        return "nan_loss", str(error)
    if isinstance(error, BadCheckpoint):
        return "bad_checkpoint", str(error)
    if isinstance(error, Stopped):
        return "stopped", str(error)
    if isinstance(error, DataError | SpecError):
        return "bad_data", str(error)
    if _is_disk_full(error, run_dir):
        return "disk_full", f"no space left on the disk: {error}"
    if _is_cuda_oom(error):
        return "cuda_oom", f"the GPU has too little memory for this job: {_first_line(error)}"
    if _is_cpu_oom(error):
        return "cpu_oom", f"the machine has too little memory for this job: {_first_line(error)}"
    if _is_collective_timeout(error):
        return "nccl_timeout", f"the processes waited for one of them in vain: {_first_line(error)}"
    return "error", f"{type(error).__name__}: {error}"


def _is_disk_full(error: BaseException, run_dir: Path) -> bool:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        text = str(cause)
        if "No space left on device" in text:  # safetensors
            return True
        if "PytorchStreamWriter" in text or "file write failed" in text:  # torch.save tells no errno
            return shutil.disk_usage(run_dir).free < _NEARLY_FULL_BYTES
        cause = cause.__cause__ or cause.__context__
    return False


def _is_cuda_oom(error: BaseException) -> bool:
    import torch

    # Whatever asks for memory past torch's allocator (contexts, cuBLAS, NCCL) has no class for it.
    unnamed = isinstance(error, RuntimeError) and _NO_GPU_MEMORY.search(str(error)) is not None
    return unnamed or isinstance(error, torch.cuda.OutOfMemoryError)


def _is_cpu_oom(error: BaseException) -> bool:
    # torch has no class for it: c10/core/impl/alloc_cpu.cpp
    return isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _is_collective_timeout(error: BaseException) -> bool:
    text = str(error)
    from_nccl = "collective operation timeout" in text
    # gloo/transport/tcp/unbound_buffer.cc and pair.cc
    from_gloo = "Timed out waiting" in text and ("gloo" in text or "operation to complete" in text)
    return isinstance(error, RuntimeError) and (from_nccl or from_gloo)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
