"""Importing torch, transformers and peft, which is most of the time of a short piece of work."""

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

QUANTIZATION, SHARDING = "bitsandbytes", "deepspeed"
# What every model needs, and what transformers would import with the first.
MODELS = ("transformers.modeling_utils", "transformers.masking_utils")


@contextmanager
def loading() -> Iterator[None]:
    """Around imports, and little else: spare the collector of cycles what they bring, now and later.

    They make a million objects that stay to the end. As it comes, the collector goes through them again and
    again while they are made, then at every full collection, and once more before the process ends: a third
    of the time of a process that only imports these libraries. Garbage made in here is never collected.
    """
    usual = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.freeze()
        gc.set_threshold(*usual)


def preload(*names: str) -> None:
    """Import modules in one go, for a process that will need them."""
    if all(name in sys.modules for name in names):
        return
    with loading():
        for name in names:
            importlib.import_module(name)


def do_without(*names: str) -> None:
    """Hide packages from this process that others import wherever they are installed, and it has no use for.

    bitsandbytes alone, which brings torch's compiler along, is a fifth of the time that a trainer takes to
    start.
    """
    for name in names:
        sys.modules.setdefault(name, None)  # pyright: ignore[reportArgumentType] (documented: no module)
