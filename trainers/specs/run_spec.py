"""RUN_DIR/spec.json: all that one attempt at one job is given."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from trainers.specs.faults import SpecError
from trainers.specs.fields import Resources, Strict
from trainers.specs.layouts import Layout
from trainers.specs.methods import METHODS
from trainers.specs.mixture import MAX_FILES, MixedFile
from trainers.specs.parameters import Resolved
from trainers.specs.resolution import check_batch, check_split

SPEC_VERSION = 2


class RunSpec(Strict):
    """One attempt at one job. Paths are absolute."""

    spec_version: Literal[2] = SPEC_VERSION
    job_id: str = Field(min_length=1, max_length=200)
    attempt: int = Field(ge=1)
    method: str
    hyperparameters: dict[str, Any]
    seed: int = Field(ge=0, lt=2**32)
    resources: Resources = Field(default_factory=Resources)
    model_dir: Path
    model_id: str
    model_digest: str = ""
    # Of ppo: the merged reward model, and its adapter where that sits on the very base of the policy.
    reward_model_dir: Path | None = None
    reward_adapter_dir: Path | None = None
    reward_model_digest: str = ""
    # The adapter that training starts from; of a checkpoint, also what it was sealed under.
    init_adapter_dir: Path | None = None
    init_adapter_digest: str = ""
    init_manifest_sha256: str | None = None
    train_file: Path  # of a mixture, the first
    train_sha256: str = ""  # where it is known: bytes that have another one are refused
    train_layout: Layout = Layout()
    mixture: list[MixedFile] = Field(default_factory=list, max_length=MAX_FILES)
    validation_file: Path | None = None
    validation_sha256: str = ""
    validation_layout: Layout = Layout()
    cache_dir: Path
    resume_roots: list[Path] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check(self) -> "RunSpec":
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is not available; available: {', '.join(METHODS)}")
        paths = [self.model_dir, self.train_file, self.cache_dir, self.validation_file, *self.resume_roots]
        paths += [part.path for part in self.mixture]
        for path in paths:
            if path is not None and not path.is_absolute():
                raise ValueError(f"{path} is not an absolute path")
        if (self.settings().init_adapter is None) != (self.init_adapter_dir is None):
            raise ValueError("init_adapter and init_adapter_dir go together")
        has_validation_file = self.validation_file is not None
        check_split(self.settings(), has_validation_file=has_validation_file, method=self.method)
        return self

    def settings(self) -> Resolved:
        """The hyperparameters as the method's own class."""
        resolved = METHODS[self.method].resolved.model_validate(self.hyperparameters)
        check_batch(
            resolved.batch_size,
            micro=resolved.micro_batch_size,
            nproc_per_node=self.resources.processes,
            method=self.method,
        )
        return resolved

    def settings_sha256(self) -> str:
        """What must be equal for a checkpoint of one attempt to be resumed by another."""
        # How many rows pass at once changes no sum but its order: a run may go on with fewer.
        decisive = {name: value for name, value in self.hyperparameters.items() if name != "micro_batch_size"}
        settings = [self.method, decisive, self.seed, self.model_digest]
        if self.reward_model_dir:
            settings += [self.reward_model_digest, self.reward_adapter_dir is not None]
        if self.init_adapter_dir:
            settings.append(self.init_adapter_digest)
        if self.mixture:
            settings.append([[part.weight, part.epochs] for part in self.mixture])
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def load_run_spec(run_dir: str | Path) -> RunSpec:
    """Reads RUN_DIR/spec.json. Raises SpecError when it is missing or not a run."""
    path = Path(run_dir) / "spec.json"
    try:
        return RunSpec.model_validate(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise SpecError(f"{path} does not exist") from None
    except ValueError as error:  # broken JSON and pydantic's ValidationError alike
        raise SpecError(f"{path} is not a run: {error}") from None
