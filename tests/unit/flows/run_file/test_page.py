"""`docs/run-file.md` is what the schema says, and says all of it."""

import importlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from evals.config.claims import HypothesisConfig
from experts.loading import KINDS
from flows.run_file import page, page_words
from flows.run_file.keys import inner_models, schema_keys, type_of
from flows.run_file.notify import NotifyConfig
from flows.run_file.page import page_rows, run_file_page
from flows.run_file.schema import RunConfig
from stages.config.distill import DistillConfig
from stages.config.harness import HarnessConfig
from stages.config.merge import WeightMergeConfig

PAGE = Path(__file__).parents[4] / "docs" / "run-file.md"
HEAVY = ("torch", "prefect", "mlflow", "transformers", "datasets", "reasoning_gym")


@pytest.fixture(scope="module")
def text() -> str:
    return run_file_page()


def sections(text: str) -> dict[str, str]:
    """Heading, as text -> what stands below it."""
    found = re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", text, flags=re.MULTILINE)
    assert len({heading for heading, _ in found}) == len(found)
    return {heading.replace("`", ""): body for heading, body in found}


def keys_of(body: str) -> list[str]:
    return re.findall(r"^\| `(\w+)` \|", body, flags=re.MULTILINE)


def row(text: str, heading: str, key: str) -> list[str]:
    [line] = re.findall(rf"^\| `{key}` \|.*$", sections(text)[heading], flags=re.MULTILINE)
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def schema_places() -> Iterator[tuple[str, str]]:
    """Every key of the schema: the dotted place it stands at, and its name."""
    for key, _, _ in schema_keys(RunConfig):
        place, _, name = key.removesuffix(".NAME").rpartition(".")
        if place != "merge.objective":
            yield place or "Top level", name
    for one in inner_models(DistillConfig.model_fields["objective"].annotation):
        yield from ((f"merge.objective (type: {type_of(one)})", name) for name in one.model_fields)
    for kind, module in KINDS.items():
        options = importlib.import_module(module).Options
        yield from ((f"domains.NAME.options (kind: {kind})", name) for name in options.model_fields)
    yield from (("merge.baselines.NAME (weight merges)", name) for name in WeightMergeConfig.model_fields)


def tables_of(place: str, written: dict[str, str]) -> list[str]:
    """The headings of the sections that have a place's keys: its own, then those it names."""
    own = place if place in written else place.rpartition(".")[2]
    if own != place:
        assert f"`{place}`" in written[own], f"{own} does not say that it stands at {place}"
    line = re.search(r"^The keys of .* belong here too\.", written[own], flags=re.MULTILINE)
    return [own, *(name.replace("`", "") for name in re.findall(r"\[([^\]]*)\]\(", line[0] if line else ""))]


def test_the_committed_page_is_that_of_the_schema(text):
    assert PAGE.read_text(encoding="utf-8") == text, "the schema has changed: make docs"


def test_each_key_is_in_one_row_of_the_table_that_holds_at_its_place(text):
    written = sections(text)
    del written["Contents"]
    found = set()
    for place, name in schema_places():
        holding = [heading for heading in tables_of(place, written) if name in keys_of(written[heading])]
        assert holding, f"{place}.{name} is in no table"
        found.add((holding[0], name))
    rows = [(heading, name) for heading, body in written.items() for name in keys_of(body)]
    assert [each for each, times in Counter(rows).items() if times > 1] == []
    assert set(rows) == found, "rows that no key of the schema needs"
    assert page_rows() == {heading: keys_of(body) for heading, body in written.items()}


def test_every_field_has_a_description_and_every_model_a_docstring():
    models = [section.model for section in page._Page().sections]
    assert {RunConfig, HypothesisConfig, HarnessConfig, NotifyConfig, WeightMergeConfig} <= set(models)
    assert [model for model in models if not (model.__doc__ or "").strip()] == []
    assert [
        f"{model.__name__}.{name}"
        for model in models
        for name, field in model.model_fields.items()
        if not (field.description or "").endswith(".")
    ] == []


def test_links_lead_to_headings(text):
    anchors = [
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    ]
    assert len(set(anchors)) == len(anchors)
    links = set(re.findall(r"\]\(#([^)]*)\)", text))
    assert links <= set(anchors) and set(anchors) - links == {"the-run-file", "contents"}


@pytest.mark.parametrize(
    ("heading", "key", "type_text", "default"),
    [
        ("Top level", "name", "text of at most 100 characters that matches `^[A-Za-z0-9][A-Za-z0-9_.-]*$`", "required"),
        ("Top level", "seeds", "list of 1 to 100, each integer 0 to 4,294,967,295", "`[0]`"),
        ("Top level", "domains", "map of at least one name → [`domains.NAME`](#domainsname)", "required"),
        ("Top level", "merge", "`null` or [`merge`](#merge)", "`null`"),
        ("Top level", "chat_template_kwargs", "map of name → any value", "`{}`"),
        ("base.pretrain", "optimizer", "[`optimizer`](#optimizer)", None),
        ("base.pretrain", "lora", "`null`", "`null`"),
        ("base.pretrain", "domains", "`all` or list of at least 1 text", "`all`"),
        ("optimizer", "betas", "list of 2, each number ≥ 0 and < 1", "`[0.9, 0.98]`"),
        ("optimizer", "learning_rate", "number > 0 and ≤ 1", "`0.001`"),
        ("sampler", "memory_share", "share > 0 and < 1", "`0.4`"),
        ("health", "min_improvement", "number > 0", "`0.01`"),
        ("All on-policy stages", "stop", "list, each text of 1 to 100 characters", "`[]`"),
        ("merge", "domain_weights", "map of name → number 0.000001 to 1,000,000", "`{}`"),
        ("merge", "method", "one of `mopd`, `command`", "`mopd`"),
        ("evaluate", "expert_panel", "`null`, `all` or list of text", "`null`"),
        ("hypotheses.NAME", "note", "text", "`''`"),
        ("hypotheses.NAME.tests.NAME", "compare", "`null` or list of 2 texts", "`null`"),
        ("resources", "timeout_minutes", "number > 0 and ≤ 525,600", "`120`"),
        ("domains.NAME.options (kind: judge)", "rubric", "text of at least 1 character", "required"),
        ("domains.NAME.options (kind: judge)", "parallel", "integer ≥ 1", "`8`"),
        ("domains.NAME.options (kind: reasoning)", "partial", "`true` or `false`", "`false`"),
    ],
)
def test_types_and_defaults_read_as_a_person_says_them(text, heading, key, type_text, default):
    _, given, value, _ = row(text, heading, key)
    assert given == type_text
    assert value == (default or "`{learning_rate: 0.006, schedule: cosine, warmup_steps: 20}`")


def test_keys_of_other_schemas_name_what_they_leave_out(text):
    assert row(text, "merge", "variants")[1].endswith("[`merge`](#merge) without `baselines`, `rounds` and `variants`")
    assert "`method`, `command`, `start_from`," in row(text, "merge.baselines", "seqkd")[1]
    assert row(text, "merge.baselines.NAME (weight merges)", "method")[2] == "the baseline's NAME; not a key"
    assert all(f"[`{kind}`]" in row(text, "domains.NAME", "options")[1] for kind in KINDS)


class _Inner(BaseModel):
    """A | B.

    More.
    """

    deep: int = Field(3, description="x.")


def test_text_of_the_schema_is_no_markup_beyond_its_code():
    assert page_words.prose("a | b `c | d`, <e> *f* `g`.\n\nh") == r"a \| b `c ¦ d`, &lt;e&gt; \*f\* `g`."
    assert page_words.prose(_Inner.__doc__) == r"A \| B."
    assert [page_words.in_yaml(each) for each in (_Inner(), _Inner(deep=4), (1, 2), None, 1e-3, "")] == [
        "{}",
        "{deep: 4}",
        "[1, 2]",
        "null",
        "0.001",
        "''",
    ]
    assert [page_words.figure(each) for each in (0, 1e-6, 0.5, 1e6, 31536000.0)] == [
        "0",
        "0.000001",
        "0.5",
        "1,000,000",
        "31,536,000",
    ]


def test_the_page_needs_nothing_heavy():
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from flows.run_file.page import run_file_page; run_file_page()\n"
            f"print([name for name in {HEAVY} if name in sys.modules])",
        ],
        cwd=PAGE.parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"
