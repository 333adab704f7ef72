"""`mopd report` on a folder of run files: the page, its figures and its data from the scores in the store."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats
from typer.testing import CliRunner, Result

from base.store.checkpoint import Store
from flows.cli.app import app
from flows.plan.graph import build_graph
from flows.run_file.load import load_run_file
from tests.support.scored import sheet
from tests.unit.flows.run_file.test_config import MINIMAL

SHARES = {"base": 0.2, "cold_start": 0.5, "experts/sort": 0.9, "experts/reverse": 0.7, "student": 0.85}
HYPOTHESES = {
    "C1": {
        "claim": "The student forgets less than the expert.",
        "tests": {"general": {"compare": ["student", "experts/reverse"], "measure": "drop", "expect": "below"}},
    },
    "C2": {
        "claim": "RL gains.",
        "note": "On ten examples.",
        "tests": {"gain": {"compare": ["experts/sort", "cold_start"], "domains": ["sort"], "expect": "above"}},
    },
}


def folder_of(tmp_path: Path, hypotheses=HYPOTHESES) -> Path:
    folder = tmp_path / "claims"
    folder.mkdir()
    run = {**MINIMAL, "seeds": [0, 1, 2]}
    (folder / "ground.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
    (folder / "tests.yaml").write_text(yaml.safe_dump({"extends": "ground.yaml", "hypotheses": hypotheses}))
    return folder


def score(folder: Path, home: Path) -> None:
    """Stand in for the evaluations: every checkpoint's share is the same on all domains and seeds."""
    graph, store = build_graph(load_run_file(folder / "tests.yaml"), home), Store(home)
    for node in graph.checkpoints:
        for evaluation in graph.evaluations(node.id):
            place = store.staging(evaluation.key)
            rows = sheet(str(evaluation.config["domain"]), SHARES[node.name]).rows
            (place / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            store.commit(place, evaluation.key, {"name": evaluation.name})


def report(folder: Path, home: Path, page: Path) -> Result:
    return CliRunner().invoke(app, ["report", str(folder), "--home", str(home), "--page", str(page)])


def test_the_page_tells_every_claim_with_figure_and_data(tmp_path: Path) -> None:
    folder, home, page = folder_of(tmp_path), tmp_path / "home", tmp_path / "docs" / "claims.md"
    score(folder, home)
    done = report(folder, home, page)
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert "| C1 | The student forgets less than the expert. | **shown** (tests: general) |" in text
    assert "`tests.yaml`, 3 seeds, 100 independent examples a domain and seed." in text
    assert "student − expert reverse: drop from the start on general | below 0 | -15.0 [" in text
    assert text.count("On ten examples.") == 1
    assert "(claims/intervals.svg)" in text and "fits.svg" not in text, "no test is a fit"
    drawn = (page.parent / "claims" / "intervals.svg").read_text()
    assert drawn.count("<svg") == 1 and all(f">{title}<" in drawn for title in ("C1 (tests)", "C2 (tests)", "general"))
    assert "[a JSON file](claims.json)" in text
    assert "was fixed before" not in text and "their git history shows when they were fixed" in text
    assert "(%; drop from the start); the start scores 50.0 %" in text


def test_a_reader_can_compute_it_again_from_the_data(tmp_path: Path) -> None:
    folder, home, page = folder_of(tmp_path), tmp_path / "home", tmp_path / "claims.md"
    score(folder, home)
    graph, store = build_graph(load_run_file(folder / "tests.yaml"), home), Store(home)
    node = graph.node("student@1")
    weights = store.staging(node.key)
    (weights / "model.txt").write_text("weights")
    made = store.commit(weights, node.key, {"name": node.name, "code": "fingerprint"})
    assert report(folder, home, page).exit_code == 0
    data = json.loads(page.with_suffix(".json").read_text())["tests.yaml"]
    assert (data["seeds"], data["confidence"]) == ([0, 1, 2], 0.95)
    assert data["checkpoints"] == {"student@1": {"key": node.key, "digest": made.digest, "code": "fingerprint"}}
    (first, second) = data["findings"]
    assert (first["verdict"], first["interval"]["mean"]) == ("shown", pytest.approx(-0.15))
    assert first["contrast"] == {seed: pytest.approx(-0.15) for seed in "012"}
    # Seeds are equal here, so it is the t-test of 100 examples with four made up; two tests share Holm's correction.
    variance = np.var([-1.0] * 15 + [0.0] * 85, ddof=1) / 100 + 4 / 100**2
    assert first["estimate"]["examples"]["variance"] == pytest.approx(variance)
    assert first["estimate"]["seeds"]["variance"] == 0
    freedom = first["estimate"]["examples"]["freedom"]
    expected = 2 * stats.t.sf(0.15 / variance**0.5, freedom)
    assert (first["raw_p"], first["start"]) == pytest.approx((expected, 0.5)) and freedom > 99
    assert first["p"] == pytest.approx(max(expected, 2 * second["raw_p"]))
    assert second["values"] == pytest.approx({"experts/sort": 0.9, "cold_start": 0.5})
    assert second["by_seed"]["experts/sort"] == pytest.approx({"0": 0.9, "1": 0.9, "2": 0.9})


def test_measurements_are_judged_again_without_the_home(tmp_path: Path) -> None:
    folder, home, page = folder_of(tmp_path), tmp_path / "home", tmp_path / "claims.md"
    score(folder, home)
    assert report(folder, home, page).exit_code == 0
    again, nowhere = tmp_path / "again.md", tmp_path / "nowhere"

    def judged(measured: Path) -> Result:
        arguments = ["report", str(folder), "--home", str(nowhere), "--page", str(again), "--measured", str(measured)]
        return CliRunner().invoke(app, arguments)

    assert judged(page.with_suffix(".json")).exit_code == 0
    assert again.with_suffix(".json").read_text() == page.with_suffix(".json").read_text()
    assert again.read_text() == page.read_text().replace("(claims", "(again")
    missing = judged(tmp_path / "no.json")
    assert missing.exit_code == 2 and "no.json" in missing.output and "Traceback" not in missing.output
    broken = tmp_path / "broken.json"
    broken.write_text('{"tests.yaml": {"findings": [{"hypothesis": "C1", "test": "general"}]}}')
    assert judged(broken).exit_code == 2 and "incomplete or malformed: 'config'" in judged(broken).output
    data = json.loads(page.with_suffix(".json").read_text())
    data["tests.yaml"]["findings"][0]["config"]["compare"] = ["student", "base"]
    broken.write_text(json.dumps(data))
    other = judged(broken)
    assert other.exit_code == 2 and "hypotheses.C1.tests.general: compare changed since the measurement" in other.output


def test_a_folders_notes_follow_the_introduction(tmp_path: Path) -> None:
    folder, home, page = folder_of(tmp_path), tmp_path / "home", tmp_path / "claims.md"
    score(folder, home)
    (folder / "NOTES.md").write_text("First run on a Monday.\n")
    assert report(folder, home, page).exit_code == 0
    text = page.read_text()
    assert text.index("decide nothing about large models.") < text.index("First run on a Monday.\n\n## Overview")


def test_what_cannot_be_told_is_an_error_or_a_warning(tmp_path: Path) -> None:
    folder, home, page = folder_of(tmp_path), tmp_path / "home", tmp_path / "claims.md"
    nothing = report(folder, home, page)
    assert nothing.exit_code == 2
    assert "has no artifacts of this run; make them first" in nothing.output and "mopd run" in nothing.output
    assert not page.exists()
    score(folder, home)
    late = {
        "C3": {
            "claim": "Costs.",
            "tests": {"s": {"compare": ["student", "base"], "measure": "seconds", "expect": "below"}},
        }
    }
    (folder / "tests.yaml").write_text(yaml.safe_dump({"extends": "ground.yaml", "hypotheses": late}))
    unmeasured = report(folder, home, page)
    assert unmeasured.exit_code == 0
    assert "hypotheses.C3.tests.s: not measured" in unmeasured.output
    assert "| C3 | Costs. | not measured (tests: s) |" in page.read_text()
    other = {**MINIMAL, "name": "other", "hypotheses": HYPOTHESES, "seeds": [7]}
    (folder / "other.yaml").write_text(yaml.safe_dump(other, sort_keys=False))
    unfinished = report(folder, home, page)
    assert unfinished.exit_code == 0 and "other.yaml: hypotheses.C1.tests.general: not measured" in unfinished.output
    assert "not measured (other: general)" in page.read_text()
    (folder / "other.yaml").unlink()
    (folder / "tests.yaml").unlink()
    none = report(folder, home, page)
    assert none.exit_code == 2
    assert "no run file with hypotheses" in none.output
