"""The report in headless Chromium: no errors, no requests, filters, search, dark, narrow and paper."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from evals.comparison.results import Cost
from evals.comparison.scores import Scores
from evals.promotion.gate import judge
from evals.report.page import Background, write_report
from evals.report.samples import EXAMPLES
from flows.lineage.drawing import drawing
from flows.lineage.rows import Row
from tests.conftest import BROWSERS
from tests.support.scored import results, row

pytestmark = pytest.mark.browser

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
DOMAINS = ("a", "b", "g")
DRAWN = 45
NASTY = "</script><script>alert(1)</script><img src='http://127.0.0.1:9/x' onerror='alert(2)'>"
LONG = "word " * 300
# (student, everyone else) of an example by its number modulo 5; the outcome a reader would give it.
PATTERN = {0: (1.0, 1.0), 1: (0.0, 0.0), 2: (0.0, 1.0), 3: (1.0, 0.0), 4: (0.5, 1.0)}
WANTED = {"lost": {2, 4}, "gained": {3}, "all-right": {0}, "all-wrong": {1}, "": {0, 1, 2, 3, 4}}
# A4 on its side less the margins, in pixels of 1/96 inch.
PAPER = {"width": 1030, "height": 700}


def _sheet(name: str, domain: str) -> Scores:
    rows = []
    for number in range(DRAWN):
        score = PATTERN[number % 5][name != "student"]
        one = row(number, score, (score, 0.0))
        greedy = one["greedy"] | {"completion": f"{name} wrote {domain}{number}"}
        if name == "student" and number in (3, 7):
            greedy["completion"] = NASTY if number == 3 else LONG
        prompt: Any = f"ask {domain}{number};"
        if domain == "b":
            prompt = [{"role": "user", "content": prompt}]
        rows.append(one | {"greedy": greedy, "prompt": prompt})
    return Scores(domain, "held_out", rows)


def _curve(step: int) -> dict[str, Any]:
    return {"step": step, "values": {f"rl/metric {index}": step / (1 + index) for index in range(14)}}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of five checkpoints and a baseline on three domains; nobody teaches the last one."""
    plain = results()
    names = (*plain.checkpoints, "baselines/ties")
    pairs = [(name, domain) for name in names for domain in DOMAINS]
    cells = {(name, domain, "held_out"): dict.fromkeys((0, 1), _sheet(name, domain)) for name, domain in pairs}
    costs = {name: Cost(1000.0, 10.0 * (1 + index), 2**30) for index, name in enumerate(names)}
    whole = dataclasses.replace(plain, checkpoints=names, cells=cells, costs=costs)
    rows = [Row("k0", "base", "pretrain", 0, {}, True, "d0")]
    rows += [Row(f"k{i}", f"experts/{i}", "rl", 0, {"start": "k0"}, True, f"d{i}") for i in (1, 2)]
    background = Background(
        curves={f"experts/a@{seed}": [_curve(step) for step in range(200)] for seed in (0, 1)},
        drawing=f'<div class="lineage">{drawing(rows)}</div>',
        lineage=[{"checkpoint": row.name, "digest": "0123456789abcdef" * 2} for row in rows],
        scoring=dict.fromkeys(names, Cost(500.0, 5.0, 2**29)),
    )
    path = tmp_path_factory.mktemp("report") / "report.html"
    return write_report(path, whole, judge(whole, 0.08, 0.05), background)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, or whatever of its kind is on the PATH."""
    found = next(filter(None, map(shutil.which, BROWSERS)))
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=found, headless=True, args=FLAGS)


@pytest.fixture
def page(browser: Browser, report: Path) -> Iterator[Page]:
    """The report, opened; what a page must never do fails the test at its end."""
    opened = browser.new_page(viewport={"width": 1200, "height": 900})
    amiss: list[str] = []
    opened.on("console", lambda message: amiss.append(f"console: {message.text}"))
    opened.on("pageerror", lambda error: amiss.append(f"error: {error}"))
    opened.on("dialog", lambda dialog: amiss.append(f"dialog: {dialog.message}"))
    opened.on("request", lambda request: amiss.append(request.url) if request.url != report.as_uri() else None)
    opened.goto(report.as_uri())
    yield opened
    opened.close()
    assert amiss == []


def _shown(page: Page) -> set[tuple[str, int]]:
    """Domain and number of the rows that take up space."""
    prompts = page.evaluate(
        """[...document.querySelectorAll(".samples tbody tr")].filter((row) => row.getClientRects().length)
        .map((row) => row.querySelector("pre").textContent)"""
    )
    names = [prompt.removeprefix("user: ").removeprefix("ask ").rstrip(";") for prompt in prompts]
    return {(name[0], int(name[1:])) for name in names}


def _expected(domain: str, outcome: str) -> set[tuple[str, int]]:
    return {
        (own, number)
        for own in DOMAINS
        for number in range(EXAMPLES)
        if domain in ("", own) and number % 5 in WANTED[outcome] and not (own == "g" and outcome in ("lost", "gained"))
    }


def test_it_opens_whole_and_what_models_say_is_text(page):
    assert page.locator("tr", has_text=NASTY).count() == len(DOMAINS)
    assert page.locator("main script, main img").count() == 0
    assert page.locator("h2").all_text_contents()[:3] == ["Gate", "Scores", "Merges of the same experts"]
    assert {"Cost", "Training", "Lineage", "Samples"} <= set(page.locator("h2").all_text_contents())
    assert page.locator(".domain h3 small").first.text_content() == f"{EXAMPLES} of {DRAWN} examples"


def test_the_first_screen_has_verdict_weakest_domain_and_what_next_and_folds_the_rest(page):
    page.set_viewport_size({"width": 1280, "height": 800})
    assert page.locator(".status").text_content().startswith("Not promoted, ")
    assert page.locator(".goodness").text_content().startswith("Student has ")
    assert page.locator(".domains tbody tr").count() == len(DOMAINS) + 1
    assert page.locator(".domains .mark").count() == 1
    assert {"Weakest domain", "Failed", "What next"} == set(page.locator(".first h3").all_text_contents())
    bottom = page.evaluate("document.querySelector('#summary').getBoundingClientRect().bottom")
    assert 0 < bottom <= 800 and page.locator("details.part[open]").count() == 0
    assert page.locator(".samples:visible").count() == 0


def test_a_link_into_the_page_opens_its_section(page):
    page.evaluate("location.hash = '#samples'")
    page.wait_for_selector("#samples[open]")
    assert page.locator("details.part[open]").count() == 1 and page.locator("[name=text]").is_visible()


def test_filters_show_exactly_the_rows_they_should(page):
    page.click("#samples > summary")
    for domain in ("", *DOMAINS):
        page.select_option("[name=domain]", domain)
        for outcome in WANTED:
            page.select_option("[name=outcome]", outcome)
            wanted = _expected(domain, outcome)
            assert _shown(page) == wanted, (domain, outcome)
            assert page.text_content("output") == f"{len(wanted)} of {3 * EXAMPLES} examples shown"
    page.select_option("[name=domain]", "g")
    page.select_option("[name=outcome]", "lost")
    assert page.locator(".domain:visible").count() == 0


def test_search_looks_in_prompts_answers_and_completions(page):
    page.click("#samples > summary")
    page.fill("[name=text]", "  ASK B12; ")
    assert _shown(page) == {("b", 12)}
    page.fill("[name=text]", "experts/b wrote b3")
    assert _shown(page) == {("b", n) for n in (3, *range(30, 40))}
    page.select_option("[name=outcome]", "gained")
    assert _shown(page) == {("b", 3), ("b", 33), ("b", 38)}
    page.press("[name=text]", "Enter")
    assert page.url.endswith("report.html")
    page.select_option("[name=outcome]", "")
    page.fill("[name=text]", "correct")
    assert _shown(page) == set() and page.text_content("output") == f"0 of {3 * EXAMPLES} examples shown"


@pytest.mark.parametrize("width", [400, 1200])
def test_dark_and_narrow_pages_are_legible(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    for scheme, dark in (("light", False), ("dark", True)):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        lightness = page.evaluate(
            """() => {
              const light = (element, name) => getComputedStyle(element)[name].match(/\\d+/g).slice(0, 3)
                .reduce((sum, part) => sum + Number(part), 0) / 765;
              const of = (selector) => document.querySelector(selector);
              return [light(document.body, "backgroundColor"), light(document.body, "color"),
                light(of(".lineage .box"), "fill"), light(of(".lineage .name"), "fill"),
                light(of(".samples td.right"), "backgroundColor"), light(of(".samples td.right .mark"), "color")];
            }"""
        )
        for ground, ink in zip(lightness[::2], lightness[1::2], strict=True):
            assert abs(ink - ground) > 0.35 and (ink > ground) is dark


def test_paper_shows_everything_that_is_folded_or_filtered_away(page):
    page.click("#samples > summary")
    page.fill("[name=text]", "nothing says this")
    assert _shown(page) == set()
    page.click("#samples > summary")
    page.set_viewport_size(PAPER)
    page.emulate_media(media="print", color_scheme="dark")
    assert _shown(page) == _expected("", "")
    assert not page.is_visible(".filters") and page.locator("details[open]").count() == 0
    heights = page.eval_on_selector_all(
        "details > :not(summary, form)", "all => all.map((one) => one.checkVisibility({ contentVisibilityAuto: true }))"
    )
    assert len(heights) > 5 and all(heights)
    cut = page.eval_on_selector_all(
        "table, svg", "all => all.filter((one) => one.getBoundingClientRect().right > innerWidth).length"
    )
    assert cut == 0
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_without_javascript_all_rows_are_readable(browser, report):
    context = browser.new_context(java_script_enabled=False)
    plain = context.new_page()
    plain.goto(report.as_uri())
    plain.click("#samples > summary")
    assert plain.locator(".samples tbody tr:visible").count() == 3 * EXAMPLES
    assert not plain.is_visible(".filters")
    context.close()
