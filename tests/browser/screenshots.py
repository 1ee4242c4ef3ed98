"""`make screenshots`: every page at two widths, light and dark, of a service that has something to show.

`python -m tests.browser.screenshots FOLDER [--docs DIR]` starts its own service on the tiny model. With
`--docs`, the pictures that the README shows are written to DIR too.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.browser.conftest import ARGS, CHROMIUM, PATIENCE_MS, Dashboard, start_dashboard
from tests.browser.steps import ask, lines
from tests.stack import start_stack, wait_for
from tests.tiny import ADVICE, SYMPTOMS, build_model, chat_rows

WIDTHS = {1280: 800, 390: 844}
SLOW_MS = 300_000
# Which pictures the README shows: under these names, wide.
FOR_DOCS = {
    "job": "light",
    "jobs": "dark",
    "new": "light",
    "file-tokens": "light",
    "pipeline": "dark",
    "playground": "light",
}
DOCUMENTS = [{"text": f"About {what}: {advice}. " * 6} for what in SYMPTOMS for advice in ADVICE]
PAIRS = [
    {"prompt": row["messages"][0]["content"], "chosen": row["messages"][1]["content"], "rejected": "No idea."}
    for row in chat_rows(64)
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--docs", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=PATIENCE_MS)
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "tiny"
        build_model(model)
        stack = start_stack(Path(name) / "home", import_dirs=[model], workers=1)
        process, url = start_dashboard(stack.url.removesuffix("/v1"), Path(name) / "dashboard.log")
        try:
            stack.import_model(model, model_id="clinic-base")
            with stack.http() as http, sync_playwright() as playwright:
                shown = fill(http)
                browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
                dashboard = Dashboard(url, stack, Path(name) / "dashboard.log")
                take_all(browser, dashboard, shown, options.folder)
                browser.close()
        finally:
            process.terminate()
            process.wait(timeout=60)
            stack.stop()
    if options.docs:
        options.docs.mkdir(parents=True, exist_ok=True)
        for picture, theme in FOR_DOCS.items():
            shutil.copy(options.folder / f"{picture}-1280-{theme}.png", options.docs / f"{picture}.png")


@dataclass
class Shown:
    """What the pages are of."""

    done: str
    fails: str
    runs: str
    model: str
    other: str
    file: str
    faulty: str
    pipeline: str


def fill(http: httpx.Client) -> Shown:
    """Files, jobs in each state, a pipeline, votes and keys."""
    rows = chat_rows(240)
    broken = [json.dumps(row) for row in rows[:40]]
    broken[6], broken[17] = '{"mesages": []}', '{"messages": [{"role": "doctor", "content": "Rest."}]}'
    broken[30:32] = [broken[3], '{"messages": [{"role": "user", "content": ""}]}']
    file = upload(http, lines(rows), name="clinic-chats.jsonl")
    upload(http, lines(PAIRS), name="preferred-answers.jsonl")
    upload(http, lines(DOCUMENTS), name="leaflets.jsonl")
    faulty = put(http, lines(broken), name="night-shift.jsonl")
    bad = train(http, faulty, suffix="night-shift", n_epochs=1)  # before its check tells
    done = train(http, file, suffix="v1", n_epochs=12, learning_rate=0.003, use_peft=False)
    again = train(http, file, suffix="v2", n_epochs=6, learning_rate=0.01)
    wait_for(lambda: status(http, again) == "succeeded", within_s=600, what="two jobs")
    for name, role in (("nightly evaluation", "user"), ("ward tablet", "user"), ("on call", "admin")):
        http.post("/keys", json={"name": name, "role": role})
    steps = {"n_epochs": 40, "batch_size": 8, "max_length": 64, "logging_steps": 1}
    stages = [stage("dapt", "pretraining", "leaflets.jsonl", "clinic-base", n_epochs=3)]
    stages += [stage("chat", "supervised", "clinic-chats.jsonl", {"stage": "dapt"}, **steps)]
    stages += [stage("taste", "reward", "preferred-answers.jsonl", {"stage": "chat"})]
    stages += [stage("prefer", "dpo", "preferred-answers.jsonl", {"stage": "chat"})]
    names = {row["filename"]: row["id"] for row in http.get("/files").json()["data"]}
    for one in stages:
        one["training_file"] = names[one["training_file"]]
    pipeline = http.post("/pipelines", json={"name": "clinic assistant", "stages": stages})
    assert pipeline.status_code == 200, pipeline.text
    jobs = wait_for(lambda: jobs_of(http, pipeline.json()["id"], at_least=2), within_s=300, what="stages")
    runs = next(job for name, job in jobs.items() if name == "chat")
    train(http, file, suffix="v3", n_epochs=3)
    wait_for(lambda: last_step(http, runs) >= 30, within_s=300, what="thirty steps")
    model, other = (http.get(f"/fine_tuning/jobs/{job}").json()["fine_tuned_model"] for job in (done, again))
    return Shown(done, bad, runs, model, other, file, faulty, pipeline.json()["id"])


def stage(name: str, method: str, file: str, model: Any, **hyperparameters: Any) -> dict[str, Any]:
    """A stage of a pipeline."""
    asked = {"type": method, method: {"hyperparameters": hyperparameters}}
    return {"name": name, "model": model, "training_file": file, "method": asked}


def jobs_of(http: httpx.Client, pipeline_id: str, *, at_least: int) -> dict[str, str]:
    """The jobs of a pipeline by the names of their stages; none before there are so many."""
    stages = http.get(f"/pipelines/{pipeline_id}").json()["stages"]
    found = {stage["name"]: stage["job_id"] for stage in stages if stage.get("job_id")}
    return found if len(found) >= at_least else {}


def put(http: httpx.Client, body: bytes, *, name: str) -> str:
    """A file that is not checked yet; its id."""
    answer = http.put("/files", params={"filename": name, "purpose": "fine-tune"}, content=body)
    return answer.json()["id"]


def upload(http: httpx.Client, body: bytes, *, name: str) -> str:
    """A checked file; its id."""
    file_id = put(http, body, name=name)
    wait_for(lambda: http.get(f"/files/{file_id}").json()["status"] != "uploaded", within_s=100, what="check")
    return file_id


def train(http: httpx.Client, file_id: str, *, suffix: str, **hyperparameters: Any) -> str:
    """A supervised job; its id."""
    wanted = {"batch_size": 8, "max_length": 64, "logging_steps": 1, "eval_steps": 60} | hyperparameters
    wanted |= {"eval_prompts": ["Patient 3 has a rash. What now?"], "validation_split_percentage": 5}
    method = {"type": "supervised", "supervised": {"hyperparameters": wanted}}
    asked = {"model": "clinic-base", "training_file": file_id, "suffix": suffix, "method": method}
    answer = http.post("/fine_tuning/jobs", json=asked)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def status(http: httpx.Client, job_id: str) -> str:
    """Where a job stands."""
    return http.get(f"/fine_tuning/jobs/{job_id}").json()["status"]


def last_step(http: httpx.Client, job_id: str) -> int:
    """The last step that was measured."""
    return http.get(f"/fine_tuning/jobs/{job_id}/curves").json()["last_step"] or 0


def take_all(browser: Browser, dashboard: Dashboard, shown: Shown, folder: Path) -> None:
    """Every page, wide and narrow, light and dark."""
    pages: dict[str, tuple[str, Callable[[Page], None]]] = {
        "overview": ("/", settled),
        "jobs": ("/jobs", compare),
        "job": (f"/jobs/{shown.runs}", drawn),
        "job-done": (f"/jobs/{shown.done}", lambda page: tab(page, "Samples")),
        "job-failed": (f"/jobs/{shown.fails}", settled),
        "new": (f"/new?file={shown.file}", settled),
        "new-advanced": (f"/new?file={shown.file}", lambda page: page.get_by_text("Advanced").click()),
        "pipelines": ("/pipelines", settled),
        "pipeline": (f"/pipelines/{shown.pipeline}", settled),
        "pipeline-new": ("/pipelines/new", settled),
        "data": ("/data", settled),
        "file": (f"/data/{shown.faulty}", settled),
        "file-tokens": (f"/data/{shown.file}", tokens),
        "models": ("/models", settled),
        "model": (f"/models/{shown.model}", settled),
        "playground": (f"/playground?model={shown.model}&other={shown.other}", talk),
        "admin": ("/admin", settled),
    }
    for width, height in WIDTHS.items():
        for theme in ("light", "dark"):
            context = browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme="light" if theme == "light" else "dark",
            )
            context.set_default_timeout(PATIENCE_MS)
            page = context.new_page()
            page.goto(f"{dashboard.url}/login")
            page.screenshot(path=folder / f"login-{width}-{theme}.png")
            dashboard.log_in(page)
            for name, (path, prepare) in pages.items():
                page.goto(dashboard.url + path)
                expect(page.get_by_role("heading", level=1)).to_be_visible()
                prepare(page)
                settled(page)
                whole = page.evaluate("document.documentElement.scrollHeight")
                page.set_viewport_size({"width": width, "height": max(height, min(whole, 2400))})
                page.wait_for_timeout(300)
                page.screenshot(path=folder / f"{name}-{width}-{theme}.png")
                page.set_viewport_size({"width": width, "height": height})
            context.close()


def settled(page: Page) -> None:
    """Nothing is a placeholder any more and the animations have ended."""
    expect(page.locator(".skeleton:visible")).to_have_count(0)
    page.wait_for_timeout(900)


def drawn(page: Page) -> None:
    """The first curve is there."""
    expect(page.locator("section.panel svg path[stroke-linejoin=bevel]").first).to_be_visible()


def compare(page: Page) -> None:
    """Two jobs in one chart."""
    settled(page)
    for box in page.get_by_role("row").filter(has_text="succeeded").get_by_role("checkbox").all()[:2]:
        box.click()
    drawn(page)


def tab(page: Page, name: str) -> None:
    """Another tab of a job."""
    page.get_by_role("tab", name=name).click()


def tokens(page: Page) -> None:
    """A row as a model sees it."""
    page.get_by_role("button", name="Show tokens").click()
    expect(page.locator("pre.tokens")).to_be_visible(timeout=SLOW_MS)
    expect(page.get_by_text("being counted")).to_have_count(0, timeout=SLOW_MS)


def talk(page: Page) -> None:
    """One question, two answers."""
    page.get_by_text("Parameters").click()
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_label("Most tokens").fill("24")
    page.get_by_text("Parameters").click()
    ask(page, "Patient 12 has back pain and a rash. What now?")
    expect(page.locator(".answer")).to_have_count(2)
    for answer in page.locator(".answer").all():
        expect(answer.locator(".answer-head")).to_contain_text("tokens", timeout=SLOW_MS)


if __name__ == "__main__":
    main()
