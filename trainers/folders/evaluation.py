"""What a model was like before, while and after its training: evaluation.json, which stays with the model."""

import json
from pathlib import Path
from typing import Any

from trainers.folders.artifacts import write_json
from trainers.folders.events import drop_nonfinite

EVALUATION_FILE = "evaluation.json"
_KEPT_STEPS = 100  # the first and the newest: checkpoints at every step of a long run must stay cheap


class Evaluation:
    """Facts by step: numbers of held-out rows, and what the model made of fixed texts."""

    def __init__(self) -> None:
        self._steps: dict[int, dict[str, Any]] = {}

    def note(self, step: int, **facts: Any) -> None:
        """Adds facts to what is known of a step."""
        self._steps.setdefault(step, {"step": step}).update(drop_nonfinite(facts))
        if len(self._steps) > _KEPT_STEPS:
            del self._steps[sorted(self._steps)[1]]

    def knows(self, step: int, name: str) -> bool:
        """Whether a fact of a step has been noted."""
        return name in self._steps.get(step, ())

    def write(self, folder: Path) -> None:
        """Writes {"steps": [{"step", ...}]}, first step first; no file where nothing was ever noted."""
        if self._steps:
            steps = [self._steps[step] for step in sorted(self._steps)]
            write_json(folder / EVALUATION_FILE, {"steps": steps})

    def recall(self, folder: Path) -> None:
        """Goes on from what a checkpoint holds."""
        path = folder / EVALUATION_FILE
        if path.is_file():
            self._steps = {facts["step"]: facts for facts in json.loads(path.read_bytes())["steps"]}
