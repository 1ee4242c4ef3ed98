"""Several training files as one: how much of each. Rows held out have been taken away before."""

from math import floor
from pathlib import Path
from typing import Annotated

from pydantic import Field

from trainers.specs.faults import SpecError
from trainers.specs.fields import Number, Strict
from trainers.specs.layouts import Layout

MAX_FILES = 16


class Share(Strict):
    """How much of a file a mixture takes: its weight beside the others, or passes over its rows."""

    # Files with weights make a mixture of as many rows as they have together.
    weight: Annotated[Number, Field(gt=0, le=1e6)] | None = None
    # For each epoch of the job: 2 shows every row twice, 0.5 shows half of the rows.
    epochs: Annotated[Number, Field(gt=0, le=100)] | None = None


class MixedFile(Share):
    """A file of a mixture as a run reads it."""

    path: Path
    sha256: str = ""
    layout: Layout = Layout()


def check_shares(shares: list[Share]) -> None:
    """Raise SpecError unless all files have a weight, or passes, or nothing (every row once)."""
    for i, share in enumerate(shares):
        if share.weight is not None and share.epochs is not None:
            message = "weight and epochs are two ways to say how much of a file is taken; give one"
            raise SpecError(message, param=f"training_files.{i}.epochs")
        if share.model_fields_set & {"weight", "epochs"} != shares[0].model_fields_set & {"weight", "epochs"}:
            message = "either every file has a weight, or every file has epochs, or none has any"
            raise SpecError(message, param=f"training_files.{i}")


def count_mixed(sizes: list[int], shares: list[Share]) -> list[int]:
    """How many rows a mixture takes of files with so many rows."""
    if all(share.weight is None for share in shares):
        return [
            max(1, round(size * (share.epochs or 1))) if size else 0
            for size, share in zip(sizes, shares, strict=True)
        ]
    weights = [share.weight if size else 0.0 for size, share in zip(sizes, shares, strict=True)]
    return _apportion(sum(sizes), [weight or 0.0 for weight in weights])


def _apportion(total: int, weights: list[float]) -> list[int]:
    """Whole numbers that add up to `total`, in proportion: the largest remainders are rounded up."""
    exact = [total * weight / sum(weights) for weight in weights] if any(weights) else [0.0] * len(weights)
    counts = [floor(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
