"""Memory of vLLM servers: what one needs, how several share a device, and what does not fit."""

import json
from pathlib import Path

import pytest

from base.store.checkpoint import Store
from flows.engines import memory
from flows.engines import memory_terms as terms
from flows.engines.device_memory import Memory
from flows.engines.memory import fit
from flows.engines.server_memory import Served, memory_shares, pack, room
from flows.engines.shapes import Shape, shape_of_config
from flows.plan.nodes import StageGraph
from flows.run_file.resources import ResourcesConfig, TeacherServersConfig
from stages.config.distill import DistillConfig
from stages.vllm.settings import SCORED_TOKENS
from tests.support.scored_home import graph_of, run_file

GIB = 2**30
CARD = 80 * GIB
QWEN3_8B = Shape(
    8_190_735_360, 4096, 36, 151_936, queries=4096, keys=1024, inner=12288, normed_heads=True, context=40960
)
SETTINGS = TeacherServersConfig()


def served(shape: Shape = QWEN3_8B, ranks: tuple[int, ...] = (), devices: int = 1, **config: object) -> Served:
    made = DistillConfig.model_validate({"dtype": "bfloat16", "max_new_tokens": 1024, **config})
    return Served("a teacher", shape, made, ranks, devices, True)


def test_a_server_needs_its_weights_and_a_row() -> None:
    own = served(max_prompt_tokens=1023)
    assert own.weights == 2 * QWEN3_8B.parameters
    # A row of 1023 + 1024 tokens and one more, 144 KiB a token.
    assert own.row == 2048 * 36 * 2 * 1024 * 2
    assert own.weights + own.row < own.least < own.weights + own.row + 3 * GIB
    # Without a limit of prompts a server has room for the model's whole context.
    assert served().row == 40960 * 36 * 2 * 1024 * 2
    halves = served(devices=2)
    assert (halves.weights, halves.row) == (own.weights // 2, served().row // 2)
    # Three slots of rank 16 for two adapters.
    assert served(ranks=(12, 4)).weights - own.weights == 3 * 2 * terms.adapter_parameters(QWEN3_8B, 16)
    # The logits of a pass are outside of its share.
    assert own.outside > SCORED_TOKENS * 151_936 * (2 + 4 + 4)


def test_the_largest_go_where_there_is_room() -> None:
    assert pack([5, 9, 1, 4], 2) == [1, 0, 0, 1]
    assert pack([9, 1, 1, 1], 2, most=2) == [0, 1, 1, 0]
    assert pack([7, 7, 7], 3) == [0, 1, 2]
    assert pack([0, 0, 0], 2) == [0, 1, 0]


def test_shares_of_one_card_leave_room_for_what_is_outside_of_them() -> None:
    group = [served(max_prompt_tokens=1024) for _ in range(3)]
    shares = memory_shares(group, SETTINGS, CARD)
    assert len(set(shares)) == 1
    taken = sum(share * CARD + each.outside for share, each in zip(shares, group, strict=True))
    assert 0.99 * CARD < taken <= CARD
    # So each of them starts beside the others.
    assert all(share * CARD >= each.least for share, each in zip(shares, group, strict=True))
    # A small one beside a large one: both get what they need, and as many tokens more.
    small = served(Shape(600_000_000, 1024, 28, 151_936, queries=2048, keys=1024, inner=3072, context=40960))
    large = served(max_prompt_tokens=1024)
    one, other = memory_shares([small, large], SETTINGS, CARD)
    more = [(share * CARD - each.least) / each.token for share, each in ((one, small), (other, large))]
    assert more[0] == pytest.approx(more[1], rel=0.01)
    assert one + other <= 0.9


def test_a_server_alone_takes_the_share_it_is_given_unless_its_logits_need_more() -> None:
    assert memory_shares([served()], SETTINGS, CARD) == [0.9]
    assert memory_shares([served()], SETTINGS, 0) == [0.9]
    (share,) = memory_shares([served()], SETTINGS, 24 * GIB)
    assert share * 24 * GIB <= 24 * GIB - served().outside < 0.9 * 24 * GIB


def test_without_a_known_memory_the_share_is_divided_by_size() -> None:
    one, two = memory_shares([served(), served(devices=2)], SETTINGS, 0)
    assert one + two == pytest.approx(0.9, abs=1e-3)
    assert one / two == pytest.approx(served().least / served(devices=2).least, rel=1e-2)
    # Nor are they all known by their shape.
    assert memory_shares([served(Shape()), served(Shape())], SETTINGS, 0) == [0.45, 0.45]
    # What does not fit is started all the same where it is wanted, each with a part.
    crowd = memory_shares([served()] * 5, SETTINGS, CARD)
    assert sum(crowd) == pytest.approx(0.9, abs=1e-3) and room([served()] * 5, 0.9, CARD) < 5 * served().least


def eight_billion(graph: StageGraph, store: Store) -> None:
    base = graph.node("base@0")
    folder = store.staging(base.key)
    shape = {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
    shape |= {"vocab_size": 151_936, "intermediate_size": 12288, "max_position_embeddings": 40960, "head_dim": 128}
    assert shape_of_config(shape, 0).keys == QWEN3_8B.keys
    (folder / "config.json").write_text(json.dumps(shape))
    facts = {"stage": "pretrain", "seed": 0, "config": dict(base.config), "parents": {}, "parameters": 8_190_735_360}
    store.commit(folder, base.key, {"name": "base", "seconds": 10.0, "tokens": 5, "metrics": {}, **facts})


def test_servers_that_do_not_fit_are_refused_with_their_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, home = run_file(tmp_path), tmp_path / "home"
    store = Store(home)
    scored = ("merge.teacher_backend=vllm_server", "merge.objective=sampled_reverse_kl", "resources.gpus=1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(memory, "available", lambda gpus: Memory(70 * GIB, 70 * GIB, "a GPU", "a card"))

    def refused(*overrides: str) -> list[str]:
        graph = graph_of(file, home, *scored, *overrides)
        if store.find(graph.node("base@0").key) is None:
            eight_billion(graph, store)
        problems, _ = fit(graph, store, [graph.node("student@0")])
        return [problem for problem in problems if problem.startswith("resources.")]

    narrow = ("merge.dtype=bfloat16", "merge.max_prompt_tokens=1024")
    # Three full teachers on the one device that the trainer leaves.
    assert refused(*narrow) == []
    (line,) = refused("merge.dtype=bfloat16")
    assert line.startswith("resources.teacher_servers: student@0: 3 vLLM servers on a device need ")
    assert "a row's cache 5.62" in line and "set max_prompt_tokens" in line and "lower " in line
    assert line.endswith("--ignore-memory runs it all the same")
    (line,) = refused("merge.max_prompt_tokens=1024")
    assert "a GPU has 70.00" in line and "dtype: bfloat16" in line
    # With a device each they fit in float32 too.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert refused("merge.max_prompt_tokens=1024") == []
    (line,) = refused("merge.max_prompt_tokens=1024", "resources.teacher_servers.per_device=3")
    assert "lower resources.teacher_servers.per_device" in line
    # Where they are given by address nothing of this machine is counted.
    assert refused("resources.teacher_servers.urls=['http://127.0.0.1:9']") == []
    monkeypatch.setattr(memory, "available", lambda gpus: Memory(12 * GIB, 12 * GIB, "a GPU", "a card"))
    (line,) = (each for each in refused(*narrow, "resources.sampler=vllm_server") if "rollout" in each)
    assert line.startswith("resources.rollout_servers: student@0: 1 vLLM server on a device need ")


def test_an_engine_in_each_process_fits_in_its_share_or_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, home = run_file(tmp_path), tmp_path / "home"
    store = Store(home)
    monkeypatch.setattr(memory, "available", lambda gpus: Memory(CARD, CARD, "a GPU", "a card"))

    def refused(*overrides: str) -> list[str]:
        sharded = ("resources.gpus=4", "resources.sampler=vllm", "merge.sharding=fsdp", "merge.dtype=bfloat16")
        graph = graph_of(file, home, *sharded, *overrides)
        if store.find(graph.node("base@0").key) is None:
            eight_billion(graph, store)
        student = graph.node("student@0")
        (need,) = memory.needs(graph, store, [student])
        # Every process has its own engine on its own device.
        share = student.config["sampler"]["memory_share"]
        assert need.phases["rollout"]["vLLM's share of the device"] == int(share * CARD)
        assert "sampler's cache" not in need.phases["rollout"]
        return [problem for problem in fit(graph, store, [student])[0] if "vLLM engine" in problem]

    assert refused() == []
    (line,) = refused("merge.sampler.memory_share=0.2")
    assert line.startswith("sampler.memory_share: student@0: 1 vLLM engine on a device need ")
    assert "of which they get 16.00: raise sampler.memory_share, or take sampler.backend: vllm_server" in line


def test_an_evaluations_engine_fits_in_half_of_a_device_or_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, home = run_file(tmp_path), tmp_path / "home"
    store = Store(home)

    def refused(card: int, *overrides: str) -> list[str]:
        monkeypatch.setattr(memory, "available", lambda gpus: Memory(card, card, "a GPU", "a card"))
        graph = graph_of(file, home, "resources.gpus=1", "evaluate.backend=vllm", *overrides)
        if store.find(graph.node("base@0").key) is None:
            eight_billion(graph, store)
        node = graph.node("eval/student/sort/held_out@0")
        (need,) = memory.needs(graph, store, [node])
        assert need.parts["vLLM's share of the device"] == int(0.5 * card)
        assert need.parts["weights"] > 14 * GIB and "sampler's cache" not in need.parts
        return fit(graph, store, [node])[0]

    assert refused(CARD, "evaluate.dtype=bfloat16") == []
    (line,) = [each for each in refused(24 * GIB, "evaluate.dtype=bfloat16") if "vLLM engine" in each]
    assert line.startswith("evaluate.backend: eval/student/sort/held_out@0: 1 vLLM engine on a device need ")
    assert "of which they get 12.00: lower evaluate.batch_size, or take evaluate.backend: transformers" in line
    assert line.endswith("--ignore-memory runs it all the same")


def test_a_count_of_servers_is_checked() -> None:
    assert ResourcesConfig.model_validate({"teacher_servers": {"per_device": 4}}).teacher_servers.per_device == 4
    with pytest.raises(ValueError, match="per_device"):
        ResourcesConfig.model_validate({"teacher_servers": {"per_device": 0}})
