"""Data and File: uploads from the browser, what the check found, and tokens with their loss mask."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import FilePayload, Page, expect

from tests.browser.conftest import Dashboard
from tests.browser.steps import drop, lines, panel, uploaded
from tests.stack import Stack, wait_for

GOOD = [
    {"messages": [{"role": "user", "content": f"Dose {i}?"}, {"role": "assistant", "content": "Two a day."}]}
    for i in range(20)
]
FAULTY = [json.dumps(row) for row in GOOD]
FAULTY[6] = '{"mesages": []}'


@pytest.fixture(scope="module")
def http(stack: Stack) -> Iterator[httpx.Client]:
    with stack.http() as client:
        yield client


def put(http: httpx.Client, rows: list[Any], *, name: str, **said: str) -> str:
    """A checked training file; its id."""
    answer = http.put(
        "/files", params={"filename": name, "purpose": "fine-tune", **said}, content=lines(rows)
    )
    file_id = answer.json()["id"]
    wait_for(
        lambda: http.get(f"/files/{file_id}").json()["status"] != "uploaded", within_s=100, what="the check"
    )
    return file_id


def test_a_dropped_file_is_stored_and_appears_in_the_list_when_checked(
    dashboard: Dashboard, page: Page, http: httpx.Client
) -> None:
    dashboard.log_in(page, at="/data")
    expect(page.locator(".upload .drop")).to_be_visible()
    drop(page, lines(FAULTY), name="dropped.jsonl")
    file_id = uploaded(page, "dropped.jsonl")
    assert http.get(f"/files/{file_id}/content").content == lines(FAULTY)
    row = page.get_by_role("row").filter(has_text=file_id)
    expect(row.locator(".pill")).to_have_text("error", timeout=60_000)
    expect(row).to_contain_text("did you mean 'messages'?")


def test_what_is_said_of_the_rows_goes_with_the_file(
    dashboard: Dashboard, page: Page, http: httpx.Client
) -> None:
    dashboard.log_in(page, at="/data")
    page.get_by_text("The rows use other names").click()
    page.get_by_label("Format", exact=True).select_option("prompt_completion")
    page.get_by_label("Columns", exact=True).fill('{"prompt": "q", "completion": "a"}')
    page.get_by_label("Rows that may be wrong", exact=True).fill("0.5")
    body = lines([{"q": f"What {i}?", "a": "That."} for i in range(4)])
    chosen = FilePayload(name="mapped.jsonl", mimeType="application/jsonl", buffer=body)
    page.get_by_label("Files to upload").set_input_files([chosen])
    file = http.get(f"/files/{uploaded(page, 'mapped.jsonl')}").json()
    assert file["format"] == "prompt_completion"
    assert file["column_map"] == {"prompt": "q", "completion": "a"}
    assert file["max_invalid_fraction"] == 0.5


def test_a_refused_upload_is_told_beside_its_name(dashboard: Dashboard, page: Page, watched: Any) -> None:
    watched.allowed.append("400")
    dashboard.log_in(page, at="/data")
    page.get_by_text("The rows use other names").click()
    page.get_by_label("Columns", exact=True).fill("prompt=q")
    drop(page, b"{}", name="refused.jsonl")
    expect(page.locator(".upload li").filter(has_text="refused.jsonl")).to_contain_text(
        "'column_map' must be an object of texts"
    )


def test_uploads_ask_for_a_login(dashboard: Dashboard) -> None:
    answer = httpx.put(f"{dashboard.url}/data/upload?filename=x.jsonl", content=b"{}", trust_env=False)
    assert answer.status_code == 401


def test_the_report_tells_line_and_reason_of_each_fault(
    dashboard: Dashboard, page: Page, http: httpx.Client
) -> None:
    file_id = put(http, [*FAULTY, GOOD[2]], name="faulty.jsonl")
    dashboard.log_in(page, at=f"/data/{file_id}")
    fault = panel(page, "Faults").get_by_role("row").filter(has_text="did you mean 'messages'?")
    expect(fault).to_contain_text("7")
    expect(fault).to_contain_text("unknown_key")
    expect(panel(page, "Rows")).to_contain_text("20 of 21 (95 %)")
    expect(panel(page, "Scripts")).to_contain_text("Latin")
    duplicate = panel(page, "Duplicates").get_by_role("row").filter(has_text="the same")
    expect(duplicate).to_contain_text(re.compile(r"21\s*3\s*the same"))


def test_only_the_answer_is_marked_as_trained(dashboard: Dashboard, page: Page, http: httpx.Client) -> None:
    file_id = put(http, GOOD, name="tokens.jsonl")
    dashboard.log_in(page, at=f"/data/{file_id}")
    page.get_by_label("Row", exact=True).fill("3")
    page.get_by_role("button", name="Show tokens").click()
    tokens = page.locator("pre.tokens")
    expect(tokens).to_be_visible(timeout=200_000)
    trained = "".join(tokens.locator(".token.trained").all_inner_texts())
    read = "".join(tokens.locator(".token:not(.trained)").all_inner_texts())
    assert ("Two a day." in trained, "Dose 2?" in trained) == (True, False)
    assert ("Two a day." in read, "Dose 2?" in read) == (False, True)
    expect(page.locator(".histogram").last).to_contain_text("20")


def test_a_deleted_file_is_gone(dashboard: Dashboard, page: Page, http: httpx.Client) -> None:
    file_id = put(http, GOOD, name="away.jsonl")
    dashboard.log_in(page, at=f"/data/{file_id}")
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Delete the file").click()
    page.wait_for_url(f"{dashboard.url}/data")
    assert http.get(f"/files/{file_id}").status_code == 404
