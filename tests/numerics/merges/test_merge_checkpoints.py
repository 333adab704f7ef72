"""Weight merges of whole checkpoints: full and adapters, tied heads, tokenizers, roles, and what is refused."""

from collections.abc import Callable, Mapping

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import stages.merge
from base.errors import UserError
from base.store.checkpoint import Artifact, Store
from base.store.journal import read
from stages.config.merge import WeightMergeConfig
from stages.config.training import LoraConfig, TinyModelConfig
from stages.learner.workspace import Workspace
from stages.merge import choose_experts, merge
from stages.model.adapters import peft_config
from stages.model.policy import Policy, load_policy
from stages.model.tiny import character_tokenizer, tiny_model
from stages.rows.trained_on import TrainedOn
from tests.numerics.conftest import tiny_policy
from tests.support.families import write_model

METHODS = ["weight_average", "task_arithmetic", "ties", "dare_linear", "dare_ties"]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

Make = Callable[..., Artifact]


def method(name: str, **options: object) -> WeightMergeConfig:
    return WeightMergeConfig.model_validate({"method": name, **options})


def weights_of(checkpoint: Artifact) -> dict[str, Tensor]:
    return load_file(checkpoint.path / "model.safetensors")


def distance(one: Artifact, other: Artifact) -> float:
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@pytest.fixture
def place(workspace: Callable[..., Workspace]) -> Callable[..., Workspace]:
    """A merge's workspace: `place(key, start, {name: expert}, seed=0)`."""

    def make(key: str, start: Artifact, experts: Mapping[str, Artifact], seed: int = 0) -> Workspace:
        return workspace(key, {"start": start} | {f"teacher/{n}": expert for n, expert in experts.items()}, {}, seed)

    return make


@pytest.fixture
def adapter(store: Store, workspace: Callable[..., Workspace]) -> Make:
    """Commit a random adapter of a base: `adapter(key, base, seed)`."""

    def make(key: str, base: Artifact, seed: int) -> Artifact:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base.uri), peft_config(LoraConfig(rank=4)))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0.0, 0.1, generator=generator)
        folder = store.staging(key)
        Policy(model, character_tokenizer(), base.key).save(folder)
        return workspace(key, {}, {}).commit(
            folder, trained_on=TrainedOn(unknown=(key,)), metrics={}, adapter_base=base.key
        )

    return make


def test_the_average_of_equal_experts_is_the_expert(checkpoint, place) -> None:
    start, expert = checkpoint("start", 0), checkpoint("expert", 1)
    twin = checkpoint("twin", 1)
    assert twin.digest == expert.digest
    once = stages.merge.run(method("weight_average"), place("once", start, {"sort": expert, "reverse": twin}))
    assert distance(once, expert) == 0.0
    # As three experts apart, too.
    one = weights_of(expert)[EMBEDDING]
    assert torch.equal(merge(method("weight_average"), one * 0, [one, one, one], [1.2, 0.9, 0.9], [0]), one)


def test_a_scale_of_zero_is_the_start(checkpoint, place) -> None:
    start, experts = checkpoint("start", 0), {"sort": checkpoint("one", 1), "reverse": checkpoint("two", 2)}
    for name in METHODS[1:]:
        merged = stages.merge.run(method(name, scale=0.0), place(f"zero-{name}", start, experts))
        assert distance(merged, start) == 0.0
        assert merged.manifest["metrics"]["merge/norm"] == 0.0


@pytest.mark.parametrize("name", METHODS)
def test_a_merge_is_a_whole_checkpoint(store, checkpoint, place, name) -> None:
    start, experts = checkpoint("start", 0), {"sort": checkpoint("one", 1), "reverse": checkpoint("two", 2)}
    merged = stages.merge.run(method(name), place("merged", start, experts))
    store.verify(merged)
    assert {file.name for file in merged.path.iterdir()} == {file.name for file in start.path.iterdir()}
    model = AutoModelForCausalLM.from_pretrained(merged.uri)
    tokenizer = AutoTokenizer.from_pretrained(merged.uri)
    tokens_BT = torch.tensor([tokenizer("sort: bca")["input_ids"]])
    logits_BTV = model(tokens_BT).logits
    assert torch.isfinite(logits_BTV).all()
    assert HEAD not in weights_of(merged)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    # Tensor by tensor what `merge` says of the files.
    ours, theirs = weights_of(start), [weights_of(experts[expert]) for expert in ("reverse", "sort")]
    for tensor, found in weights_of(merged).items():
        names = sorted([EMBEDDING, HEAD])[0] if tensor == EMBEDDING else tensor
        expected = merge(method(name), ours[tensor], [their[tensor] for their in theirs], [1.0, 1.0], [0, names])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_metrics_are_the_geometry_of_the_task_vectors(checkpoint, place) -> None:
    start, experts = checkpoint("start", 0), {"sort": checkpoint("one", 1), "reverse": checkpoint("two", 2)}
    where = place("merged", start, experts)
    merged = stages.merge.run(method("task_arithmetic"), where)
    own = weights_of(start)

    def vector(of: Artifact) -> Tensor:
        return torch.cat([(tensor - own[name]).flatten() for name, tensor in sorted(weights_of(of).items())]).double()

    one, two = vector(experts["sort"]), vector(experts["reverse"])
    expected = {
        "merge/norm": float(vector(merged).norm()),
        "merge/norm/sort": float(one.norm()),
        "merge/norm/reverse": float(two.norm()),
        "merge/cosine/reverse/sort": float(torch.cosine_similarity(one, two, dim=0)),
    }
    assert merged.manifest["metrics"] == pytest.approx(expected, rel=1e-4)
    told = [record["values"] for record in read(where.folder / "journal.jsonl") if record["kind"] == "metrics"]
    assert told == [merged.manifest["metrics"]]


@pytest.mark.parametrize("name", METHODS)
def test_adapters_merge_as_the_weights_they_stand_for(store, checkpoint, workspace, adapter, place, name) -> None:
    start, base = checkpoint("start", 0), checkpoint("base", 1)
    # One adapter on the start, one on another base; the third expert is full.
    adapters = {"sort": adapter("sort", start, 1), "reverse": adapter("reverse", base, 2)}
    full = {}
    for expert, artifact in adapters.items():
        folder = store.staging(f"full-{expert}")
        load_policy(artifact, store, trainable=True).save(folder)
        full[expert] = workspace(f"full-{expert}", {}, {}).commit(folder, trained_on=TrainedOn(), metrics={})
    other = {"uppercase": checkpoint("other", 3)}
    assert distance(full["sort"], start) > 0.01
    from_adapters = stages.merge.run(method(name), place("from-adapters", start, adapters | other))
    from_full = stages.merge.run(method(name), place("from-full", start, full | other))
    ours, theirs = weights_of(from_adapters), weights_of(from_full)
    # Rounding may turn which of two near-equal entries is the last to stay.
    off = sum(int((~torch.isclose(ours[t], theirs[t], rtol=1e-4, atol=1e-6)).sum()) for t in theirs)
    assert off <= (4 if name == "ties" else 0)
    assert from_adapters.manifest["adapter_base"] is None
    # What the parents saw, the student's weights have seen.
    assert from_adapters.manifest["trained_on"]["unknown"] == ["sort", "reverse"]


def test_an_adapter_that_is_more_than_low_rank_is_refused(store, workspace, checkpoint, place) -> None:
    start = checkpoint("start", 0)
    shape = peft_config(LoraConfig(rank=4))
    shape.use_dora = True
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(start.uri), shape)
    folder = store.staging("dora")
    Policy(model, character_tokenizer(), start.key).save(folder)
    dora = workspace("dora", {}, {}).commit(folder, trained_on=TrainedOn(), metrics={}, adapter_base=start.key)
    with pytest.raises(UserError, match=r"dora: its adapter holds .*magnitude.*, which is not a low-rank factor"):
        stages.merge.run(method("ties"), place("merged", start, {"sort": dora}))


def test_integers_are_the_starts_own(checkpoint, place, monkeypatch) -> None:
    start, expert = checkpoint("start", 0), checkpoint("expert", 1)
    load = stages.merge.load_start

    def counting(*arguments: object, **options: object) -> Policy:
        policy = load(*arguments, **options)
        policy.model.register_buffer("steps", torch.tensor([3]))
        return policy

    monkeypatch.setattr(stages.merge, "load_start", counting)
    merged = stages.merge.run(method("weight_average"), place("merged", start, {"sort": expert}))
    kept = weights_of(merged)
    assert kept.pop("steps").tolist() == [3]
    assert all(torch.equal(tensor, weights_of(expert)[name]) for name, tensor in kept.items())


def test_a_start_that_is_an_adapter_becomes_full(store, checkpoint, adapter, place) -> None:
    base = checkpoint("base", 0)
    start, expert = adapter("start", base, 1), adapter("expert", base, 2)
    merged = stages.merge.run(method("task_arithmetic", scale=1.0), place("merged", start, {"sort": expert}))
    tokens_BT = torch.tensor([[5, 6, 7, 8]])
    ours, theirs = (load_policy(artifact, store).model(tokens_BT).logits for artifact in (merged, expert))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert {"model.safetensors", "config.json"} <= {path.name for path in merged.path.iterdir()}


def test_the_order_of_parents_changes_nothing_and_the_seed_does(checkpoint, place) -> None:
    start, one, two = checkpoint("start", 0), checkpoint("one", 1), checkpoint("two", 2)
    config = method("dare_ties", weights={"sort": 3})
    merged = stages.merge.run(config, place("merged", start, {"sort": one, "reverse": two}))
    turned = stages.merge.run(config, place("turned", start, {"reverse": two, "sort": one}))
    assert merged.digest == turned.digest
    other = stages.merge.run(config, place("other", start, {"sort": one, "reverse": two}, seed=1))
    assert distance(other, merged) > 0


def test_a_checkpoint_in_several_roles_counts_once_unless_weights_say_otherwise(checkpoint) -> None:
    one, two = checkpoint("one", 1), checkpoint("two", 2)
    parents = {"start": one, "teacher/sort": one, "teacher/reverse": two, "teacher/also": one}

    def chosen(**weights: float) -> dict[str, float]:
        return {expert.name: expert.weight for expert in choose_experts("baselines/ties", weights, parents)}

    assert chosen() == {"also": 1.0, "reverse": 1.0}
    assert chosen(sort=1) == {"also": 1.0, "reverse": 1.0}
    assert chosen(sort=2, also=1) == {"also": 1.5, "reverse": 0.5}
    assert chosen(reverse=3) == {"also": 0.5, "reverse": 1.5}
    with pytest.raises(UserError, match=r"baselines/ties: weights\.revers: no such expert — did you mean 'reverse'\?"):
        chosen(revers=1)
    with pytest.raises(UserError, match="needs experts"):
        choose_experts("baselines/ties", {}, {"start": one})


def test_experts_of_another_shape_are_refused_by_name(store, workspace, checkpoint, place) -> None:
    start = checkpoint("start", 0)
    good = {"hidden_size": 32, "layers": 2, "heads": 2, "intermediate_size": 64, "max_length": 128}

    def odd(key: str, **changes: int) -> Artifact:
        tokenizer = character_tokenizer()
        folder = store.staging(key)
        Policy(tiny_model(TinyModelConfig(**good | changes), tokenizer, 0), tokenizer).save(folder)
        return workspace(key, {}, {}).commit(folder, trained_on=TrainedOn(), metrics={})

    for said, expert in {
        r"expert sort \(wide\): its model\.layers\.0\.mlp\..* is \(.*\), the start's": odd(
            "wide", intermediate_size=96
        ),
        r"expert sort \(short\): it has no model\.layers\.1\.": odd("short", layers=1),
        r"expert sort \(deep\): it has model\.layers\.2\..*, which the start does not have": odd("deep", layers=3),
        r"expert sort \(heads\): num_attention_heads 4 differs from the start's 2": odd("heads", heads=4),
    }.items():
        with pytest.raises(UserError, match=said):
            stages.merge.run(method("weight_average"), place("merged", start, {"sort": expert}))
    policy = tiny_policy(1)
    policy.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    folder = store.staging("speaks")
    policy.save(folder)
    speaks = workspace("speaks", {}, {}).commit(folder, trained_on=TrainedOn(), metrics={})
    with pytest.raises(UserError, match=r"expert sort \(speaks\): its tokenizer differs from the start's: chat_temp"):
        stages.merge.run(method("weight_average"), place("merged", start, {"sort": speaks}))


@pytest.mark.parametrize("family", ["qwen3-moe", "gemma3-nested"])
def test_adapters_of_a_model_whose_files_have_other_names_are_merged(family: str, store, workspace, place) -> None:
    """transformers joins the experts of a mixture into one tensor as it loads them, and nested models rename theirs."""
    folder = store.staging("start")
    write_model(family, folder)
    start = workspace("start", {}, {}).commit(folder, trained_on=TrainedOn(), metrics={})

    def adapter(key: str) -> Artifact:
        policy = load_policy(start, store, lora=LoraConfig(rank=2), trainable=True)
        with torch.no_grad():
            for parameter in policy.model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(len(key)))
        folder = store.staging(key)
        policy.save(folder)
        return workspace(key, {}, {}).commit(folder, trained_on=TrainedOn(), metrics={}, adapter_base=start.key)

    def logits(checkpoint: Artifact) -> Tensor:
        with torch.no_grad():
            return load_policy(checkpoint, store).model(input_ids=torch.arange(5, 15)[None]).logits

    one, other = adapter("one"), adapter("other")
    alone = stages.merge.run(method("task_arithmetic", scale=1.0), place("alone", start, {"sort": one}))
    assert not torch.allclose(logits(one), logits(start), atol=0.1)
    assert torch.allclose(logits(alone), logits(one), atol=1e-3)
    both = stages.merge.run(method("weight_average"), place("both", start, {"sort": one, "reverse": other}))
    assert not torch.allclose(logits(both), logits(one), atol=0.01)
    assert [path for path in (store.root / ".staging").iterdir() if any(path.iterdir())] == []
