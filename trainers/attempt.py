"""The handles of one attempt at one job."""

from dataclasses import dataclass, field
from pathlib import Path

from trainers.evaluation import Evaluation
from trainers.events import Events
from trainers.exits import Outcome
from trainers.ranks import StopRequest
from trainers.specs import RunSpec


@dataclass(frozen=True)
class Attempt:
    """Where a run is, what it was given, and how it talks to the outside."""

    run_dir: Path
    spec: RunSpec
    events: Events
    stop: StopRequest
    outcome: Outcome
    evaluation: Evaluation = field(default_factory=Evaluation)
