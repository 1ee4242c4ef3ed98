"""What is bound to a thread or task is on its lines alone, and the form is the operator's choice."""

import asyncio
import json
import logging
import subprocess
import sys

import pytest

from db import logs
from db.logs import JsonFormatter


def line(message: str) -> dict[str, object]:
    record = logging.LogRecord("here", logging.INFO, __file__, 1, message, None, None)
    return json.loads(JsonFormatter().format(record))


def test_bound_fields_add_up_and_end_with_their_block() -> None:
    with logs.bound(job_id="ftjob-1"):
        with logs.bound(attempt=2):
            inner = line("inner")
        outer = line("outer")
    after = line("after")
    assert (inner["job_id"], inner["attempt"]) == ("ftjob-1", 2)
    assert "attempt" not in outer
    assert "job_id" not in after


def test_tasks_do_not_see_each_others_fields() -> None:
    async def work(name: str) -> dict[str, object]:
        with logs.bound(request_id=name):
            await asyncio.sleep(0)
            return line(name)

    async def both() -> list[dict[str, object]]:
        return list(await asyncio.gather(work("a"), work("b")))

    assert [told["request_id"] for told in asyncio.run(both())] == ["a", "b"]


@pytest.mark.parametrize(("chosen", "starts"), [("auto", '{"time"'), ("json", '{"time"'), ("text", "20")])
def test_the_form_is_chosen_by_a_variable(monkeypatch, chosen: str, starts: str) -> None:
    monkeypatch.setenv("RESIDENCY_LOG_FORMAT", chosen)
    script = "import logging; from db import logs; logs.configure(); logging.warning('one\\ntwo')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.startswith(starts)
    assert len(done.stderr.splitlines()) == (2 if chosen == "text" else 1)
