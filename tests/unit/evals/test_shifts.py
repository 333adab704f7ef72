"""Shift nodes in the plan, their sheets read back, and the tables made of them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from base.errors import UserError
from base.store.checkpoint import Store
from evals.comparison.results import Results, metrics
from evals.comparison.shift_sheet import (
    COSINES_FILE,
    SHIFT_FILE,
    CosineSheet,
    DomainShift,
    ExampleShift,
    ShiftSheet,
    WeightShift,
    read_cosines,
    read_shift,
)
from evals.comparison.shifts import cosines_grid, shift_grid
from evals.report.table import render_markdown
from evals.statistics.crossed_effects import over_both
from flows.champion.results import collect
from flows.plan.graph import build_graph
from flows.plan.nodes import StageGraph
from tests.support.checkpoints import pretend_checkpoint
from tests.support.scored import results
from tests.unit.flows.cli.test_cli import mopd
from tests.unit.flows.plan.test_plan import changed
from tests.unit.flows.run_file.test_config import MINIMAL, load

WEIGHTS = WeightShift(
    weights=10,
    changed_bfloat16=0.2,
    changed_float32=0.9,
    relative_norm=0.1,
    embeddings=None,
    layers=[],
    head=None,
    rest=None,
)


def graph_of(tmp_path: Path, overrides: list[str] | None = None, **changes) -> StageGraph:
    return build_graph(load(tmp_path, overrides, **{"evaluate": {}, **changes}), tmp_path / "home")


def shifts_of(graph: StageGraph) -> list[str]:
    return [node.id for node in graph.nodes if node.stage in ("shift", "cosines")]


def sheet(*kl: float) -> ShiftSheet:
    """A sheet of one domain `sort` with an example of three tokens for each KL."""
    rows = [
        ExampleShift(id=f"e{i}", source=f"e{i}", kl_start=value, start_tokens=3, kl_policy=1.0, entropy=0.5, tokens=4)
        for i, value in enumerate(kl)
    ]
    mean = float(np.mean(kl))
    own = DomainShift(kl_start=mean, kl_policy=1.0, entropy=0.5, length=4, repetition=None, examples=rows)
    return ShiftSheet(domains={"sort": own}, weights=WEIGHTS)


def moved(seeds: tuple[int, ...] = (0, 1, 2)) -> Results:
    """Expert a moved by 0.2, 0.4 and 0.3 on its own domain, by 0.01 elsewhere; the student by a tenth of that."""
    shift, kl_examples = {}, {}
    for name, scale in (("experts/a", 1.0), ("student", 0.1)):
        for domain in ("a", "b", "g"):
            by_seed = {seed: scale * ((0.2, 0.4, 0.3)[seed] if domain == "a" else 0.01) for seed in seeds}
            shift[name, "kl_start", domain] = by_seed
            kl_examples[name, domain] = {seed: value * np.array([0.5, 1, 1.5]) for seed, value in by_seed.items()}
            shift[name, "entropy", domain] = dict.fromkeys(seeds, 0.25)
        shift[name, "changed_bfloat16", ""] = dict.fromkeys(seeds, 0.125)
    pairs = {("a", "b"): {seed: 0.1 * (seed + 0.5) for seed in seeds}}
    return dataclasses.replace(results(seeds=seeds), shift=shift, kl_examples=kl_examples, cosines=pairs)


def test_every_checkpoint_trained_from_the_start_has_a_node(tmp_path: Path) -> None:
    graph = graph_of(tmp_path)
    assert shifts_of(graph) == ["shift/experts/sort@0", "shift/experts/reverse@0", "shift/student@0", "cosines@0"]
    node = graph.node("shift/student@0")
    assert node.parents == {"start": "cold_start@0", "checkpoint": "student@0"}
    assert node.domains.keys() == MINIMAL["domains"].keys()
    cosines = {"start": "cold_start@0", "expert/sort": "experts/sort@0", "expert/reverse": "experts/reverse@0"}
    assert graph.node("cosines@0").parents == cosines
    assert all(node.stage == "evaluate" for node in graph.evaluations("student@0"))
    assert not {"shift", "cosines"} & {node.stage for node in graph.checkpoints}
    assert shifts_of(graph_of(tmp_path, ["evaluate.shift=null"])) == []


def test_nodes_of_others_keep_their_keys(tmp_path: Path) -> None:
    without = graph_of(tmp_path, ["evaluate.shift=null"])
    assert changed(without, graph_of(tmp_path)) == set()
    assert changed(without, graph_of(tmp_path, ["evaluate.shift.examples=9"])) == set()


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("evaluate.shift.examples=9", ["experts/sort", "experts/reverse", "student"]),
        ("evaluate.shift.temperature=0.7", ["experts/sort", "experts/reverse", "student"]),
        ("merge.objective.type=sampled_reverse_kl", ["student"]),
        ("experts.sort.train.rl.max_steps=6", ["experts/sort", "student", "cosines"]),
        ("evaluate.samples=2", []),
    ],
)
def test_a_change_reaches_the_shifts_downstream(tmp_path: Path, override: str, names: list[str]) -> None:
    before = graph_of(tmp_path)
    moved = changed(before, graph_of(tmp_path, [override])) & set(shifts_of(before))
    assert moved == {f"{name}@0" if name == "cosines" else f"shift/{name}@0" for name in names}


def test_no_more_examples_are_drawn_than_are_scored(tmp_path: Path) -> None:
    assert graph_of(tmp_path).node("shift/student@0").config["examples"] == 64
    config = graph_of(tmp_path, ["evaluate.examples=7", "evaluate.max_new_tokens=5"]).node("shift/student@0").config
    assert (config["examples"], config["max_new_tokens"], config["split"]) == (7, 5, "held_out")


def test_experts_of_another_start_have_no_cosine(tmp_path: Path) -> None:
    elsewhere = graph_of(tmp_path, ["experts.reverse.start_from=base"])
    assert "shift/experts/reverse@0" in shifts_of(elsewhere) and "cosines@0" not in shifts_of(elsewhere)
    folder = pretend_checkpoint(tmp_path / "model")
    experts = MINIMAL["experts"] | {"reverse": {"domain": "reverse", "checkpoint": str(folder)}}
    assert shifts_of(graph_of(tmp_path, experts=experts)) == ["shift/experts/sort@0", "shift/student@0"]


def test_the_plan_has_a_line_for_each(tmp_path: Path) -> None:
    load(tmp_path, **{"evaluate": {}})
    said = mopd("plan", tmp_path / "run.yaml", "--home", tmp_path / "home").stdout
    assert sum("shift/" in line for line in said.splitlines()) == 3 and "cosines@0" in said


def test_values_by_example_have_the_mean_over_tokens() -> None:
    rows = [
        ExampleShift(
            id=str(tokens), source=str(tokens), kl_start=kl, start_tokens=tokens, kl_policy=0, entropy=0, tokens=1
        )
        for kl, tokens in ((1.0, 1), (0.0, 3))
    ]
    found = DomainShift(kl_start=0.25, kl_policy=0, entropy=0, length=1, repetition=None, examples=rows).kl_start_N
    # r = 1/4; 1/4 + 3/4 · 1/2 and 1/4 - 1/4 · 3/2.
    assert found == pytest.approx([0.625, -0.125])


def test_prompts_of_one_unit_are_one_value() -> None:
    own = sheet(0.1, 0.3, 0.2, 0.6).domains["sort"]
    assert own.kl_start_G == pytest.approx([0.1, 0.3, 0.2, 0.6])
    twins = [row.model_copy(update={"source": str(i // 2)}) for i, row in enumerate(own.examples)]
    paired = own.model_copy(update={"examples": twins})
    assert sorted(paired.kl_start_G) == pytest.approx([0.2, 0.4])


def test_finished_sheets_reach_the_results(tmp_path: Path) -> None:
    graph, store = graph_of(tmp_path, seeds=[0, 1]), Store(tmp_path / "home")
    written = {
        "shift/student@1": (SHIFT_FILE, sheet(0.1, 0.3)),
        "cosines@1": (COSINES_FILE, CosineSheet(experts=["sort", "reverse"], cosines=[[1.0, 0.5], [0.5, 1.0]])),
    }
    for node_id, (file, content) in written.items():
        key = graph.node(node_id).key
        folder = store.staging(key)
        (folder / file).write_text(content.model_dump_json())
        store.commit(folder, key, {"name": node_id, "stage": node_id.partition("/")[0]})
    found = collect(graph, store)
    assert found.shift["student", "kl_start", "sort"] == {1: pytest.approx(0.2)}
    assert found.shift["student", "changed_bfloat16", ""] == {1: 0.2}
    assert found.shift["student", "rounded_away", ""] == {1: pytest.approx(0.9 - 0.2)}
    assert ("student", "repetition", "sort") not in found.shift
    assert found.kl_examples["student", "sort"][1] == pytest.approx([0.1, 0.3])
    assert found.cosines == {("sort", "reverse"): {1: 0.5}}
    assert written.keys() == found.provenance.keys()


def test_what_is_malformed_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"shift\.json: the sheet does not exist"):
        read_shift(tmp_path)
    whole = json.loads(sheet(0.1).model_dump_json())
    (tmp_path / SHIFT_FILE).write_text(json.dumps(whole))
    assert read_shift(tmp_path) == sheet(0.1)
    whole["weights"]["changed_bfloat16"] = 1.5
    (tmp_path / SHIFT_FILE).write_text(json.dumps(whole))
    with pytest.raises(UserError, match=r"shift\.json: weights\.changed_bfloat16: Input should be less"):
        read_shift(tmp_path)
    (tmp_path / COSINES_FILE).write_text(json.dumps({"experts": ["a", "b"], "cosines": [[1, 0.5]]}))
    with pytest.raises(UserError, match=r"cosines\.json: .*a row and a column for each of 2 experts"):
        read_cosines(tmp_path)


def test_the_tables_tell_own_domains_from_the_others() -> None:
    grid = shift_grid(moved())
    assert grid is not None
    expert, student = grid.rows
    own = over_both({"a": np.outer([0.2, 0.4, 0.3], [0.5, 1, 1.5])}).interval(0.95)
    assert expert[0] == "a" and expert[1] == f"0.300 [{own.low:#.3g}, {own.high:#.3g}]"
    assert expert[2].startswith("0.0100 [")
    assert expert[3:] == ("0.250", "–", "–", "12.5", "–")
    # The student's own domains are a and b.
    assert student[0] == "student" and student[1].startswith("0.0155 [") and student[2].startswith("0.00100 [")
    assert shift_grid(moved(), narrow=True).rows[0][1].startswith("0.300 ±0.")
    # Two seeds say too little of others.
    assert shift_grid(moved(seeds=(0, 1))).rows[0][1] == "0.300"
    assert cosines_grid(moved()).rows == (("a", "–", "0.150"), ("b", "0.150", "–"))
    assert "Shift from the start" in render_markdown(moved())
    assert shift_grid(results()) is None and cosines_grid(results()) is None


def test_the_parent_run_gets_the_same_values() -> None:
    found = metrics(moved())
    assert found["shift/experts/a/kl_own"] == pytest.approx(0.3)
    assert found["shift/experts/a/kl_own_low"] < 0.3 < found["shift/experts/a/kl_own_high"]
    assert found["shift/student/changed_bfloat16"] == 0.125
    assert found["shift/cosine/a/b"] == pytest.approx(0.15)
    assert "shift/student/length" not in found


def test_a_checkpoint_that_was_measured_on_fewer_domains_has_the_mean_of_those():
    whole = moved()
    shift = {key: values for key, values in whole.shift.items() if key[0] != "experts/a" or key[2] != "b"}
    fewer = dataclasses.replace(whole, shift=shift)
    expert, other = (next(row for row in shift_grid(found).rows if row[0] == "a") for found in (fewer, whole))
    assert expert[1] == other[1]
    assert expert[2] != "–"
