"""What somebody who looks at the pages does again and again."""

import json
from typing import Any

from playwright.sync_api import Locator, Page, expect

_DROP = """([data, name]) => {
  const files = new DataTransfer();
  files.items.add(new File([data], name));
  document.querySelector('.upload .drop').dispatchEvent(
    new DragEvent('drop', {dataTransfer: files, bubbles: true, cancelable: true}));
}"""


def panel(page: Page, title: str) -> Locator:
    """The panel with this heading."""
    return page.locator("section.panel").filter(has=page.get_by_role("heading", name=title, exact=True))


def go_to(page: Page, section: str) -> None:
    """Follow a link of the navigation to its page. Until that stands, the old one can still be clicked."""
    link = page.get_by_role("navigation", name="Pages").get_by_role("link", name=section, exact=True)
    address = str(link.get_attribute("href"))
    link.click()
    page.wait_for_url(f"**{address}")


def choose(page: Page, label: str, option: str) -> None:
    """Take an option of a list."""
    page.get_by_label(label).click()
    page.get_by_role("option", name=option, exact=True).click()
    expect(page.get_by_role("option")).to_have_count(0)


def ask(page: Page, text: str) -> None:
    """Send a message of the playground."""
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()


def lines(rows: list[Any]) -> bytes:
    """Rows as JSONL; texts as they are."""
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode() + b"\n"


def drop(page: Page, data: bytes, *, name: str) -> None:
    """Let a file fall onto the page."""
    expect(page.locator(".upload .drop")).to_be_visible()
    page.evaluate(_DROP, [data.decode(), name])


def uploaded(page: Page, name: str) -> str:
    """The id of a file that this page has sent."""
    link = page.locator(".upload li").filter(has_text=name).get_by_role("link")
    expect(link).to_be_visible()
    return str(link.get_attribute("href")).rsplit("/", 1)[1]
