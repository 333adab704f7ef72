"""One rule for paths, and a number of examples that small data can supply."""

from pathlib import Path

import pytest
import yaml

from base.errors import UserError
from experts.domain import HELD_OUT, TRAIN
from experts.loading import load_domain
from flows.run_file.load import load_run_file
from flows.scaffold.add_expert import NewExpert, add_expert
from stages.learner.stage import draw_training, left_out
from tests.unit.experts.test_hub import FIELDS, sums, write
from tests.unit.flows.cli.test_cli import mopd
from tests.unit.flows.run_file.test_config import MINIMAL


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A run file with its data in a folder that is not the working one."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "project" / "data").mkdir(parents=True)
    write(tmp_path / "project" / "data" / "train.jsonl", sums(40))
    write(tmp_path / "project" / "data" / "test.jsonl", [{"question": "9+9?", "answer": 18}])
    return tmp_path / "project"


def run_file(folder, **options):
    web = {"kind": "hub", "options": {"path": "data/train.jsonl", **FIELDS, "held_out_share": 0.3, **options}}
    run = MINIMAL | {"domains": MINIMAL["domains"] | {"sort": web}}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return path


def fingerprint(file, overrides=None):
    entry = load_run_file(file, overrides).domains["sort"]
    return load_domain("sort", entry.kind, entry.options).fingerprint()


def test_paths_of_rows_start_at_the_run_file_as_those_of_kinds_do(project, tmp_path):
    file = run_file(project, held_out_path="data/test.jsonl")
    options = load_run_file(file).domains["sort"].options
    assert options["path"] == str(project / "data" / "train.jsonl")
    assert options["held_out_path"] == str(project / "data" / "test.jsonl")
    overridden = load_run_file(file, ["domains.sort.options.path=data/test.jsonl"]).domains["sort"].options
    assert overridden["path"] == str(project / "data" / "test.jsonl")
    (tmp_path / "child.yaml").write_text("extends: project/run.yaml\nname: child\n")
    child = load_run_file(tmp_path / "child.yaml").domains["sort"].options
    assert child["path"] == str(project / "data" / "train.jsonl")
    given = load_run_file(file, ["domains.sort.options.path=openai/gsm8k"]).domains["sort"].options
    assert given["path"] == "openai/gsm8k"
    absolute = load_run_file(file, [f"domains.sort.options.path={project}/data/test.jsonl"]).domains["sort"].options
    assert absolute["path"] == str(project / "data" / "test.jsonl")


def test_a_fingerprint_holds_no_path(project, tmp_path):
    before = fingerprint(run_file(project, held_out_path="data/test.jsonl"))
    moved = project.rename(tmp_path / "moved")
    assert fingerprint(moved / "run.yaml") == before
    (moved / "data" / "train.jsonl").rename(moved / "rows.jsonl")
    assert fingerprint(moved / "run.yaml", ["domains.sort.options.path=rows.jsonl"]) == before


def test_a_path_that_is_not_there_names_the_rule(project):
    with pytest.raises(
        UserError, match=r"options\.path: no such file '.*gone/x\.jsonl'; a relative path starts at the"
    ):
        fingerprint(run_file(project, path="gone/x.jsonl"))


def test_add_expert_writes_a_path_from_the_run_file(project, tmp_path, monkeypatch):
    file = run_file(project)
    monkeypatch.chdir(project / "data")
    options = ["path=train.jsonl", "prompt_field=question", "answer_field=answer"]
    add_expert(file, NewExpert("web", domain="hub", options=options), tmp_path / "home")
    assert yaml.safe_load(file.read_text())["domains"]["web"]["options"]["path"] == "data/train.jsonl"


class Workspace:
    """The parts of one that the draw needs."""

    seed = 0

    def __init__(self, domain):
        self.domains = {domain.name: domain}


class Config:
    examples = 3000


def test_a_small_file_gives_all_it_has_to_train_on(project):
    entry = load_run_file(run_file(project)).domains["sort"]
    domain = load_domain("sort", entry.kind, entry.options)
    drawn = draw_training(Workspace(domain), Config())["sort"]
    assert len(drawn) == domain.supply(TRAIN) == 40 - domain.supply(HELD_OUT)
    assert 20 < len(drawn) < 36
    assert load_domain("x", "strings", {"task": "sort"}).supply(TRAIN) is None


def test_the_check_tells_of_small_data_and_of_its_key(project, tmp_path):
    file = run_file(project)
    small = ["cold_start.sft.domains=[reverse]", "base.pretrain.domains=[reverse]"]
    result = mopd("plan", file, "--home", tmp_path / "home", "--check", *small)
    shown = " ".join((result.stdout + result.stderr).split())
    assert result.exit_code == 0, shown
    entry = load_run_file(file).domains["sort"]
    domain = load_domain("sort", entry.kind, entry.options)
    assert f"merge.examples 3000: domains.sort has {domain.supply(TRAIN)} train examples" in shown
    assert f"evaluate.examples 400: domains.sort has {domain.supply(HELD_OUT)} held_out examples" in shown


def test_a_generated_domain_that_runs_out_names_the_key(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL, sort_keys=False))
    small = "domains.sort.options={task: sort, min_length: 2, max_length: 2}"
    result = mopd("plan", path, "--home", tmp_path / "home", small, "--check")
    assert result.exit_code == 2
    shown = " ".join(result.stderr.split())
    assert "evaluate.examples 400: domains.sort: 400 examples of split 'held_out' are needed, but only" in shown


def test_rows_with_the_prompt_of_an_earlier_one_are_counted_once(project, tmp_path):
    rows = [*sums(40), *({"question": f"{n}+1?", "answer": 0} for n in range(3))]
    write(project / "data" / "train.jsonl", rows)
    file = run_file(project)
    line = f"3 rows of '{project}/data/train.jsonl' repeat the prompt of an earlier row, 3 of them with another answer"
    entry = load_run_file(file).domains["sort"]
    domain = load_domain("sort", entry.kind, entry.options)
    assert domain.left_out == ()
    draw_training(Workspace(domain), Config())
    draw_training(Workspace(domain), Config())
    assert left_out(Workspace(domain)) == [f"domains.sort: {line}; the first one counts"]
    small = ["cold_start.sft.domains=[reverse]", "base.pretrain.domains=[reverse]"]
    result = mopd("plan", file, "--home", tmp_path / "home", "--check", *small)
    assert " ".join((result.stdout + result.stderr).split()).count(f"domains.sort: {line}") == 1
