"""The teacher pool: strict routing, residency that changes nothing, shared bases, refused tokenizers."""

from collections.abc import Callable

import pytest
import torch

import stages.sft
from experts.errors import UserError
from stages.config import DistillConfig, LoraConfig, SFTConfig
from stages.core.checkpoint import Artifact, Store
from stages.core.policy import load_policy
from stages.core.tiny import character_tokenizer
from stages.core.update import Row
from stages.core.workspace import Workspace
from stages.on_policy.losses import token_logprobs
from stages.on_policy.teachers import TeacherPool
from tests.numerics.conftest import tiny_policy

DOMAINS = ["sort", "reverse", "uppercase", "reverse", "sort"]


def make_rows() -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    return [
        Row(torch.randint(5, 100, (n,), generator=generator).tolist(), 4, torch.ones(n - 4)) for n in (9, 14, 6, 11, 20)
    ]


def own_forward(teacher: Artifact, store: Store, row: Row) -> torch.Tensor:
    policy = load_policy(teacher, store)
    with torch.no_grad():
        return policy.model(torch.tensor([row.tokens])).logits[0, row.start - 1 : -1]


@pytest.mark.parametrize("max_resident", [1, 8])
def test_each_row_is_scored_by_its_own_teacher(store, checkpoint, max_resident):
    teachers = {name: checkpoint(name, seed) for seed, name in enumerate(("sort", "reverse", "uppercase"))}
    config = DistillConfig(max_resident=max_resident, micro_batch_tokens=24)
    pool = TeacherPool(teachers, store, tiny_policy(9), config)
    rows = make_rows()
    scores = pool.score(rows, DOMAINS)
    assert len(pool.backbones) == min(3, max_resident)
    order = [3, 0, 2, 4, 1]
    logits_NV = scores.logits(order)(slice(0, None))
    expected_NV = torch.cat([own_forward(teachers[DOMAINS[i]], store, rows[i]) for i in order])
    torch.testing.assert_close(logits_NV, expected_NV, rtol=1e-4, atol=1e-4)
    part = slice(5, 12)
    torch.testing.assert_close(scores.logits(order)(part), expected_NV[part], rtol=1e-4, atol=1e-4)
    tokens_N = torch.tensor([token for i in order for token in rows[i].targets])
    torch.testing.assert_close(
        scores.logprobs(order, tokens_N, 1.0), token_logprobs(expected_NV, tokens_N), rtol=1e-4, atol=1e-4
    )


def test_adapters_share_one_base_with_the_anchor(
    store: Store, checkpoint: Callable[..., Artifact], workspace: Callable[..., Workspace], domains
):
    start = checkpoint("start", 0)
    config = SFTConfig(max_steps=3, examples=40, batch_size=8, lora=LoraConfig(rank=4))
    teachers = {
        name: stages.sft.train(config, workspace(f"lora-{name}", {"start": start}, {name: domains[name]}))
        for name in ("sort", "reverse")
    }
    teachers["uppercase"] = start
    assert "model.safetensors" not in teachers["sort"].manifest["files"]
    pool = TeacherPool(teachers, store, tiny_policy(9), DistillConfig(max_resident=1))
    rows = make_rows()
    scores = pool.score(rows, DOMAINS)
    assert list(pool.backbones) == [start.key]
    for i, name in enumerate(DOMAINS):
        expected_NV = own_forward(teachers[name], store, rows[i])
        torch.testing.assert_close(scores.logits([i])(slice(0, None)), expected_NV, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(own_forward(teachers["sort"], store, rows[0]), own_forward(start, store, rows[0]))


def test_a_domain_without_a_teacher_is_an_error(store, checkpoint):
    pool = TeacherPool({"sort": checkpoint("sort", 0)}, store, tiny_policy(9), DistillConfig())
    with pytest.raises(UserError, match="domain 'sorted' has no teacher — did you mean 'sort'"):
        pool.score(make_rows()[:1], ["sorted"])


def test_a_teacher_with_another_tokenizer_is_refused(store, workspace, checkpoint):
    other = character_tokenizer()
    other.add_tokens(["<extra>"])
    policy = tiny_policy(0)
    policy.tokenizer = other
    policy.model.resize_token_embeddings(len(other))
    place = workspace("odd", {}, {})
    folder = store.staging("odd")
    policy.save(folder)
    teacher = place.commit(folder, sources={}, metrics={})
    with pytest.raises(UserError, match=r"merge\.teachers\.reverse: the tokenizer of teacher odd differs"):
        TeacherPool({"sort": checkpoint("sort", 0), "reverse": teacher}, store, tiny_policy(9), DistillConfig())
