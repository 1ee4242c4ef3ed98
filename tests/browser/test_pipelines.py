"""Pipelines: written as YAML with mistakes told at their lines, followed as a graph, and cancelled."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Dashboard
from tests.browser.test_jobs import upload
from tests.stack import Stack, wait_for

YAML = """\
name: two
stages:
  - name: first
    model: tiny
    training_file: rows-of-pipelines.jsonl
    method:
      type: supervised
      supervised:
        hyperparameters: {n_epochs: 50, batch_size: 8, max_length: 64, logging_steps: 1}
  - name: second
    model: {stage: first}
    training_file: rows-of-pipelines.jsonl
    method:
      type: supervised
      supervised:
        hyperparameters:
          n_epochs: 1
"""


@pytest.fixture(scope="module")
def file_id(stack: Stack, chat_file: Path) -> str:
    with stack.http() as http:
        return upload(http, chat_file.read_bytes(), name="rows-of-pipelines.jsonl")


@pytest.mark.usefixtures("file_id")
@pytest.mark.parametrize(
    ("text", "place", "told"),
    [
        ("name: x\nstages: [", "Line 2", "This is not YAML"),
        (
            YAML.replace("file: rows-of", "file: none-of", 1),
            "Line 5, stage first, training_file",
            "No file with the name 'none-of-pipelines.jsonl'",
        ),
        (
            YAML.replace("          n_epochs: 1", "          n_epochs: many"),
            "Line 17, stage second, method.supervised.hyperparameters.n_epochs",
            "",
        ),
        (YAML.replace("stage: first", "stage: third"), "Line 11, stage second, model.stage", "'third'"),
    ],
    ids=["no YAML", "no such file", "a wrong value", "no such stage"],
)
def test_what_is_wrong_is_told_at_its_line(
    dashboard: Dashboard, page: Page, text: str, place: str, told: str
) -> None:
    dashboard.log_in(page, at="/pipelines/new")
    page.get_by_label("Pipeline as YAML").fill(text)
    page.get_by_role("button", name="Start the pipeline").click()
    expect(page.get_by_role("alert")).to_contain_text(place)
    expect(page.get_by_role("alert")).to_contain_text(told)
    selected = "a => a.value.slice(0, a.selectionStart).split('\\n').length"
    line = int(re.findall(r"\d+", place)[0])
    wait_for(
        lambda: page.get_by_label("Pipeline as YAML").evaluate(selected) == line,
        within_s=30,
        what="the line to be selected",
    )


def test_a_pipeline_is_started_followed_and_cancelled(
    dashboard: Dashboard, page: Page, stack: Stack, file_id: str
) -> None:
    dashboard.log_in(page, at="/pipelines/new")
    page.get_by_label("Pipeline as YAML").fill(YAML)
    page.get_by_role("button", name="Start the pipeline").click()
    page.wait_for_url(re.compile(r"/pipelines/pipe-"))
    pipeline_id = page.url.rsplit("/", 1)[1]
    with stack.http() as http:
        jobs = {s["name"]: s["job_id"] for s in http.get(f"/pipelines/{pipeline_id}").json()["stages"]}
    first, second = page.get_by_label("Stage first"), page.get_by_label("Stage second")
    expect(first.get_by_role("link", name="first")).to_have_attribute("href", f"/jobs/{jobs['first']}")
    expect(first.get_by_role("link", name="tiny", exact=True)).to_be_visible()
    expect(first.get_by_role("link", name="rows-of-pipelines.jsonl")).to_have_attribute(
        "href", f"/data/{file_id}"
    )
    expect(second).to_contain_text("starts from")
    expect(second.locator("dd").first).to_have_text("first")
    expect(page.locator(".graph svg path")).to_have_count(1)
    page.evaluate("window.kept = document.querySelector('article.stage')")
    place = second.bounding_box()
    expect(first.locator(".pill")).to_have_text("running", timeout=120_000)
    expect(first.locator(".stage-doing")).to_have_text(re.compile(r"^\d+ of \d+"), timeout=120_000)
    expect(second.locator(".pill")).to_have_text("waiting")
    assert page.evaluate("window.kept.isConnected")
    assert second.bounding_box() == place
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_role("button", name="Cancel the pipeline").click()
    expect(page.locator(".job-status .pill")).to_have_text("cancelled", timeout=120_000)
    expect(page.get_by_role("button", name="Cancel", exact=True)).to_be_hidden()
    page.set_viewport_size({"width": 390, "height": 844})
    for path in ("/pipelines/new", "/pipelines", f"/pipelines/{pipeline_id}"):
        page.goto(dashboard.url + path)
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
    page.goto(f"{dashboard.url}/pipelines")
    expect(page.get_by_role("link", name="two")).to_have_attribute("href", f"/pipelines/{pipeline_id}")
