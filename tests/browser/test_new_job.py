"""New job: faults are told before a job is sent, and what is sent is what the form says."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Dashboard
from tests.browser.steps import choose
from tests.stack import Stack, wait_for

CHAT = {"messages": [{"role": "user", "content": "Dose?"}, {"role": "assistant", "content": "Two."}]}
PAIR = {"prompt": "Dose?", "chosen": "Two.", "rejected": "Ten."}


@pytest.fixture(scope="module")
def http(stack: Stack) -> Iterator[httpx.Client]:
    with stack.http() as client:
        yield client


@pytest.fixture(scope="module")
def files(http: httpx.Client) -> dict[str, str]:
    """A checked file of conversations and one of preferences."""
    found = {}
    for name, row in (("chat", CHAT), ("pairs", PAIR)):
        body = "".join(json.dumps(row | {}) + "\n" for _ in range(8))
        asked = {"filename": f"{name}.jsonl", "purpose": "fine-tune"}
        found[name] = http.put("/files", params=asked, content=body.encode()).json()["id"]
    for file_id in found.values():
        wait_for(
            lambda file_id=file_id: http.get(f"/files/{file_id}").json()["status"] == "processed",
            within_s=100,
            what="the check",
        )
    return found


def started(page: Page, http: httpx.Client) -> dict[str, Any]:
    """The job that the form started, taken off the queue at once."""
    page.get_by_role("button", name="Start the job").click()
    page.wait_for_url(lambda url: "/jobs/ftjob-" in url)
    job_id = page.url.rsplit("/", 1)[1]
    http.post(f"/fine_tuning/jobs/{job_id}/cancel")
    return http.get(f"/fine_tuning/jobs/{job_id}").json()


def test_the_form_starts_the_job_that_it_says_and_a_clone_says_the_same(
    dashboard: Dashboard, page: Page, http: httpx.Client, files: dict[str, str]
) -> None:
    dashboard.log_in(page, at=f"/new?file={files['chat']}")
    page.get_by_label("n_epochs").fill("3")
    page.get_by_label("Suffix").fill("from-form")
    page.get_by_text("The same with curl").click()
    expect(page.locator("pre.log")).to_contain_text('"n_epochs": 3')
    job = started(page, http)
    assert job["training_file"] == files["chat"]
    assert job["user_provided_suffix"] == "from-form"
    assert job["method"]["supervised"]["hyperparameters"]["n_epochs"] == 3
    page.goto(f"{dashboard.url}/new?from={job['id']}")
    expect(page.get_by_label("n_epochs")).to_have_value("3")
    expect(page.get_by_label("Suffix")).to_have_value("from-form")


def test_faults_are_told_at_their_fields_and_nothing_is_sent(
    dashboard: Dashboard, page: Page, http: httpx.Client, files: dict[str, str]
) -> None:
    newest = http.get("/fine_tuning/jobs").json()["data"][:1]
    dashboard.log_in(page, at=f"/new?file={files['pairs']}")
    expect(page.get_by_text("Its rows are 'preference'; supervised takes messages")).to_be_visible()
    page.get_by_label("n_epochs").fill("51")
    page.get_by_role("button", name="Start the job").click()
    expect(page.get_by_text("Must be from 1 to 50.")).to_be_visible()
    after = http.get("/fine_tuning/jobs").json()["data"][:1]
    assert [job["id"] for job in after] == [job["id"] for job in newest]
    choose(page, "Method", "reward")
    expect(page.get_by_text("Its rows are")).to_have_count(0)


def test_what_the_api_refuses_is_told_at_its_field(
    dashboard: Dashboard, page: Page, files: dict[str, str]
) -> None:
    dashboard.log_in(page, at=f"/new?file={files['chat']}")
    page.get_by_label("Suffix").fill("no spaces here")
    page.get_by_role("button", name="Start the job").click()
    expect(page.locator(".q-field--error").filter(has_text="Suffix")).to_contain_text("suffix")
