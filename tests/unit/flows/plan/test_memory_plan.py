"""The memory plan's settings that spare a device, number types of measurements, and chunks of logits."""

from pathlib import Path

import pytest

from base.store.checkpoint import Store
from flows.engines import memory
from flows.engines import memory_terms as terms
from flows.engines.memory import fit, needs
from tests.support.scored_home import graph_of
from tests.unit.flows.plan.test_estimates import GIB, large, place


def test_moments_in_8_bits_and_offloaded_shards_need_less_of_a_device(
    file: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(home)
    for gpus in (1, 4):
        large(graph_of(file, home, f"resources.gpus={gpus}"), 8_000_000_000, store)

    def need(gpus: int, *overrides: str) -> memory.Need:
        graph = graph_of(file, home, f"resources.gpus={gpus}", *overrides)
        return next(iter(needs(graph, store, [graph.node("student@0")])))

    def optimizer(gpus: int, *overrides: str) -> int:
        return need(gpus, *overrides).phases["update"]["optimizer"]

    embedding = 128_000 * 4096
    narrow = 8 * embedding + (2 + 8 / 256) * (8_000_000_000 - embedding)
    states, paged = "merge.optimizer.states=8bit", "merge.optimizer={states: 8bit, paged: true}"
    assert optimizer(1) == 64_000_000_000
    assert optimizer(1, states) == pytest.approx(narrow, rel=1e-6)
    assert optimizer(0, paged) == optimizer(0, states) == optimizer(1, states)
    assert optimizer(1, paged) == 0 and need(1, paged).offloaded == optimizer(1, states)
    sharded, offloaded = need(4, "merge.sharding=fsdp"), need(4, "merge.sharding=fsdp", "merge.cpu_offload=true")
    moved = ("weights", "gradients", "optimizer")
    assert [offloaded.phases["update"][part] for part in moved] == [0, 0, 0]
    assert offloaded.offloaded == 4 * sum(sharded.phases["update"][part] for part in moved)
    assert offloaded.phases["update"]["gathered weights"] == sharded.phases["update"]["gathered weights"]


def test_models_measured_in_bfloat16_take_half_but_for_their_embeddings(file: Path, home: Path) -> None:
    store = Store(home)
    large(graph_of(file, home), 8_000_000_000, store)

    def weights(*overrides: str) -> dict[str, int]:
        graph = graph_of(file, home, "evaluate.shift={}", *overrides)
        nodes = [next(node for node in graph.nodes if node.stage == stage) for stage in ("evaluate", "shift")]
        return {need.node.split("@")[0]: need.parts["weights"] for need in needs(graph, store, nodes)}

    exact, narrow = weights(), weights("evaluate.dtype=bfloat16")
    embedding = 128_000 * 4096
    assert sorted(exact.values()) == [32_000_000_000, 64_000_000_000]
    assert {name: 2 * size for name, size in narrow.items()} == {
        name: size + size // 32_000_000_000 * 4 * embedding for name, size in exact.items()
    }


def test_chunks_of_logits_are_those_that_the_device_has_room_for(
    file: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(home)
    large(graph_of(file, home), 8_000_000_000, store)

    def logits(node: str, phase: str, total: int, gpus: int = 1) -> int:
        monkeypatch.setattr(memory, "available", lambda gpus: place(total))
        graph = graph_of(file, home, f"resources.gpus={gpus}", "evaluate.shift={}")
        (need,) = needs(graph, store, [next(each for each in graph.nodes if each.id.startswith(node))])
        held = need.phases[phase]
        # Beside the logits and what comes after them.
        return held["logits"], sum(held.values()) - held["logits"] - held.get("head's gradient", 0)

    for node, phase, copies in (("student@0", "update", terms.TAUGHT_COPIES), ("shift", "comparison", 9)):
        _, held = logits(node, phase, 0)
        for room, chunk in ((64 * GIB, GIB), (4 * GIB, GIB // 4), (0, GIB // 16)):
            assert logits(node, phase, held + room)[0] == copies * chunk
        assert logits(node, phase, held + 64 * GIB, gpus=0)[0] == copies * terms.CHUNK_BYTES


def test_what_would_make_full_training_fit_is_named(file: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(home)
    for gpus in (1, 4):
        large(graph_of(file, home, f"resources.gpus={gpus}"), 8_000_000_000, store)

    def problem(gpus: int, *overrides: str, host: int = 1000 * GIB) -> str:
        monkeypatch.setattr(memory, "available", lambda gpus: place(20 * GIB if gpus else host))
        graph = graph_of(file, home, f"resources.gpus={gpus}", *overrides)
        return fit(graph, store, [graph.node("student@0")])[0][-1]

    assert "(optimizer: {states: 8bit})" in problem(1)
    assert "(optimizer: {states: 8bit, paged: true})" in problem(1, "merge.optimizer.states=8bit")
    assert "optimizer: " not in problem(1, "merge.optimizer={states: 8bit, paged: true}")
    assert "optimizer: " not in problem(1, "merge.lora={}")
    assert "(cpu_offload: true)" in problem(4, "merge.sharding=fsdp")
    offloaded = ("merge.sharding=fsdp", "merge.cpu_offload=true")
    assert "cpu_offload" not in problem(4, *offloaded)
    line = problem(4, *offloaded, host=100 * GIB)
    assert "in the host's memory 119.21); this machine has 100.0 GiB: use more memory" in line
