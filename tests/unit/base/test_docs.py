"""The pages people read: links lead somewhere, files that are named exist, the README is short."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGES = sorted(
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# In code spans: a file of ours.
NAMED = re.compile(r"`((?:flows|evals|stages|experts|base|tests|studies|benchmarks|examples|docs)/[\w/]+\.\w+)`")


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    lost = []
    for link in LINK.findall(page.read_text()):
        place, _, anchor = link.partition("#")
        target = page.parent / place if place else page
        if not link.startswith("http") and (not target.exists() or (anchor and anchor not in anchors(target))):
            lost.append(link)
    assert lost == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    assert [name for name in NAMED.findall(page.read_text()) if not (ROOT / name).exists()] == []


def test_the_readme_is_read_in_ten_minutes() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1200


def test_every_room_stands_in_the_architecture() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {
        str(path.parent.relative_to(ROOT))
        for package in ("flows", "evals", "stages", "experts", "base")
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert {room for room in rooms if f"`{room}`" not in page} - {"flows", "evals", "stages", "experts"} == set()
