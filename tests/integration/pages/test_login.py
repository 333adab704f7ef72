"""A person gets into Prefect's pages with the home's secret, in headless Chromium, and only with it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from flows.servers import start as servers
from flows.servers.access import home_secret
from tests.support.browsing import PATIENCE, chromium, fresh_page, log_in
from tests.support.processes import standing

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[servers.Server]:
    with standing(servers.start_prefect, home, 24100) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with fresh_page(browser) as page:
        yield page


def test_the_secret_opens_the_pages_once_for_a_browser(page, server, home):
    page.goto(f"{server.url}/deployments", timeout=PATIENCE)
    log_in(page, "mopd:wrong")
    expect(page.get_by_text("Authentication failed.").first).to_be_visible()
    log_in(page, home_secret(home))
    page.wait_for_url(lambda url: "/login" not in url)
    with page.expect_response(lambda answer: "/api/deployments/" in answer.url) as answer:
        page.goto(f"{server.url}/deployments", timeout=PATIENCE)
    assert answer.value.status == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/json"])
def test_a_page_of_another_origin_is_refused_by_the_browser_and_by_the_server(page, server, home, kind):
    """The browser was let in before; what it keeps of that is another origin's."""
    page.goto(f"{server.url}/login", timeout=PATIENCE)
    log_in(page, home_secret(home))
    page.wait_for_url(lambda url: "/login" not in url)
    page.route("http://attacker.example/", lambda route: route.fulfill(body="<h1>hello</h1>", content_type="text/html"))
    page.goto("http://attacker.example/")
    asked = """async ([url, kind]) => {
        try {
            const answer = await fetch(url, {method: "POST", headers: {"Content-Type": kind}, body: "{}"});
            return `read ${answer.status}`;
        } catch (error) { return `refused ${error.name}`; }
    }"""
    assert page.evaluate(asked, [f"{server.url}/api/work_pools/", kind]) == "refused TypeError"
