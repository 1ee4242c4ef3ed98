"""SIGTERM to a worker: its children stop their trainers, which save, and give the work back uncharged."""

import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

_PR_SET_PDEATHSIG = 1
_told = threading.Event()  # by SIGTERM: this process takes no more work
_drained = threading.Event()  # of the work at hand only: a node may be let take work again


def requested() -> bool:
    """Whether what this process does is to stop."""
    return _told.is_set() or _drained.is_set()


def request() -> None:
    """Have what this process does stopped as by SIGTERM: its node is being drained."""
    _drained.set()


@contextmanager
def listening() -> Iterator[None]:
    """While a task runs, take SIGTERM as a request. Before and after it ends an idle child at once."""
    _drained.clear()
    idle = signal.signal(signal.SIGTERM, lambda *_: _told.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, idle)


def die_with_parent(**_: object) -> None:
    """In a fresh pool child: a worker killed without a word must not leave children that go on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def tell_children(**_: object) -> None:
    """In the parent, as its warm shutdown begins: Celery itself would wait for hours-long work to end."""
    for child in psutil.Process(os.getpid()).children():
        child.send_signal(signal.SIGTERM)
