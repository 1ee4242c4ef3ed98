"""The checker of histories finds every kind of lie, and no fault with an honest history."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from tests.db.world import World
from tests.faults.history import Held, JobSeen, Op, Witness, check, read_witness

EVENTS = [
    ("Created fine-tuning job: ftjob-1", {}),
    ("Files validated, moving job to queued state", {"status": "queued"}),
    ("Fine-tuning job started", {"status": "running"}),
    ("Step 1/9: training loss=1", {}),
    ("Step 3/9: training loss=1", {}),
    ("Step 3/9: validation loss=1", {}),
    ("Checkpoint created at step 3", {}),
    ("Step 4/9: training loss=1", {}),
    ("Worker process died; the job waits for another attempt", {"status": "queued"}),
    ("Fine-tuning job goes on (attempt 2)", {"status": "running"}),
    ("Resuming from the checkpoint at step 3", {}),
    ("Step 4/9: training loss=1", {}),
    ("The job has successfully completed", {"status": "succeeded"}),
]
JOB = JobSeen("ftjob-1", "a", "succeeded", EVENTS, saved=frozenset({3}))
CREATE = Op("create", "a", 0, 1, "yes", id="ftjob-1")
HONEST = Witness(
    jobs=[JOB],
    attempts=[Held("train of ftjob-1", 1, 1, 5), Held("train of ftjob-1", 2, 5, 9)],
    devices=[Held("n/slot:0", 1, 1, 5.5), Held("n/slot:0", 2, 5.5, 9)],
)


def told(*events: tuple[str, dict], status: str = "succeeded", saved: int = 3) -> Witness:
    job = replace(JOB, events=list(events), status=status, saved=frozenset({saved}))
    return replace(HONEST, jobs=[job])


def test_an_honest_history_has_no_fault():
    maybe = [replace(CREATE, result="maybe", id=None), CREATE, replace(CREATE, t0=2)]
    assert check(maybe, HONEST) == []
    assert check([replace(CREATE, key="b", result="maybe", id=None), CREATE], HONEST) == []


@pytest.mark.parametrize(
    ("witness", "fault"),
    [
        (Witness(), "a: accepted as ['ftjob-1'], but unknown"),
        (replace(HONEST, jobs=[JOB, replace(JOB, id="ftjob-2")]), "a: 2 jobs of one request"),
        (replace(HONEST, jobs=[JOB, replace(JOB, id="ftjob-2", key="z")]), "ftjob-2: nobody asked for it"),
        (
            replace(HONEST, attempts=[Held("t", 1, 1, 6), Held("t", 2, 5, 9)]),
            "t: 2 began 1.000 s before t: 1 ended",
        ),
        (
            replace(HONEST, attempts=[Held("train of j", 1, 1, 6), Held("merge of j", 1, 5, 9)]),
            "merge of j: 1 began 1.000 s before train of j: 1 ended",
        ),
        (replace(HONEST, attempts=[Held("t", 1, 1, None)]), "t: 1 was never given back"),
        (replace(HONEST, attempts=[Held("t", 2, 1, 2), Held("t", 2, 3, 4)]), "t: tokens [2, 2] do not rise"),
        (
            replace(HONEST, devices=[Held("d", 1, 1, 6), Held("d", 2, 5, 9)]),
            "d: 2 began 1.000 s before d: 1 ended",
        ),
        (replace(HONEST, devices=[Held("d", 7, 1, None)]), "d: 7 was never given back"),
        (told(*EVENTS, EVENTS[-1]), "with 2 terminal events"),
        (told(*EVENTS[:-1], status="running"), "ftjob-1: is running, with 0 terminal events"),
        (told(*EVENTS, status="failed"), "ftjob-1: is failed, but its events say"),
        (told(*EVENTS[:1], *EVENTS[2:]), "ftjob-1: went from validating_files to running"),
        (told(*EVENTS, saved=2), "attempt 2 resumed from step 3, which was never whole"),
        (told(*EVENTS[:10], *EVENTS[11:]), "attempt 2 began anew though 3 was saved"),
        (
            told(*EVENTS[:10], ("Resuming from the checkpoint at step 2", {}), *EVENTS[11:], saved=2),
            "attempt 2 resumed from step 2 though 3 was saved",
        ),
        (told(*EVENTS[:8], EVENTS[3], *EVENTS[8:]), "attempt 1 went from step 4 back to 1"),
        (told(*EVENTS[:12], EVENTS[3], EVENTS[12]), "attempt 2 went from step 4 back to 1"),
    ],
)
def test_every_lie_is_found(witness: Witness, fault: str):
    found = check([CREATE], witness)
    assert any(fault in one for one in found), found


@pytest.mark.parametrize(
    ("answer", "status", "found"),
    [
        ("yes", "succeeded", ["ftjob-1: is succeeded, though its cancel was accepted"]),
        ("yes", "cancelled", []),
        ("no", "succeeded", []),
        ("maybe", "succeeded", []),
        ("maybe", "cancelled", []),
    ],
)
def test_an_accepted_cancel_is_the_end_of_the_job(answer: Literal["yes", "no", "maybe"], status: str, found):
    witness = told(*EVENTS[:-1], ("It ended", {"status": status}), status=status)
    assert check([CREATE, Op("cancel", "a", 2, 3, answer)], witness) == found


def test_a_refused_job_may_not_be_there():
    assert check([replace(CREATE, result="no")], HONEST) == ["a: refused, but there"]


def test_an_older_checkpoint_will_do_where_the_newest_was_damaged():
    resumed = told(*EVENTS[:10], ("Resuming from the checkpoint at step 2", {}), *EVENTS[11:], saved=2)
    assert check([CREATE], resumed, damaged=frozenset({"ftjob-1"})) == []


def test_a_real_life_with_an_interruption_is_honest(world: World, tmp_path: Path):
    job = world.add_job(metadata={"key": "a"})
    world.give_back(world.take())
    world.skip_delays()
    world.train(world.take())
    world.merge(world.take("cpu"))
    run_dir = tmp_path / "runs" / job.id / "1"
    (run_dir / "checkpoints" / "step-20").mkdir(parents=True)
    (run_dir / "checkpoints" / "step-30.tmp").mkdir()
    said = [{"type": "checkpoint", "step": 10}, {"type": "phase", "phase": "saving"}]
    (run_dir / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said) + '{"type": "ch')

    witness = read_witness(world.database, tmp_path / "runs")

    assert check([replace(CREATE, id=job.id)], witness) == []
    assert [(seen.id, seen.status, seen.saved) for seen in witness.jobs] == [(job.id, "succeeded", {10, 20})]
    assert [held.what.split()[0] for held in witness.attempts] == ["train", "train", "merge"]
    assert len(witness.devices) == 2
