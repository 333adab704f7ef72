"""A judge as the measure of a run: its nodes, which are processes of their own, share marks under the run's home."""

import json
import threading
from pathlib import Path

import pytest

from base.store.checkpoint import Store
from experts.domain import HELD_OUT
from flows.engines.launch import Launcher
from flows.plan.graph import build_graph
from flows.run_file.resources import ResourcesConfig
from flows.run_file.schema import RunConfig
from tests.integration.engines.test_launch import RUN, silent
from tests.support.judge_server import Judge


def test_an_evaluation_keeps_marks_in_the_home_and_noise_in_its_metrics(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("MOPD_HOME", raising=False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"say {n}"}) + "\n" for n in range(60)))
    home = tmp_path / "home"
    with Judge() as judge, Launcher(home, ResourcesConfig()) as launcher:
        judge.reply = lambda request, number: "5" if request["seed"] else "8"
        thread = threading.Thread(target=judge.serve_forever, args=(0.02,))
        thread.start()
        options = {"path": str(rows), "prompt_field": "q", "url": judge.url, "rubric": "Any.", "noise_sample": 1}
        pretrain = RUN["base"]["pretrain"] | {"domains": ["sort"]}
        domains = RUN["domains"] | {"manners": {"kind": "judge", "options": options}}
        # After so few steps the likeliest completion is empty, which needs no judge.
        drawn = RUN["evaluate"] | {"samples": 4}
        run = RUN | {"seeds": [0], "evaluate": drawn, "base": {"pretrain": pretrain}, "domains": domains}
        graph = build_graph(RunConfig.model_validate(run), home)
        launcher.run(graph, [graph.node("base@0")], silent)
        node = graph.node(f"eval/base/manners/{HELD_OUT}@0")
        launcher.run(graph, [node], silent)
        judge.shutdown()
        thread.join()
    metrics = Store(home).get(node.key).manifest["metrics"]
    assert metrics["sampled"] > 0
    assert metrics["judge_noise"] == pytest.approx(0.3)
    (marks,) = (home / "judge").glob("*.marks")
    assert len(marks.read_text().splitlines()) == metrics["judged_twice"] == len(judge.requests) / 2
