"""Admin: keys made once shown and revoked, a machine drained and back, storage, and who sees none of it."""

import httpx
from playwright.sync_api import Page, expect

from tests.browser.conftest import Dashboard
from tests.browser.steps import panel
from tests.stack import Stack


def models_status(stack: Stack, key: str) -> int:
    answer = httpx.get(f"{stack.url}/models", headers={"Authorization": f"Bearer {key}"}, trust_env=False)
    return answer.status_code


def test_a_key_is_made_shown_once_used_and_revoked(dashboard: Dashboard, page: Page, stack: Stack) -> None:
    dashboard.log_in(page, at="/admin")
    page.get_by_role("button", name="New key").click()
    expect(page.get_by_role("button", name="Make the key")).to_be_disabled()
    page.get_by_label("Name").fill("a notebook")
    page.get_by_role("button", name="Make the key").click()
    shown = page.get_by_label("The new key")
    key = shown.inner_text().strip()
    assert key.startswith("rsd_user_")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_text("Copied.")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == key
    page.get_by_role("button", name="Done").click()
    expect(shown).to_have_count(0)
    page.reload()
    row = panel(page, "Keys").get_by_role("row").filter(has_text="a notebook")
    expect(row).to_contain_text("not yet")
    assert key not in page.content()
    assert models_status(stack, key) == 200
    row.get_by_role("button", name="Revoke").click()
    page.get_by_role("button", name="Keep it").click()
    assert models_status(stack, key) == 200
    row.get_by_role("button", name="Revoke").click()
    page.get_by_role("button", name="Revoke the key").click()
    expect(row).to_contain_text("revoked")
    assert models_status(stack, key) == 401
    expect(row.get_by_role("button")).to_have_count(0)


def test_the_last_admin_key_stays(dashboard: Dashboard, page: Page) -> None:
    dashboard.log_in(page, at="/admin")
    row = panel(page, "Keys").get_by_role("row").filter(has_text="admin.key")
    row.get_by_role("button", name="Revoke").click()
    page.get_by_role("button", name="Revoke the key").click()
    expect(page.get_by_role("alert").filter(has_text="last")).to_be_visible()
    expect(row).to_contain_text("active")


def test_a_machine_is_drained_and_takes_work_again(dashboard: Dashboard, page: Page, stack: Stack) -> None:
    dashboard.log_in(page, at="/admin")
    machine = page.locator("section.panel").filter(has_text="slot:0")
    with stack.http() as http:
        page.get_by_role("button", name="Drain", exact=True).click()
        page.get_by_role("button", name="Drain the machine").click()
        expect(machine.locator(".pill").first).to_have_text("draining")
        assert http.get("/nodes").json()["data"][0]["state"] == "draining"
        machine.get_by_role("button", name="Undrain").click()
        expect(machine.locator(".pill").first).to_have_text("active")
        assert http.get("/nodes").json()["data"][0]["state"] == "active"


def test_storage_is_told_in_numbers_and_as_a_bar(dashboard: Dashboard, page: Page, stack: Stack) -> None:
    dashboard.log_in(page, at="/admin")
    storage = panel(page, "Storage")
    expect(storage).to_contain_text(" free of ")
    expect(storage.locator("dd").first).not_to_have_text("0 B")  # models: one is there
    widths = storage.locator(".meter").evaluate("bar => [...bar.children].map(part => part.offsetWidth)")
    with stack.http() as http:
        found = http.get("/storage").json()
    box = storage.locator(".meter").bounding_box()
    assert box
    assert abs(sum(widths) / box["width"] - (1 - found["free_bytes"] / found["total_bytes"])) < 0.05


def test_a_users_key_is_told_that_this_is_for_admins(dashboard: Dashboard, page: Page, stack: Stack) -> None:
    with stack.http() as http:
        made = http.post("/keys", json={"name": "a user", "role": "user"}).json()
    dashboard.log_in(page, at="/admin", key=made["key"])
    expect(page.get_by_text("This page is for admins")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(panel(page, "Keys")).to_have_count(0)


def test_the_page_fits_a_narrow_screen(dashboard: Dashboard, page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    dashboard.log_in(page, at="/admin")
    expect(panel(page, "Storage")).to_contain_text(" free of ")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
