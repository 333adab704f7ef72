"""The teacher pool: strict routing, residency that changes nothing, shared bases, refused tokenizers."""

import gc
import threading
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

import stages.sft
import stages.teachers.residency
from base.errors import UserError
from base.store.checkpoint import Artifact, Store
from stages.config.distill import DistillConfig
from stages.config.training import LoraConfig, SFTConfig
from stages.learner.update import Row
from stages.learner.workspace import Workspace
from stages.losses.divergences import reverse_kl
from stages.losses.log_probabilities import token_logprobs
from stages.model.policy import load_policy
from stages.model.tiny import character_tokenizer
from stages.on_policy.off_policy import TeacherWriter
from stages.on_policy.preflight import SamplerCheck, preflight
from stages.rows.trained_on import TrainedOn
from stages.sampling.sampler import TransformersSampler
from stages.teachers.residency import may_wait
from stages.teachers.scoring import Routed, TeacherPool
from tests.numerics.conftest import tiny_policy

DOMAINS = ["sort", "reverse", "uppercase", "reverse", "sort"]


def make_rows() -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    return [
        Row(torch.randint(5, 100, (n,), generator=generator).tolist(), 4, torch.ones(n - 4)) for n in (9, 14, 6, 11, 20)
    ]


def routes(teachers: Mapping[str, Artifact]) -> dict[str, tuple[Routed]]:
    return {domain: (Routed(teacher),) for domain, teacher in teachers.items()}


def own_forward(teacher: Artifact, store: Store, row: Row) -> torch.Tensor:
    policy = load_policy(teacher, store)
    with torch.no_grad():
        return policy.model(torch.tensor([row.tokens])).logits[0, row.start - 1 : -1]


@pytest.mark.parametrize("cache", ["device", "cpu"])
@pytest.mark.parametrize("max_resident", [1, 2, 8])
def test_each_row_is_scored_by_its_own_teacher(store, checkpoint, max_resident, cache):
    teachers = {name: checkpoint(name, seed) for seed, name in enumerate(("sort", "reverse", "uppercase"))}
    config = DistillConfig(max_resident=max_resident, micro_batch_tokens=24, teacher_cache=cache)
    pool = TeacherPool(routes(teachers), store, tiny_policy(9), config)
    rows = make_rows()
    for _ in range(3):
        scores = pool.score(rows, DOMAINS)
    assert set(scores.seconds) == {"sort", "reverse", "uppercase"}
    assert len(pool.residents.bases) == min(3, max_resident)
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
    pool = TeacherPool(routes(teachers), store, tiny_policy(9), DistillConfig(max_resident=1))
    rows = make_rows()
    scores = pool.score(rows, DOMAINS)
    assert list(pool.residents.bases) == [start.key]
    for i, name in enumerate(DOMAINS):
        expected_NV = own_forward(teachers[name], store, rows[i])
        torch.testing.assert_close(scores.logits([i])(slice(0, None)), expected_NV, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(own_forward(teachers["sort"], store, rows[0]), own_forward(start, store, rows[0]))


def test_a_teacher_that_does_more_to_its_logits_is_refused(store, checkpoint, monkeypatch):
    pool = TeacherPool(routes({"sort": checkpoint("sort", 0)}), store, tiny_policy(9), DistillConfig())
    pool.residents.bases.clear()
    forward = Qwen3ForCausalLM.forward

    def scaled(self: Qwen3ForCausalLM, *arguments: object, **options: object) -> object:
        output = forward(self, *arguments, **options)
        output.logits = output.logits / 8
        return output

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", scaled)
    with pytest.raises(UserError, match="sort: Qwen3ForCausalLM does more to its logits than a linear head"):
        pool.score(make_rows()[:1], ["sort"])


def test_no_teacher_carries_gradients(store, checkpoint):
    student = tiny_policy(9)
    pool = TeacherPool(routes({"sort": checkpoint("sort", 0)}), store, student, DistillConfig())
    scores = pool.score(make_rows()[:1], ["sort"])
    assert not scores.logits([0])(slice(None)).requires_grad
    with pool.teaching("sort") as teacher:
        assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_several_teachers_of_a_domain_are_their_geometric_mean(store, checkpoint):
    one, two = checkpoint("one", 1), checkpoint("two", 2)
    taught = {"sort": (Routed(one, 3.0), Routed(two, 1.0)), "reverse": (Routed(two),)}
    pool = TeacherPool(taught, store, tiny_policy(9), DistillConfig(max_resident=1))
    rows, domains = make_rows()[:3], ["reverse", "sort", "reverse"]
    target_NV = pool.score(rows, domains).logits([0, 1, 2])(slice(None))
    lengths = [row.scored for row in rows]
    first_NV, mean_NV, _ = target_NV.split(lengths)
    torch.testing.assert_close(first_NV, own_forward(two, store, rows[0]), rtol=1e-4, atol=1e-4)
    one_NV, two_NV = (own_forward(teacher, store, rows[1]).log_softmax(-1) for teacher in (one, two))
    pooled_NV = (0.75 * one_NV + 0.25 * two_NV).softmax(-1)
    torch.testing.assert_close(mean_NV.softmax(-1), pooled_NV, rtol=1e-4, atol=1e-6)
    # The divergence from it moves the student as the weighted sum of the divergences from each does.
    student_NV = torch.randn(mean_NV.shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    together = reverse_kl(student_NV, mean_NV)[0].sum()
    apart = (0.75 * reverse_kl(student_NV, one_NV)[0] + 0.25 * reverse_kl(student_NV, two_NV)[0]).sum()
    ours, theirs = (torch.autograd.grad(loss, student_NV) for loss in (together, apart))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_next_teacher_is_read_while_one_scores(store, checkpoint, monkeypatch):
    teachers = {name: checkpoint(name, seed) for seed, name in enumerate(("sort", "reverse", "uppercase"))}
    pool = TeacherPool(routes(teachers), store, tiny_policy(9), DistillConfig(max_resident=2))
    readers: list[str] = []
    read = stages.teachers.residency._read

    def noted(base: Artifact) -> dict[str, torch.Tensor]:
        readers.append(threading.current_thread().name)
        assert len(pool.residents.bases) <= 2
        return read(base)

    monkeypatch.setattr(stages.teachers.residency, "_read", noted)
    pool.score(make_rows(), DOMAINS)
    # Two were in memory from the check of their heads; the third comes by the thread, and nothing else is read.
    assert len(readers) == 1
    assert readers[0].startswith("teacher")
    assert len(pool.residents.bases) == 2


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("max_resident", [1, 2, 3])
def test_never_more_bases_in_memory_than_allowed(
    store, checkpoint, workspace, domains, monkeypatch, request, max_resident, adapters
):
    teachers = {name: checkpoint(name, seed) for seed, name in enumerate(("sort", "reverse", "uppercase", "double"))}
    if adapters:
        config = SFTConfig(max_steps=1, examples=8, batch_size=8, lora=LoraConfig(rank=4))
        teachers = {
            name: stages.sft.train(config, workspace(f"lora-{name}", {"start": start}, {"sort": domains["sort"]}))
            for name, start in teachers.items()
        }
    student = tiny_policy(9)
    # The collector no longer looks at what is there now, all imported modules: each count would take a second.
    gc.collect()
    gc.freeze()
    request.addfinalizer(gc.unfreeze)
    peaks: list[int] = []
    read, forward = stages.teachers.residency._read, TeacherPool._forward

    def noted_read(base: Artifact) -> dict[str, torch.Tensor]:
        peaks.append(_new_models() + 1)
        return read(base)

    def noted_forward(pool: TeacherPool, model: torch.nn.Module, rows: Sequence[Row]) -> list[torch.Tensor]:
        peaks.append(_new_models())
        return forward(pool, model, rows)

    monkeypatch.setattr(stages.teachers.residency, "_read", noted_read)
    monkeypatch.setattr(TeacherPool, "_forward", noted_forward)
    config = DistillConfig(max_resident=max_resident, max_new_tokens=4, preflight_tolerance=100.0)
    # One domain has two teachers, so that the preflight too asks several in turn.
    taught = routes(teachers) | {"sort": (Routed(teachers["sort"]), Routed(teachers["reverse"]))}
    pool = TeacherPool(taught, store, student, config)
    examples = {name: domains[name].draw("train", 3, 0) for name in ("sort", "reverse", "uppercase")}
    preflight(SamplerCheck("student", student, TransformersSampler(student), examples, config), pool, config, print)
    writer = TeacherWriter(pool, config, SimpleNamespace(policy=student, seed=0, rank=0, shard=list))
    for step in range(2):
        pool.score(make_rows()[:4], list(teachers))
        writer.write([example for drawn in examples.values() for example in drawn], step)
    assert max(peaks) == max_resident


def _new_models() -> int:
    """Models made since, unreachable ones that wait for the garbage collector too."""
    return sum(type(found) is Qwen3ForCausalLM for found in gc.get_objects())


def test_a_student_on_the_same_base_lends_it(store, checkpoint, workspace, domains):
    start = checkpoint("start", 0)
    config = SFTConfig(max_steps=3, examples=40, batch_size=8, lora=LoraConfig(rank=4))
    teachers = {
        name: stages.sft.train(config, workspace(f"lora-{name}", {"start": start}, {name: domains[name]}))
        for name in ("sort", "reverse")
    } | {"uppercase": start}
    student = load_policy(start, store, lora=LoraConfig(rank=4), trainable=True, seed=5)
    flags = {name: p.requires_grad for name, p in student.model.named_parameters()}
    saved = student.model.state_dict().keys()
    rows = make_rows()
    before_NV = student.model(torch.tensor([rows[0].tokens])).logits
    pool = TeacherPool(routes(teachers), store, student, DistillConfig(lora=LoraConfig(rank=4)), share_base=True)
    scores = pool.score(rows, DOMAINS)
    assert not pool.residents.bases
    for i, name in enumerate(DOMAINS):
        expected_NV = own_forward(teachers[name], store, rows[i])
        torch.testing.assert_close(scores.logits([i])(slice(0, None)), expected_NV, rtol=1e-4, atol=1e-4)
    # The student is as it was: outputs, what is trained, and what is saved.
    assert torch.equal(student.model(torch.tensor([rows[0].tokens])).logits, before_NV)
    after = {name: p.requires_grad for name, p in student.model.named_parameters()}
    assert {name: after[name] for name in flags} == flags
    assert not any(after[name] for name in after.keys() - flags.keys())
    assert student.model.active_adapter == "default"
    assert set(saved) < set(student.model.state_dict())
    folder = store.staging("saved")
    student.save(folder)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set()
    kept = load_file(folder / "adapter_model.safetensors")
    assert kept.keys() == load_file(teachers["sort"].path / "adapter_model.safetensors").keys()


def test_a_domain_without_a_teacher_is_an_error(store, checkpoint):
    pool = TeacherPool(routes({"sort": checkpoint("sort", 0)}), store, tiny_policy(9), DistillConfig())
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
    teacher = place.commit(folder, trained_on=TrainedOn(), metrics={})
    with pytest.raises(UserError, match=r"merge\.teachers\.reverse: the tokenizer of teacher odd differs"):
        TeacherPool(routes({"sort": checkpoint("sort", 0), "reverse": teacher}), store, tiny_policy(9), DistillConfig())


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "adapters"])
def test_teachers_that_wait_in_the_host_s_memory_are_read_once_and_score_the_same(
    store, checkpoint, workspace, domains, monkeypatch, adapted
):
    bases = {name: checkpoint(name, seed) for seed, name in enumerate(("sort", "reverse", "uppercase"))}
    teachers = dict(bases)
    if adapted:
        config = SFTConfig(max_steps=2, examples=20, batch_size=4, lora=LoraConfig(rank=4))
        place = workspace("lora-sort", {"start": bases["sort"]}, {"sort": domains["sort"]})
        teachers["sort"] = stages.sft.train(config, place)
    config = DistillConfig(max_resident=1, dtype="bfloat16")
    own = TeacherPool(routes(teachers), store, tiny_policy(9), config).score(make_rows(), DOMAINS)
    read = []
    inner = stages.teachers.residency._read
    monkeypatch.setattr(stages.teachers.residency, "_read", lambda base: read.append(base.key) or inner(base))
    monkeypatch.setattr(stages.teachers.residency, "may_wait", lambda size, device: True)
    pool = TeacherPool(routes(teachers), store, tiny_policy(9), config)
    for _ in range(3):
        scores = pool.score(make_rows(), DOMAINS)
        assert len(pool.residents.bases) == 1
        assert len(pool.residents.waiting) == 2
    assert sorted(read) == sorted(base.key for base in bases.values())
    every = list(range(len(DOMAINS)))
    torch.testing.assert_close(scores.logits(every)(slice(None)), own.logits(every)(slice(None)), rtol=0, atol=0)
    # Narrowed before they wait.
    (first, _) = pool.residents.waiting.values()
    assert {p.dtype for name, p in first.model.named_parameters() if "q_proj" in name and "lora" not in name} == {
        torch.bfloat16
    }


def test_teachers_wait_in_the_host_s_memory_where_a_device_and_room_are():
    gpu = torch.device("cuda", 0)
    assert may_wait(2**20, gpu)
    assert not may_wait(2**20, torch.device("cpu"))
    assert not may_wait(psutil.virtual_memory().total, gpu)


def test_a_teacher_is_checked_without_the_autocast_of_a_gathered_student(store, checkpoint):
    config = DistillConfig(dtype="bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        pool = TeacherPool(routes({"sort": checkpoint("sort", 0)}), store, tiny_policy(9), config)
    assert list(pool.residents.bases) == ["sort"]
