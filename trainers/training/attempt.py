"""The handles of one attempt at one job."""

from dataclasses import dataclass, field
from pathlib import Path

from trainers.folders.evaluation import Evaluation
from trainers.folders.events import Events
from trainers.folders.exits import Outcome
from trainers.specs import RunSpec
from trainers.training.ranks import StopRequest


@dataclass(frozen=True)
class Attempt:
    """Where a run is, what it was given, and how it talks to the outside."""

    run_dir: Path
    spec: RunSpec
    events: Events
    stop: StopRequest
    outcome: Outcome
    evaluation: Evaluation = field(default_factory=Evaluation)
