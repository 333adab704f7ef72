"""Chromium for a test, and the login of Prefect's pages."""

import contextlib
import shutil
from collections.abc import Iterator

from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.conftest import BROWSERS

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
# For a machine that is busy with other tests.
PATIENCE = 240_000


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser."""
    with sync_playwright() as playwright:
        found = next(path for name in BROWSERS if (path := shutil.which(name)))
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def fresh_page(browser: Browser) -> Iterator[Page]:
    """A page of a browser that knows nothing yet."""
    context = browser.new_context(viewport={"width": 1400, "height": 1400})
    context.set_default_timeout(PATIENCE)
    context.set_default_navigation_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    try:
        yield context.new_page()
    finally:
        context.close()


def log_in(page: Page, password: str) -> None:
    """Give Prefect's login page a password."""
    page.get_by_placeholder("admin:pass").fill(password)
    page.get_by_role("button", name="Login").click()
