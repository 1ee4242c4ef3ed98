"""The handles of one attempt at one job."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from trainers.folders.checkpoints import rotate, seal
from trainers.folders.evaluation import Evaluation
from trainers.folders.events import Events
from trainers.folders.exits import Outcome
from trainers.specs import RunSpec
from trainers.training.ranks import StopRequest, world_size


@dataclass(frozen=True)
class Attempt:
    """Where a run is, what it was given, and how it talks to the outside."""

    run_dir: Path
    spec: RunSpec
    events: Events
    stop: StopRequest
    outcome: Outcome
    evaluation: Evaluation = field(default_factory=Evaluation)

    def seal_checkpoint(self, staged: Path, *, step: int, keep: int, figures: Collection[str]) -> None:
        """Makes a staged folder, whole but for its evaluation, a checkpoint, and tells of it. On rank 0.

        Of all checkpoints the newest `keep` stay. `figures`: those of the outcome that are told with it.
        """
        self.evaluation.write(staged)
        sealed = seal(
            staged,
            step=step,
            attempt=self.spec.attempt,
            world_size=world_size(),
            job_id=self.spec.job_id,
            settings_sha256=self.spec.settings_sha256(),
        )
        rotate(staged.parent, keep=keep)
        self.events.checkpoint(
            step,
            path=f"checkpoints/{sealed.path.name}",
            manifest_sha256=sealed.manifest_sha256,
            metrics={name: value for name, value in self.outcome.metrics.items() if name in figures},
        )
