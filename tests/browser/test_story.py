"""The whole story in one browser: from a file with a fault to a vote between two models, and a key."""

import json
import re
from typing import Any

import httpx
from playwright.sync_api import Page, expect

from tests.browser.conftest import Dashboard
from tests.browser.steps import ask, choose, drop, go_to, lines, panel, uploaded
from tests.stack import Stack, wait_for

ROWS = [
    {"messages": [{"role": "user", "content": f"Dose {i}?"}, {"role": "assistant", "content": "Two a day."}]}
    for i in range(96)
]
WITH_FAULT = [*map(json.dumps, ROWS[:16]), '{"mesages": []}', *map(json.dumps, ROWS[17:])]
N_STEPS = 600  # 50 passes over the rows, 8 at a time
SLOW_MS = 180_000  # a job or an engine has to start


def test_the_whole_story(dashboard: Dashboard, page: Page, stack: Stack) -> None:
    with stack.http() as http:
        dashboard.log_in(page, at="/data")
        mend_a_file(page)
        start_a_job(page)
        watch_pause_and_resume(page, http)
        made = deploy_what_it_made(page)
        chat_and_vote(page, http, made)
        make_use_and_revoke_a_key(page, stack)


def mend_a_file(page: Page) -> None:
    """Upload a file, read what is wrong with it and where, upload it again without."""
    drop(page, lines(WITH_FAULT), name="story.jsonl")
    faulty = uploaded(page, "story.jsonl")
    row = page.get_by_role("row").filter(has_text=faulty)
    expect(row.locator(".pill")).to_have_text("error", timeout=60_000)
    page.locator(".upload li").get_by_role("link").click()
    fault = panel(page, "Faults").get_by_role("row").filter(has_text="did you mean 'messages'?")
    expect(fault.get_by_role("cell").first).to_have_text("17")

    go_to(page, "Data")
    drop(page, lines(ROWS), name="mended.jsonl")
    page.goto(re.sub(r"/data.*", f"/data/{uploaded(page, 'mended.jsonl')}", page.url))
    expect(page.locator(".job-status .pill")).to_have_text("processed", timeout=60_000)
    expect(panel(page, "Rows")).to_contain_text("96 of 96 (100 %)")


def start_a_job(page: Page) -> None:
    """Fill in the form that the file leads to."""
    page.get_by_role("link", name="New job with it").click()
    expect(page.get_by_label("Training file")).to_have_value(re.compile(r"mended\.jsonl"))
    choose(page, "Base model", "tiny")
    page.get_by_label("Suffix").fill("story")
    asked = {"n_epochs": "50", "batch_size": "8", "max_length": "64", "learning_rate": "0.003"}
    for name, value in asked.items():
        page.get_by_label(name, exact=True).fill(value)
    page.get_by_text("Advanced").click()
    page.get_by_label("logging_steps", exact=True).fill("1")
    choose(page, "use_peft", "no")
    page.get_by_role("button", name="Start the job").click()
    page.wait_for_url(re.compile("/jobs/ftjob-"))


def watch_pause_and_resume(page: Page, http: httpx.Client) -> None:
    """See the curve move in the same document, pause, resume, and see the job through."""
    job_id = page.url.rsplit("/", 1)[1]
    state = page.locator(".job-status .pill")
    line = panel(page, "Loss").locator("svg path[stroke-linejoin=bevel]").first
    expect(line).to_be_visible(timeout=SLOW_MS)
    page.evaluate("window.kept = document.querySelector('section.panel svg')")
    expect(line).not_to_have_attribute("d", str(line.get_attribute("d")))
    page.get_by_role("button", name="Pause").click()
    expect(state).to_have_text("paused", timeout=SLOW_MS)
    paused_at = last_step(http, job_id)
    assert 0 < paused_at < N_STEPS
    page.get_by_role("button", name="Resume").click()
    expect(state).to_have_text("running", timeout=SLOW_MS)
    wait_for(lambda: last_step(http, job_id) > paused_at, within_s=180, what="a step after the pause")
    expect(line).not_to_have_attribute("d", str(line.get_attribute("d")))
    assert page.evaluate("window.kept.isConnected"), "another document or another chart"
    expect(state).to_have_text("succeeded", timeout=600_000)
    assert last_step(http, job_id) == N_STEPS


def last_step(http: httpx.Client, job_id: str) -> int:
    """The last step that the curves of a job hold."""
    return http.get(f"/fine_tuning/jobs/{job_id}/curves").json()["last_step"] or 0


def deploy_what_it_made(page: Page) -> str:
    """Have an engine hold the new model; its name."""
    made = page.get_by_text(re.compile(r"^ft:.*:story:")).first.inner_text()
    go_to(page, "Models")
    page.get_by_role("link", name=made, exact=True).click()
    engine = panel(page, "Engine")
    engine.get_by_role("button", name="Deploy", exact=True).click()
    expect(engine.locator(".pill")).to_have_text("ready", timeout=SLOW_MS)
    return made


def chat_and_vote(page: Page, http: httpx.Client, made: str) -> None:
    """Ask the new model and its base the same, prefer the new one's answer, and make data of that."""
    go_to(page, "Playground")
    choose(page, "Model", made)
    choose(page, "Compare with", "tiny")
    ask(page, "Dose 3?")
    answers = page.locator(".answer")
    expect(answers).to_have_count(2)
    for answer in answers.all():
        expect(answer.locator(".answer-head")).to_contain_text(re.compile(r"\d+ tokens"), timeout=SLOW_MS)
    expect(answers.first.locator(".said")).to_contain_text("Two a day.")
    page.get_by_role("button", name="The left one").click()
    expect(page.get_by_text(f"You prefer {made}")).to_be_visible()
    page.get_by_role("button", name="Export votes").click()
    page.wait_for_url(re.compile("/data/file-"))
    expect(page.locator(".job-status .pill")).to_have_text("processed", timeout=60_000)
    rows = http.get(f"/files/{page.url.rsplit('/', 1)[1]}/content").text.splitlines()
    ours: list[dict[str, Any]] = [row for row in map(json.loads, rows) if "Dose 3?" in json.dumps(row)]
    assert len(ours) == 1
    assert "Two a day." in json.dumps(ours[0]["chosen"])
    assert "Two a day." not in json.dumps(ours[0]["rejected"])
    page.get_by_role("link", name="New job with it").click()
    choose(page, "Method", "reward")
    expect(page.get_by_text("Its rows are")).to_have_count(0)


def make_use_and_revoke_a_key(page: Page, stack: Stack) -> None:
    """A key works from the moment it is made until it is revoked."""
    go_to(page, "Admin")
    page.get_by_role("button", name="New key").click()
    page.get_by_label("Name").fill("of the story")
    page.get_by_role("button", name="Make the key").click()
    key = page.get_by_label("The new key").inner_text().strip()
    page.get_by_role("button", name="Done").click()

    def status() -> int:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.get(f"{stack.url}/models", headers=headers, trust_env=False).status_code

    assert status() == 200
    row = panel(page, "Keys").get_by_role("row").filter(has_text="of the story")
    row.get_by_role("button", name="Revoke").click()
    page.get_by_role("button", name="Revoke the key").click()
    expect(row).to_contain_text("revoked")
    assert status() == 401
