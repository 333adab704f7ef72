"""What a run needs and is likely to cost, before it is launched."""

import json
import types
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from base.store import energy
from base.store.checkpoint import Store
from flows.cli.app import app
from flows.engines import memory
from flows.engines import memory_terms as terms
from flows.engines.device_memory import Memory, available
from flows.engines.memory import fit, needs
from flows.engines.shapes import shape_of
from flows.plan.nodes import StageGraph
from flows.run.estimate import estimate, summary, work
from tests.support.devices import stand_in_driver
from tests.support.scored_home import finish, graph_of

GIB = 2**30


def large(graph: StageGraph, parameters: int, store: Store) -> None:
    """Let the base be in the store, as a model of this size."""
    base = graph.node("base@0")
    folder = store.staging(base.key)
    shape = {"hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 128_000}
    (folder / "config.json").write_text(json.dumps(shape))
    facts = {"stage": "pretrain", "seed": 0, "config": dict(base.config), "parents": {}, "parameters": parameters}
    store.commit(folder, base.key, {"name": "base", "seconds": 10.0, "tokens": 5, "metrics": {}, **facts})


def place(total: int, free: int | None = None, kind: str = "cpu") -> Memory:
    """This machine, with so much memory."""
    return Memory(total, total if free is None else free, "this machine", kind)


def test_a_model_of_eight_billion_needs_what_it_needs(file: Path, home: Path) -> None:
    graph, store = graph_of(file, home), Store(home)
    large(graph, 8_000_000_000, store)
    found = {need.node: need for need in needs(graph, store, [n for n in graph.checkpoints if n.id != "base@0"])}
    assert shape_of(graph.node("base@0"), store).layers == 32
    update = found["experts/sort@0"].phases["update"]
    weights = update["weights"]
    assert weights == 32_000_000_000
    # Adam in float32: gradients and two moments beside the weights.
    assert (update["gradients"], update["optimizer"]) == (weights, 2 * weights)
    # Two experts and the cold start as the anchor's teacher.
    assert found["student@0"].phases["update"]["teachers"] == 3 * weights
    assert found["student@0"].total > found["experts/sort@0"].total


def test_vllm_needs_weights_of_its_own_and_servers_share_the_machine(file: Path, home: Path) -> None:
    store = Store(home)
    large(graph_of(file, home), 8_000_000_000, store)

    def parts(node: str, *overrides: str) -> dict[str, int]:
        graph = graph_of(file, home, *overrides)
        return dict(next(n for n in needs(graph, store, [graph.node(node)])).phases["rollout"])

    weights = 32_000_000_000
    engine = parts("student@0", "resources.sampler=vllm")["vLLM's weights and cache"]
    # Float32, a cache of the rows at a time.
    assert weights < engine < weights + psutil.virtual_memory().available
    servers = ("resources.sampler=vllm_server", "resources.rollout_servers.count=2")
    asked = ("merge.teacher_backend=vllm_server", "merge.objective={type: reverse_kl, top_k: {k: 5}}")
    served = parts("student@0", *servers, *asked)
    assert served["rollout servers"] > 2 * (memory.SERVER_BYTES + weights)
    assert served["teacher servers"] > 3 * (memory.SERVER_BYTES + weights)
    assert "sampler's cache" not in served
    # Given by their address they take nothing of this machine, as far as it can know.
    url = "resources.rollout_servers.urls=['http://127.0.0.1:9']"
    assert "rollout servers" not in parts("student@0", *servers, url)


def test_adapters_shards_and_few_resident_teachers_need_less(file: Path, home: Path) -> None:
    store = Store(home)
    for gpus in (0, 4):
        large(graph_of(file, home, f"resources.gpus={gpus}"), 8_000_000_000, store)

    def parts(*overrides: str, node: str = "student@0") -> dict[str, int]:
        graph = graph_of(file, home, *overrides)
        return dict(next(n for n in needs(graph, store, [graph.node(node)])).phases["update"])

    whole = parts()
    heads = 2 * 128_000 * 4096 * terms.FLOAT
    assert (parts("merge.max_resident=1")["teachers"] - heads) * 3 == whole["teachers"]
    assert parts("merge.sharding=fsdp", "resources.gpus=4")["weights"] * 4 == whole["weights"]
    assert parts("merge.lora={}")["gradients"] < whole["gradients"] / 50
    assert parts("merge.gradient_checkpointing=true")["activations"] < whole["activations"] / 5


def test_what_does_not_fit_is_named_with_what_would_help(
    file: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, store = graph_of(file, home), Store(home)
    large(graph, 8_000_000_000, store)
    missing = [node for node in graph.checkpoints if node.id != "base@0"]
    monkeypatch.setattr(memory, "available", lambda gpus: place(24 * GIB))
    problems, _ = fit(graph, store, missing)
    assert any(line.startswith("student@0: about ") and "this machine has 24.0 GiB: " in line for line in problems)
    assert "lower max_resident" in problems[0] and "train adapters (lora)" in problems[0]
    monkeypatch.setattr(memory, "available", lambda gpus: place(10_000 * GIB))
    assert fit(graph, store, missing) == ([], [])
    largest = needs(graph, store, missing)[0].total
    # Enough in all, and others hold it just now: a warning, for they may be gone by then.
    monkeypatch.setattr(memory, "available", lambda gpus: place(10_000 * GIB, GIB))
    problems, (warning,) = fit(graph_of(file, home, "resources.parallel_experts=1"), store, missing)
    assert problems == [] and "more than the 1.0 GiB free now on this machine" in warning
    monkeypatch.setattr(memory, "available", lambda gpus: place(largest + GIB))
    problems, warnings = fit(graph_of(file, home, "resources.parallel_experts=3"), store, missing)
    assert problems == [] and "lower resources.parallel_experts" in warnings[0]


def test_a_check_refuses_a_run_that_cannot_fit(file: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda gpus: place(GIB // 8))
    asked = ["plan", str(file), "--home", str(home), "--check"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 2 and "GiB: set gradient_checkpointing" in done.output
    assert "--ignore-memory runs it all the same" in done.output
    done = CliRunner().invoke(app, [*asked, "--ignore-memory"])
    assert done.exit_code == 0 and "warning: " in done.output and "GiB: set gradient_checkpointing" in done.output


def test_a_measured_peak_is_advice_under_its_own_settings(
    file: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(home)
    large(graph_of(file, home), 8_000_000_000, store)
    graph = graph_of(file, home)
    (expert,) = (node for node in graph.checkpoints if node.id == "experts/sort@0")
    folder = store.staging("another")
    (folder / "model.txt").write_text("")
    facts = {"stage": expert.stage, "config": dict(expert.config), "parameters": 8_000_000_000, "parents": {}}
    store.commit(folder, "another", {"name": "another", "seed": 1, "device": "cpu", "peak_memory": 94 * GIB, **facts})

    def measured(kind: str, *overrides: str) -> int:
        monkeypatch.setattr(memory, "available", lambda gpus: place(200 * GIB, kind=kind))
        changed = graph_of(file, home, *overrides)
        (need,) = needs(changed, store, [changed.node("experts/sort@0")])
        return need.measured

    train = "experts.sort.train.rl"
    assert measured("cpu", f"{train}.optimizer.learning_rate=0.1", f"{train}.max_steps=7") == 94 * GIB
    others = ("lora={rank: 4}", "dtype=bfloat16", "micro_batch_tokens=77", "group_size=2", "max_new_tokens=5")
    assert [measured("cpu", f"{train}.{other}") for other in others] == [0] * len(others)
    assert measured("NVIDIA H100 80GB HBM3") == 0
    # Above the memory it is a warning, and below it no estimate refuses the stage.
    estimated = next(n for n in needs(graph, store, [expert])).total
    monkeypatch.setattr(memory, "available", lambda gpus: place(90 * GIB))
    assert estimated > 90 * GIB and len(fit(graph, store, [expert])[0]) == 1
    assert "a stage with these settings took 94.00 GiB" in fit(graph, store, [expert])[1][0]
    monkeypatch.setattr(memory, "available", lambda gpus: place(100 * GIB))
    assert estimated > 100 * GIB and fit(graph, store, [expert])[0] == []


def test_a_slice_has_its_own_memory_and_a_device_what_the_driver_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", stand_in_driver(tmp_path / "whole", count=2))
    assert available(1) == Memory(81559 * 2**20, 81559 * 2**20, "a GPU", "NVIDIA H100 80GB HBM3")
    listed = (
        "GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-aaaa-0000)\n"
        "  MIG 1g.5gb      Device  0: (UUID: MIG-cccc-0000)\n"
        "  MIG 3g.20gb     Device  1: (UUID: MIG-cccc-0001)"
    )
    monkeypatch.setenv("PATH", stand_in_driver(tmp_path / "divided", listed))
    assert available(1).kind == "NVIDIA A100-SXM4-40GB MIG 1g.5gb"
    assert available(1).total == 4864 * 2**20
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-cccc-0001")
    assert available(1).total == 19456 * 2**20
    monkeypatch.setenv("PATH", stand_in_driver(tmp_path / "broken", fails="Driver/library version mismatch"))
    assert available(1).total == 0


def test_costs_are_those_of_the_most_similar_stage_scaled_by_the_work(file: Path, home: Path) -> None:
    graph = graph_of(file, home)
    store = finish(graph, home)
    longer = graph_of(file, home, "experts.sort.train.rl.max_steps=50")
    missing = [node for node in longer.nodes if store.find(node.key) is None]
    found = {each.node: each for each in estimate(longer, store, missing)}
    # Five steps took a second and 100 tokens.
    assert found["experts/sort@0"].seconds == pytest.approx(10.0) and found["experts/sort@0"].tokens == 1000
    assert found["experts/sort@0"].like == graph.node("experts/sort@0").key
    assert found["student@0"].seconds == pytest.approx(1.0)
    (line,) = summary(list(found.values()))
    assert line.startswith("cost: about ") and "tokens, from earlier stages of their kind" in line
    assert summary(estimate(longer, store, [])) == []


def spent(store: Store, graph: StageGraph, node_id: str, **facts: float) -> None:
    """Let a node's manifest say what it took."""
    path = store.root / graph.node(node_id).key / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def test_device_time_is_that_of_all_devices_and_energy_is_shown_where_it_was_told(file: Path, home: Path) -> None:
    graph = graph_of(file, home)
    store = finish(graph, home)
    spent(store, graph, "experts/sort@0", seconds=60.0, device_seconds=240.0, joules=5000.0)
    longer = graph_of(file, home, "experts.sort.train.rl.max_steps=10")
    (expert,) = estimate(longer, store, [longer.node("experts/sort@0")])
    assert (expert.seconds, expert.device_seconds, expert.joules) == (120.0, 480.0, 10000.0)
    assert "about 8m00s of device time, 10,000 J and " in summary([expert])[0]
    # The energy of a machine without a meter is unknown, and the line has the number of nodes of which it is known.
    found = estimate(longer, store, [longer.node("experts/sort@0"), longer.node("experts/reverse@0")])
    assert found[1].joules is None
    assert "10,000 J (of 1 of 2 nodes) and " in summary(found)[0]


def test_measurements_share_their_process_in_device_time_and_energy_too(file: Path, home: Path) -> None:
    graph = graph_of(file, home)
    store = finish(graph, home)
    sheets = graph.evaluations("base@0")
    for number, sheet in enumerate(sheets, 1):
        # Made one after another in one process that started at 1000: each counts from there.
        taken = {"created": 1000.0 + 10 * number, "seconds": 10.0 * number, "device_seconds": 20.0 * number}
        spent(store, graph, sheet.id, **taken, joules=100.0 * number)
    found = estimate(graph, store, sheets)
    assert len(found) > 1 and {each.like for each in found} <= {sheet.key for sheet in sheets}
    for each in found:
        assert each.seconds == pytest.approx(10.0)
        assert each.device_seconds == pytest.approx(20.0) and each.joules == pytest.approx(100.0)


def test_what_was_never_made_is_said_to_be_unknown(file: Path, home: Path) -> None:
    graph = graph_of(file, home)
    (line,) = summary(estimate(graph, Store(home), graph.nodes))
    assert "no nodes like these" in line
    told = json.loads(CliRunner().invoke(app, ["plan", str(file), "--home", str(home), "--json"]).output)
    assert all(entry["about_seconds"] is None and entry["about_tokens"] is None for entry in told)


def test_work_counts_samples_rows_or_tokens() -> None:
    assert work({"max_steps": 10, "prompts_per_step": 4, "group_size": 8}) == 320
    assert work({"max_steps": 10, "batch_size": 16}) == 160
    assert work({"max_steps": 10, "batch_tokens": 512}) == 5120
    assert work({"examples": 40, "samples": 2}) == 120


def test_energy_is_the_difference_of_the_devices_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        """As the library's."""

    counters = {"0": 1_000_000, "GPU-abc": 3_000_000}
    library = types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=str,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: counters[handle],
    )
    monkeypatch.setitem(__import__("sys").modules, "pynvml", library)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-abc")
    assert energy.joules_so_far() == 4000.0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert energy.joules_so_far() is None

    def broken() -> None:
        raise NVMLError

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    library.nvmlInit = broken
    assert energy.joules_so_far() is None
