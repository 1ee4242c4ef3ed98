"""Overview, Jobs and Job: what is shown, and that it moves by itself."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Dashboard
from tests.browser.steps import panel
from tests.stack import Stack, wait_for

LONG = {"n_epochs": 40, "batch_size": 8, "max_length": 64, "logging_steps": 1, "eval_prompts": ["What now?"]}


def submit(http: httpx.Client, file_id: str, *, suffix: str, **hyperparameters: Any) -> str:
    """A supervised job on the tiny model; its id."""
    method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    asked = {"model": "tiny", "training_file": file_id, "suffix": suffix, "method": method}
    answer = http.post("/fine_tuning/jobs", json=asked)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def upload(http: httpx.Client, rows: bytes, *, name: str) -> str:
    """A training file; its id."""
    answer = http.put("/files", params={"filename": name, "purpose": "fine-tune"}, content=rows)
    return answer.json()["id"]


@pytest.fixture(scope="module")
def http(stack: Stack) -> Iterator[httpx.Client]:
    with stack.http() as client:
        yield client


@pytest.fixture(scope="module")
def jobs(http: httpx.Client, chat_file: Path) -> Iterator[dict[str, str]]:
    """One job that runs for long, one that waits behind it, and one whose file is wrong."""
    file_id = upload(http, chat_file.read_bytes(), name="chat.jsonl")
    bad = upload(http, b'{"messages": [{"role": "doctor", "content": "x"}]}\n', name="bad.jsonl")
    found = {
        "bad": submit(http, bad, suffix="bad-rows"),
        "runs": submit(http, file_id, suffix="runs", **LONG),
    }
    wait_for(lambda: measured(http, found["runs"]) >= 3, within_s=300, what="three steps")
    found["waits"] = submit(http, file_id, suffix="waits", n_epochs=1)
    wait_for(lambda: status(http, found["bad"]) == "failed", within_s=100, what="the wrong file")
    yield found
    for job_id in found.values():
        http.post(f"/fine_tuning/jobs/{job_id}/cancel")


def status(http: httpx.Client, job_id: str) -> str:
    return http.get(f"/fine_tuning/jobs/{job_id}").json()["status"]


def measured(http: httpx.Client, job_id: str) -> int:
    return http.get(f"/fine_tuning/jobs/{job_id}/curves").json()["last_step"] or 0


def test_the_overview_tells_what_runs_what_waits_and_what_failed(
    dashboard: Dashboard, page: Page, jobs: dict[str, str]
) -> None:
    dashboard.log_in(page)
    running = panel(page, "Running").get_by_role("row").filter(has_text=jobs["runs"][:12])
    expect(running).to_contain_text("supervised")
    waiting = panel(page, "Waiting").get_by_role("row").filter(has_text=jobs["waits"][:12])
    expect(waiting).to_contain_text("needs 1 device, others hold them")
    failed = panel(page, "Recent failures").get_by_role("row").filter(has_text=jobs["bad"][:12])
    expect(failed).to_contain_text("Line 1")
    expect(failed).to_contain_text("Mend line 1")
    machine = panel(page, "Machines").get_by_role("row").filter(has_text="slot:0")
    expect(machine).to_contain_text("leased")
    expect(machine.get_by_role("link")).to_have_attribute("href", f"/jobs/{jobs['runs']}")


def test_curves_grow_without_a_reload_and_without_moving(
    dashboard: Dashboard, page: Page, jobs: dict[str, str], http: httpx.Client
) -> None:
    dashboard.log_in(page, at=f"/jobs/{jobs['runs']}")
    loss = panel(page, "Loss")
    line = loss.locator("svg path[stroke-linejoin=bevel]").first
    expect(line).to_be_visible()
    # An element of this very document: gone after a reload, another one if the chart is made anew.
    page.evaluate("window.kept = document.querySelector('section.panel svg')")
    before, place = line.get_attribute("d"), loss.bounding_box()
    told = page.get_by_text(re.compile(r"^Step \d+ of")).inner_text()
    step = measured(http, jobs["runs"])
    wait_for(lambda: measured(http, jobs["runs"]) > step, within_s=100, what="another step")
    expect(page.get_by_text(re.compile(r"^Step \d+ of"))).not_to_have_text(told, timeout=60_000)
    expect(line).not_to_have_attribute("d", str(before), timeout=60_000)
    assert page.evaluate("window.kept.isConnected")
    assert loss.bounding_box() == place


def test_a_job_tells_its_log_events_answers_parameters_and_lineage(
    dashboard: Dashboard, page: Page, jobs: dict[str, str]
) -> None:
    dashboard.log_in(page, at=f"/jobs/{jobs['runs']}")
    expect(page.locator(".log").first).to_contain_text(re.compile(r"step 2 of \d+: train_loss \d"))
    page.get_by_role("tab", name="Events").click()
    expect(page.get_by_role("row").filter(has_text="Fine-tuning job started")).to_be_visible()
    page.get_by_role("tab", name="Samples").click()
    expect(page.get_by_role("row").filter(has_text="What now?").first).to_be_visible()
    page.get_by_role("tab", name="Parameters").click()
    expect(page.get_by_text("n_epochs", exact=True)).to_be_visible()
    page.get_by_role("tab", name="Lineage").click()
    expect(page.get_by_role("link", name="tiny", exact=True)).to_have_attribute("href", "/models/tiny")


def test_pausing_resuming_and_cancelling_from_the_page(
    dashboard: Dashboard, page: Page, jobs: dict[str, str], http: httpx.Client
) -> None:
    dashboard.log_in(page, at=f"/jobs/{jobs['waits']}")
    state = page.locator(".job-status .pill")
    page.get_by_role("button", name="Pause").click()
    expect(state).to_have_text("paused")
    page.get_by_role("button", name="Resume").click()
    expect(state).to_have_text("queued")
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Cancel the job").click()
    expect(state).to_have_text("cancelled")
    assert status(http, jobs["waits"]) == "cancelled"
    page.get_by_role("button", name="Retry").click()
    page.wait_for_url(lambda url: "/jobs/ftjob-" in url and jobs["waits"] not in url)
    jobs["again"] = page.url.rsplit("/", 1)[1]
    expect(page.get_by_role("link", name="Clone")).to_have_attribute("href", f"/new?from={jobs['again']}")


def test_the_list_is_narrowed_and_several_jobs_share_a_chart(
    dashboard: Dashboard, page: Page, jobs: dict[str, str]
) -> None:
    dashboard.log_in(page, at="/jobs?status=failed")
    rows = page.get_by_role("row")
    expect(rows.filter(has_text=jobs["bad"][:12])).to_be_visible()
    expect(rows.filter(has_text=jobs["runs"][:12])).to_have_count(0)
    page.goto(f"{dashboard.url}/jobs")
    top = rows.filter(has_text=jobs["runs"][:12]).bounding_box()
    rows.filter(has_text=jobs["runs"][:12]).get_by_role("checkbox").click()
    compare = panel(page, "Compare")
    expect(compare.locator("svg path[stroke-linejoin=bevel]").first).to_be_visible()
    assert rows.filter(has_text=jobs["runs"][:12]).bounding_box() == top


def test_an_unknown_job_is_told(dashboard: Dashboard, page: Page, watched: Any) -> None:
    watched.allowed.append("404")
    dashboard.log_in(page)
    page.goto(f"{dashboard.url}/jobs/ftjob-nobody")
    expect(page.get_by_text("This is not here")).to_be_visible()


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_screen(
    dashboard: Dashboard, page: Page, jobs: dict[str, str], width: int
) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    dashboard.log_in(page)
    for path in ("/", "/jobs", f"/jobs/{jobs['runs']}", f"/jobs/{jobs['bad']}"):
        page.goto(dashboard.url + path)
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
