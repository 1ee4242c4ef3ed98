"""Models and Playground: engines that come and go, files taken away, two answers side by side and a vote."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Dashboard
from tests.browser.steps import ask, choose
from tests.stack import Stack

ANSWERED_MS = 180_000  # an engine has to be loaded first


@pytest.fixture(scope="module")
def http(stack: Stack) -> Iterator[httpx.Client]:
    with stack.http() as client:
        yield client


@pytest.fixture(scope="module")
def other(stack: Stack, tiny_model: Path) -> str:
    """A second model to compare with."""
    stack.import_model(tiny_model, model_id="org/other")
    return "org/other"


def test_a_model_is_deployed_and_undeployed_while_one_looks(
    dashboard: Dashboard, page: Page, other: str
) -> None:
    dashboard.log_in(page, at="/models")
    page.get_by_role("link", name=other).click()
    expect(page.get_by_role("heading", name=other)).to_be_visible()
    engine = page.locator("section.panel", has=page.get_by_role("heading", name="Engine"))
    expect(engine.locator(".pill")).to_have_text("stopped")
    engine.get_by_role("button", name="Deploy", exact=True).click()
    expect(engine.locator(".pill")).to_have_text("ready", timeout=ANSWERED_MS)
    engine.get_by_role("button", name="Undeploy").click()
    expect(engine.locator(".pill")).to_have_text("stopped")


def test_a_file_is_taken_away_whole(dashboard: Dashboard, page: Page, http: httpx.Client) -> None:
    dashboard.log_in(page, at="/models/tiny")
    with page.expect_download() as started:
        page.get_by_role("link", name="model.safetensors").click()
    there = http.get("/models/tiny/files/model.safetensors").content
    assert Path(started.value.path()).read_bytes() == there


def test_two_answer_side_by_side_and_the_vote_becomes_data(
    dashboard: Dashboard, page: Page, http: httpx.Client, other: str
) -> None:
    before = len(http.get("/votes", params={"limit": 100}).json()["data"])
    dashboard.log_in(page, at="/playground?model=tiny")
    choose(page, "Compare with", other)
    page.get_by_text("Parameters").click()
    page.get_by_label("Most tokens").fill("12")
    page.get_by_label("Temperature").fill("2")
    ask(page, "What helps against a cough?")
    answers = page.locator(".answer")
    expect(answers).to_have_count(2)
    for answer in answers.all():
        expect(answer.locator(".answer-head")).to_contain_text(re.compile(r"\d+ tokens"), timeout=ANSWERED_MS)
    said = [answer.locator(".said").inner_text() for answer in answers.all()]
    assert said[0] != said[1], "by chance alone: the models are the same"

    page.get_by_role("button", name="The right one").click()
    expect(page.get_by_text(f"You prefer {other}")).to_be_visible()
    vote = http.get("/votes").json()["data"][0]
    assert vote["prompt"] == [{"role": "user", "content": "What helps against a cough?"}]
    assert (vote["chosen"]["model"], vote["rejected"]["model"]) == (other, "tiny")
    assert [vote[side]["content"].split() for side in ("rejected", "chosen")] == [
        text.split() for text in said
    ]

    ask(page, "And at night?")
    expect(answers).to_have_count(4)
    for answer in answers.all():
        expect(answer.locator(".answer-head")).to_contain_text(re.compile(r"\d+ tokens"), timeout=ANSWERED_MS)
    page.get_by_role("button", name="The left one").last.click()
    expect(page.get_by_text(f"{before + 2} so far")).to_be_visible()
    newest = http.get("/votes").json()["data"][0]
    assert newest["prompt"][1] == {"role": "assistant", "content": vote["chosen"]["content"]}, (
        "the preferred one"
    )

    page.get_by_role("button", name="Export votes").click()
    page.wait_for_url(re.compile("/data/file-"))
    rows = http.get(f"/files/{page.url.rsplit('/', 1)[1]}/content").text.splitlines()
    assert len(rows) == before + 2


def test_an_answer_is_stopped_and_the_conversation_goes_on(dashboard: Dashboard, page: Page) -> None:
    dashboard.log_in(page, at="/playground?model=tiny")
    page.get_by_text("Parameters").click()
    page.get_by_label("Most tokens").fill("450")
    page.get_by_label("Temperature").fill("0")
    ask(page, "What helps against a cough?")
    told = page.locator(".answer-head")
    expect(told).to_contain_text("answers", timeout=ANSWERED_MS)
    page.get_by_role("button", name="Stop").click()
    expect(told).to_contain_text("stopped")
    page.get_by_label("Most tokens").fill("8")
    ask(page, "And at night?")
    expect(told.last).to_contain_text("8 tokens", timeout=ANSWERED_MS)
    expect(told.first).to_contain_text("stopped")


def test_only_admins_are_offered_to_import(dashboard: Dashboard, page: Page, http: httpx.Client) -> None:
    made = http.post("/keys", json={"name": "who only trains", "role": "user"}).json()
    dashboard.log_in(page, at="/models", key=made["key"])
    expect(page.get_by_role("link", name="tiny", exact=True).first).to_be_visible()
    expect(page.get_by_role("button", name="Import a model")).to_have_count(0)


def test_a_model_that_is_gone_is_said_to_be(dashboard: Dashboard, page: Page, watched) -> None:
    watched.allowed.append("404")
    dashboard.log_in(page, at="/models/nobody")
    expect(page.get_by_text("This is not here")).to_be_visible()
