"""The GPUs of this machine as the driver knows them. NVML touches no device and loads no torch."""

from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

import pynvml


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
