"""A cancel at any moment is seen soon and ends the job once (G6), with nothing of it left (G5)."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from openai import BadRequestError

from tests.faults import parts
from tests.faults.history import Witness
from tests.stack import Stack, wait_for
from tests.workers.test_recovery import job_of, submit

pytestmark = [pytest.mark.faults(g=6), pytest.mark.timeout(3600)]
ENDED = ("succeeded", "failed", "cancelled")


@parts.repeated(200)
def test_a_cancel_at_a_random_moment(
    stack: Stack, chat_file: Path, judge: Callable[..., Witness], number: int
) -> None:
    choice = random.Random(number)
    job_id = submit(stack, chat_file, max_steps=40, save_steps=3)
    moment = choice.choice(["at once", "running", "loading", "training", "saving", "merging", "later"])
    if moment not in ("at once", "later"):
        wait_for(
            lambda: (
                (job := job_of(stack, job_id))["status"] in ENDED
                or moment in (job["status"], job.get("phase"))
            ),
            within_s=200,
            what=moment,
            every_s=0.05,
        )
    time.sleep(choice.uniform(0, 60 if moment == "later" else 1))  # the moment itself is what is varied
    t0 = time.monotonic()
    try:
        stack.sdk().fine_tuning.jobs.cancel(job_id)
    except BadRequestError as refused:
        assert refused.code == "job_not_cancellable"  # noqa: PT017 (either answer may be right)
    job = wait_for(
        lambda: job if (job := job_of(stack, job_id))["status"] in ENDED else None,
        within_s=120 if moment == "saving" else 30,
        what=f"the end of a job cancelled while {moment}",
    )
    print(f"cancelled {moment}: {job['status']} after {time.monotonic() - t0:.1f} s")  # noqa: T201 (for README)
    assert job["status"] in ("cancelled", "succeeded"), job["error"]
    judge(job_id)
