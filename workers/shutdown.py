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


def request() -> None:
    """Have what this process does stopped as by SIGTERM: its node is being drained."""
    _requested.set()


def listen() -> None:
    """At the start of a task: take SIGTERM as a request. Earlier, the pool would replace the handler."""
    signal.signal(signal.SIGTERM, lambda *_: _requested.set())


def die_with_parent(**_: object) -> None:
    """In a fresh pool child: a worker killed without a word must not leave children that go on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def leave(exitcode: int, **_: object) -> None:
    """In a pool child that is about to end: the pool answers its last word with SIGTERM.

    It waits a second for that, in which nothing else runs on its slot.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(exitcode))


def tell_children(**_: object) -> None:
    """In the parent, as its warm shutdown begins: Celery itself would wait for hours-long work to end."""
    for child in psutil.Process(os.getpid()).children():
        child.send_signal(signal.SIGTERM)
