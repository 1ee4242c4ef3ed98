"""SIGTERM to a worker: its children stop their trainers, which save, and give the work back uncharged."""

import ctypes
import os
import signal
import threading

import psutil

_PR_SET_PDEATHSIG = 1
_requested = threading.Event()


def requested() -> bool:
    """Whether this worker was told to stop."""
    return _requested.is_set()


def prepare_child(**_: object) -> None:
    """In a fresh pool child: die with the parent, and take SIGTERM as a request instead of an end."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    signal.signal(signal.SIGTERM, lambda *_: _requested.set())


def tell_children(**_: object) -> None:
    """In the parent, as its warm shutdown begins: Celery itself would wait for hours-long work to end."""
    for child in psutil.Process(os.getpid()).children():
        child.send_signal(signal.SIGTERM)
