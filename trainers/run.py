"""`torchrun ... -m trainers.run RUN_DIR`: one attempt at one job, from spec.json to exit.json."""

import importlib
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from trainers.folders import checkpoints
from trainers.folders.checkpoints import Checkpoint, Corrupt
from trainers.folders.events import Events
from trainers.folders.exits import BAD_DATA_EXIT, BadCheckpoint, Outcome, PeerLost, write_exit
from trainers.models.libraries import QUANTIZATION, SHARDING, do_without, preload
from trainers.prepare import pick_checkpoint, prepare
from trainers.specs import RunSpec, SpecError, load_run_spec
from trainers.training.attempt import Attempt
from trainers.training.ranks import (
    Peers,
    StopRequest,
    any_rank,
    die_with_parent,
    from_first_rank,
    join_ranks,
    leave_ranks,
    rank,
    world_size,
)

MODULES = {
    "pretraining": "trainers.pretrain",
    "supervised": "trainers.sft",
    "reward": "trainers.reward",
    "dpo": "trainers.dpo",
    "kto": "trainers.kto",
    "ppo": "trainers.ppo",
    "grpo": "trainers.grpo",
}
_POLL_S = 0.2


def run(run_dir: Path, *, stop: StopRequest, alone: bool = False) -> int:
    """Trains as spec.json says; returns the exit status. Failures are explained in exit.json, then raised.

    alone: nothing else will be done in this process.
    """
    first = rank() == 0
    if first:
        (run_dir / "exit.json").unlink(missing_ok=True)  # of an earlier run by hand in the same folder
        checkpoints.clear_leftovers(run_dir / "checkpoints")
    events = Events(run_dir / "events.jsonl" if first else None)
    outcome = Outcome("error")
    peers: Peers | None = None
    try:
        join_ranks()
        peers = Peers()
        _attempt(run_dir, stop=stop, events=events, outcome=outcome, alone=alone)
        peers.part()
    except Exception as error:  # the one place where every failure gets its reason
        if peers and peers.lost() and not isinstance(error, SpecError):
            raise PeerLost("another rank has died") from error
        outcome.blame(error, run_dir=run_dir)
        if first:
            checkpoints.clear_leftovers(
                run_dir / "checkpoints"
            )  # on a full disk this is what exit.json needs
        if write_exit(run_dir, outcome) and outcome.reason != "disk_full":  # no room for an event either
            events.message(outcome.message, level="error", code=outcome.reason)
        if outcome.reason == "bad_data":
            return BAD_DATA_EXIT
        if outcome.reason != "stopped":
            raise
    else:
        if first:
            write_exit(run_dir, outcome)
    finally:
        events.close()
    leave_ranks()
    return 0


def _attempt(run_dir: Path, *, stop: StopRequest, events: Events, outcome: Outcome, alone: bool) -> None:
    spec = load_run_spec(run_dir)
    if world_size() != spec.resources.processes:
        raise SpecError(
            f"started with {world_size()} processes, but the spec asks for {spec.resources.processes}"
        )
    events.phase("preparing")
    method = _import_method(spec, alone=alone)  # on all ranks at once: the others then wait for the first
    prepared = _obtain_prepared(run_dir, stop=stop, events=events)
    resume = _agree_on_checkpoint(run_dir, spec=spec, prepared=prepared, events=events)
    if resume:
        outcome.resumed_from = resume.step
        events.message(f"Resuming from the checkpoint at step {resume.step}", level="info")
    if any_rank(stop.requested)[0]:
        outcome.reason, outcome.message = "stopped", "asked to stop before training began"
        return
    attempt = Attempt(run_dir, spec=spec, events=events, stop=stop, outcome=outcome)
    method.train(attempt, prepared=prepared, resume=resume)


def _import_method(spec: RunSpec, *, alone: bool) -> ModuleType:
    from trainers.models.quantized import is_quantized  # only now: what is wrong with the spec needs no torch

    settings = spec.settings()
    if alone and not is_quantized(settings):
        do_without(QUANTIZATION)
    if alone and not settings.deepspeed:
        do_without(SHARDING)
    name = MODULES[spec.method]
    preload(name)
    return importlib.import_module(name)


def _obtain_prepared(run_dir: Path, *, stop: StopRequest, events: Events) -> dict[str, Any]:
    """What prepare wrote; without it the first rank prepares and the others wait."""
    path = run_dir / "prepared.json"
    if rank() == 0 and not path.exists():
        with stop.at_once():
            return prepare(run_dir, events=events)
    while not path.exists():
        if (run_dir / "exit.json").exists():
            raise PeerLost("the first rank could not prepare the data")
        time.sleep(_POLL_S)
    return json.loads(path.read_bytes())


def _agree_on_checkpoint(
    run_dir: Path, *, spec: RunSpec, prepared: dict[str, Any], events: Events
) -> Checkpoint | None:
    """The checkpoint to resume from, verified by the first rank just before it is read."""
    found: Checkpoint | Corrupt | None = None
    if rank() == 0:
        chosen = prepared["resume_from"]
        found = checkpoints.verify(Path(chosen)) if chosen else None
        # Damaged since it was chosen, or this folder was run before and has come further.
        if isinstance(found, Corrupt) or checkpoints.list_checkpoints(run_dir / "checkpoints"):
            found = pick_checkpoint(run_dir, spec=spec, events=events)
    found = from_first_rank(found)
    assert not isinstance(found, Corrupt)
    if found and found.manifest["settings_sha256"] != spec.settings_sha256():
        raise BadCheckpoint(f"{found.path} was written by a run with another model or other hyperparameters")
    if found and found.manifest["world_size"] != world_size() and spec.settings().deepspeed:
        raise BadCheckpoint(
            f"{found.path} holds the shards of {found.manifest['world_size']} processes, "
            f"and DeepSpeed cannot read them with {world_size()}"
        )
    if found and found.manifest["world_size"] != world_size():
        events.message(
            f"resuming on {world_size()} processes from a checkpoint of {found.manifest['world_size']}: "
            "the random state is not carried over",
            level="warn",
            code="world_size_changed",
        )
    return found


def main(arguments: list[str]) -> int:
    die_with_parent()
    stop = StopRequest()
    stop.listen()
    # Before any import that reads them: nothing here may reach for a network.
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if world_size() > 1 else "true")
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format=f"%(asctime)s [{rank()}] %(name)s: %(message)s"
    )
    warnings.simplefilter("ignore", FutureWarning)  # what libraries will change is nothing to who trains
    return run(Path(arguments[0]).absolute(), stop=stop, alone=True)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    logging.shutdown()
    # All is on disk. A thread of a collective may yet let go of a tensor, for which it needs the interpreter:
    # when that is ending, the process aborts instead.
    os._exit(status)
