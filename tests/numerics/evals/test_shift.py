"""How far a checkpoint moved: divergences against plain softmaxes, changed weights and cosines by hand."""

import json
from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from base.store.checkpoint import Artifact
from base.store.journal import JOURNAL_FILE, read
from evals.comparison.shift_sheet import read_cosines, read_shift
from evals.measure import shift, task_vectors
from evals.measure.shift import divergences, domain_shift
from evals.measure.task_vectors import cosines, part_of, weight_shift
from experts.domain import HELD_OUT
from stages.config.kinds import NoConfig
from stages.config.shift import ShiftRequest
from stages.config.training import LoraConfig
from stages.merge import Expert, Geometry
from stages.model.adapters import peft_config
from stages.model.policy import Policy, load_policy
from stages.model.weights import StoredWeights
from stages.rows.chat import encode_prompt
from stages.rows.trained_on import TrainedOn
from stages.sampling.sampler import sample
from stages.sampling.samples import Sampling
from tests.numerics.conftest import tiny_policy

REQUEST = ShiftRequest(examples=5, max_new_tokens=8, batch_size=64)
LAYER = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def edited(store, workspace) -> Callable[..., Artifact]:
    """Commit a tiny checkpoint of seed 0 with some tensors changed in place: `edited(key, change)`."""

    def make(key: str, change: Callable[[dict[str, Tensor]], None]) -> Artifact:
        policy, folder = tiny_policy(0), store.staging(key)
        with torch.no_grad():
            change(policy.model.state_dict())
        policy.save(folder)
        return workspace(key, {}, {}).commit(folder, trained_on=TrainedOn(), metrics={})

    return make


def untouched(weights: dict[str, Tensor]) -> None:
    del weights


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_divergences_are_those_of_the_whole_distributions(domains, temperature):
    start, policy = tiny_policy(0), tiny_policy(1)
    prompts = [encode_prompt(start.tokenizer, e.prompt) for e in domains["sort"].draw(HELD_OUT, 6, 0)]
    drawn = [one for (one,) in sample(start, prompts, 1, Sampling(9), 3)]
    assert len({len(one.tokens) for one in drawn}) > 1
    found = divergences(start, policy, drawn, temperature)
    for number, one in enumerate(drawn):
        ids, first = torch.tensor([one.tokens]), len(one.prompt_ids) - 1
        logits = [who.model(input_ids=ids).logits[0, first:-1].double() / temperature for who in (start, policy)]
        theirs_NV, ours_NV = (each.log_softmax(-1) for each in logits)
        forward_N = (theirs_NV.exp() * (theirs_NV - ours_NV)).sum(-1)
        reverse_N = (ours_NV.exp() * (ours_NV - theirs_NV)).sum(-1)
        assert forward_N.min() > 1e-3
        torch.testing.assert_close(found["forward_kl"][number], forward_N, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["reverse_kl"][number], reverse_N, rtol=1e-4, atol=1e-5)
        entropy_N = -(ours_NV.exp() * ours_NV).sum(-1)
        torch.testing.assert_close(found["entropy"][number], entropy_N, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_has_not_moved_from_itself(domains):
    found = domain_shift(REQUEST, tiny_policy(0), tiny_policy(0), domains["sort"], 0)
    assert (found.kl_start, found.kl_policy) == (0, 0)
    assert found.entropy > 0
    # The same random numbers and the same weights: the same completions.
    assert [row.start_tokens for row in found.examples] == [row.tokens for row in found.examples]


def test_means_are_over_tokens_and_kept_by_example(domains):
    found = domain_shift(REQUEST, tiny_policy(0), tiny_policy(1), domains["reverse"], 0)
    tokens = sum(row.start_tokens for row in found.examples)
    assert found.kl_start == pytest.approx(sum(row.kl_start * row.start_tokens for row in found.examples) / tokens)
    assert found.length == pytest.approx(sum(row.tokens for row in found.examples) / 5)
    assert found.kl_start_N.mean() == pytest.approx(found.kl_start) and found.kl_start > 0
    again = domain_shift(REQUEST, tiny_policy(0), tiny_policy(1), domains["reverse"], 0)
    assert again == found


def test_changed_weights_by_hand(store, edited):
    def before(weights: dict[str, Tensor]) -> None:
        weights[NORM].fill_(1.0)
        weights[LAYER].fill_(0.01)

    def after(weights: dict[str, Tensor]) -> None:
        before(weights)
        # bfloat16 has 8 bits: from 1 on it moves in steps of 1/128, from 0.01 on in steps of 1/16384.
        weights[NORM][:3] += 0.001
        weights[NORM][3] += 0.01
        weights[NORM][4] += 5e-6
        weights[LAYER][0, :7] += 0.001

    found = weight_shift(*(StoredWeights(edited(k, change), store) for k, change in (("b", before), ("a", after))))
    names = load_file(store.get("b").path / "model.safetensors")
    total, layer = (sum(t.numel() for n, t in names.items() if key in n) for key in ("", "layers.1."))
    assert (found.weights, found.layers[1].weights) == (total, layer)
    assert found.changed_float32 * total == pytest.approx(4 + 7)
    assert found.changed_bfloat16 * total == pytest.approx(1 + 7)
    assert found.layers[0].changed_float32 == 0 and found.layers[1].changed_float32 == pytest.approx(7 / layer)
    assert found.rest.weights == 32 and found.rest.changed_float32 == 4 / 32 and found.rest.changed_bfloat16 == 1 / 32
    moved = (3 * 0.001**2 + 0.01**2 + 5e-6**2) ** 0.5
    assert found.rest.relative_norm == pytest.approx(moved / 32**0.5, rel=1e-3)
    assert found.embeddings.relative_norm == 0


def test_a_tied_head_is_counted_once():
    assert [part_of(name) for name in (EMBEDDING, LAYER, NORM, "lm_head.weight")] == ["embeddings", "1", "rest", "head"]
    assert part_of("transformer.h.11.attn.c_attn.weight") == "11"
    assert part_of("transformer.wte.weight") == "embeddings"


def test_an_adapter_counts_as_the_weights_it_stands_for(store, workspace, edited, domains):
    base = edited("base", untouched)
    model = get_peft_model(load_policy(base, store).model, peft_config(LoraConfig(rank=2, target_modules=["up_proj"])))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.fill_(0.1)
    folder = store.staging("adapter")
    Policy(model, tiny_policy(0).tokenizer, base.key).save(folder)
    adapter = workspace("adapter", {}, {}).commit(folder, trained_on=TrainedOn(), metrics={}, adapter_base=base.key)
    parents = {"start": base, "checkpoint": adapter}
    place = workspace("shift", parents, {name: domains[name] for name in ("sort", "uppercase")})
    artifact = shift.run(REQUEST, place)
    found = read_shift(artifact.path)
    changed, layer = 64 * 32, found.weights.layers[0]
    assert layer.changed_float32 == pytest.approx(changed / layer.weights)
    assert found.weights.embeddings.changed_float32 == 0
    assert list(found.domains) == ["sort", "uppercase"] and found.domains["sort"].kl_policy > 0
    values = artifact.manifest["metrics"]
    assert values["shift/kl_start/sort"] == found.domains["sort"].kl_start
    assert values["shift/changed_float32"] == found.weights.changed_float32
    records = list(read(place.folder / JOURNAL_FILE))
    assert [r["values"] for r in records if r["kind"] == "metrics"] == [values]
    assert "trained_on" not in artifact.manifest


def test_cosines_by_hand(store, workspace, edited):
    def moved(*steps: float) -> Callable[[dict[str, Tensor]], None]:
        def change(weights: dict[str, Tensor]) -> None:
            for position, step in enumerate(steps):
                weights[(LAYER, EMBEDDING)[position % 2]].view(-1)[position] += step

        return change

    start = edited("start", untouched)
    experts = {"a": edited("a", moved(3, 4)), "b": edited("b", moved(4, 3)), "c": edited("c", moved(0, 0, 1))}
    same = {**experts, "d": edited("d", untouched)}
    stored = {name: StoredWeights(artifact, store) for name, artifact in same.items()}
    geometry = Geometry([Expert(name, artifact, 1.0) for name, artifact in same.items()])
    found = cosines(StoredWeights(start, store), stored, geometry)
    assert found.values() == pytest.approx({("a", "b"): 24 / 25, ("a", "c"): 0, ("b", "c"): 0}, abs=1e-5)
    assert found.cosines[3] == [None] * 4 and found.cosines[0][0] == pytest.approx(1)
    place = workspace("cosines", {"start": start} | {f"expert/{n}": e for n, e in experts.items()}, {})
    artifact = task_vectors.run(NoConfig(), place)
    assert read_cosines(artifact.path).experts == ["a", "b", "c"]
    assert artifact.manifest["metrics"]["cosine/a/b"] == pytest.approx(24 / 25)
    assert json.loads((artifact.path / "cosines.json").read_text())["cosines"][0][1] == pytest.approx(24 / 25)
