"""The GPUs of this machine as the driver knows them. NVML touches no device and loads no torch."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

import pynvml

from db.nodes import DeviceUse, Uses

_MOST_UNKNOWN_BYTES = 500_000_000


@dataclass(frozen=True)
class Gpu:
    """What does not change about a GPU; `index` is its place on the bus (CUDA_DEVICE_ORDER=PCI_BUS_ID)."""

    index: int
    kind: str
    memory_bytes: int
    driver: str

    @property
    def id(self) -> str:
        """Its name among the devices of a node."""
        return f"cuda:{self.index}"


@lru_cache
def list_gpus() -> tuple[Gpu, ...]:
    """The GPUs of this machine; none without a driver."""
    if not _connect():
        return ()
    driver = pynvml.nvmlSystemGetDriverVersion()
    return tuple(_describe(index, driver) for index in range(pynvml.nvmlDeviceGetCount()))


def read_uses() -> Uses:
    """How busy each GPU is at this moment; one that does not tell is left out."""
    found = {}
    for gpu in list_gpus():
        with suppress(pynvml.NVMLError):
            handle = pynvml.nvmlDeviceGetHandleByIndex(gpu.index)
            used_bytes = int(pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).used)
            percent = int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
            found[gpu.id] = DeviceUse(memory_used_bytes=used_bytes, utilization=percent / 100)
    return found


def find_strangers(is_ours: Callable[[int], bool]) -> dict[str, str]:
    """GPUs that somebody else uses, and how it shows: a process, or memory that no process of ours holds."""
    found = {}
    for gpu in list_gpus():
        try:
            reason = _look_for_strangers(gpu.index, is_ours)
        except pynvml.NVMLError as error:
            reason = f"the driver says: {error}"
        if reason:
            found[gpu.id] = reason
    return found


def _look_for_strangers(index: int, is_ours: Callable[[int], bool]) -> str | None:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    foreign = [process.pid for process in running if not is_ours(process.pid)]
    if foreign:
        return f"process {foreign[0]} computes on it"
    # Version 2 leaves out what the driver keeps for itself.
    used_bytes = int(pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).used)
    used_bytes -= sum(process.usedGpuMemory or 0 for process in running)
    return f"{used_bytes} bytes of its memory are in use" if used_bytes > _MOST_UNKNOWN_BYTES else None


@lru_cache
def _connect() -> bool:
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        return True
    return False


def _describe(index: int, driver: str) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory_bytes = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    return Gpu(index, pynvml.nvmlDeviceGetName(handle), memory_bytes, driver)
