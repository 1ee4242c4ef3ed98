"""A cancel at any moment is seen soon and ends the job once (G6), with nothing of it left (G5)."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from openai import BadRequestError

from tests.faults import parts
from tests.faults.history import Op, Witness
from tests.stack import Stack, wait_for
from tests.workers.test_recovery import job_of, submit

pytestmark = [pytest.mark.faults(g=6), pytest.mark.timeout(3600)]
ENDED = ("succeeded", "failed", "cancelled")
# A brief run takes the first three: while a trainer writes, after the last step, before any has begun.
MOMENTS = ("saving", "merging", "at once", "running", "loading", "training", "later")


@parts.repeated(200, brief=3, long=True)
def test_a_cancel_at_a_random_moment(
    stack: Stack, chat_file: Path, judge: Callable[..., Witness], number: int
) -> None:
    choice, moment = random.Random(parts.SEED + number), MOMENTS[number % len(MOMENTS)]
    job_id = submit(stack, chat_file, max_steps=40, save_steps=3)
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
    t0 = time.time()
    try:
        stack.sdk(max_retries=0).fine_tuning.jobs.cancel(job_id)
        answer, expected = "yes", "cancelled"
    except BadRequestError as refused:
        assert refused.code == "job_not_cancellable"  # noqa: PT017 (either answer may be right)
        answer, expected = "no", "succeeded"
    cancel = Op("cancel", job_id, t0, time.time(), answer, id=job_id)
    job = wait_for(
        lambda: job if (job := job_of(stack, job_id))["status"] in ENDED else None,
        within_s=120 if moment == "saving" else 30,
        what=f"the end of a job cancelled while {moment}",
    )
    took_s = time.time() - t0
    print(f"cancel {moment}: {answer}, {job['status']} after {took_s:.1f} s")  # noqa: T201 (for README)
    assert job["status"] == expected, job["error"]
    judge(job_id, cancels=[cancel])
