"""Continued pretraining: next-token loss on packed plain text."""

from typing import Any

from trainers import sft
from trainers.folders.checkpoints import Checkpoint
from trainers.training.attempt import Attempt


def train(attempt: Attempt, *, prepared: dict[str, Any], resume: Checkpoint | None) -> None:
    """Trains an adapter into RUN_DIR/output: the loop of supervised fine-tuning, all tokens with loss."""
    sft.train(attempt, prepared=prepared, resume=resume)
