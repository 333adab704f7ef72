"""Bfloat16 against float32, attention without masks against attention with them, on every supported architecture."""

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import stages.model.architecture
import stages.model.attention
import stages.model.experts
from stages.config.chunks import CHUNK_BYTES, MOST_CHUNK_BYTES, chunk_bytes
from stages.config.training import LoraConfig
from stages.losses.chunked import chunk_length
from stages.model.adapters import peft_config
from stages.model.architecture import Masks
from stages.model.attention import NAME, _repeated, attend
from stages.model.kernels import use_kernels
from stages.model.policy import HiddenStates, Policy
from stages.model.precision import EXPERTS as EXPERTS_MARK
from stages.model.precision import head_factor, head_logits
from stages.model.tiny import character_tokenizer
from stages.rows.packing import Packed, pack
from stages.sampling.agreement import TOLERANCES, plain_logits
from stages.sampling.sampler import _Batch, sample
from stages.sampling.samples import Sampling
from tests.numerics.conftest import tiny_policy
from tests.support import varlen
from tests.support.families import SUPPORTED, WINDOW, random_model

families = pytest.mark.parametrize("family", SUPPORTED)
CPU = torch.device("cpu")
# A router that chooses another expert for a token makes a jump, not a rounding.
EXPERTS = ("gpt-oss", "qwen3-moe", "mixtral")
# Without a window narrower than the rows, without a cap and without sinks.
WITHOUT_WINDOWS = ("llama", "llama-tied", "qwen2", "qwen3", "olmo2", "smollm3", "granite", "gpt2", "qwen3-moe")


def policy_of(family: str) -> Policy:
    """A random policy of the family that attends as the product's do."""
    model = random_model(family)
    use_kernels(model)
    return Policy(model, character_tokenizer())


def rows(*lengths: int) -> list[list[int]]:
    """Rows of ordinary tokens."""
    drawn = torch.Generator().manual_seed(1)
    return [torch.randint(4, len(character_tokenizer()), (length,), generator=drawn).tolist() for length in lengths]


def packed_rows() -> Packed:
    """Rows of which some share a line, and a line with a filling."""
    drawn = rows(3 * WINDOW, WINDOW + 3, WINDOW + 5, 4)
    return pack(drawn, [1] * len(drawn), 0, CPU)


def run(policy: Policy, packed: Packed, dtype: str = "bfloat16") -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states of packed rows, and the gradients of a sum of them."""
    policy.model.zero_grad()
    hidden_NH = packed.scored(HiddenStates(policy.model, dtype)(*packed.inputs)).float()
    factors_NH = torch.randn(hidden_NH.shape, generator=torch.Generator().manual_seed(2))
    (hidden_NH * factors_NH).sum().backward()
    gradients = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    return hidden_NH.detach(), gradients


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The size of a difference relative to what is compared."""
    return float((ours - theirs).norm() / theirs.norm())


@families
def test_the_sampler_the_trainer_and_float32_agree(family: str) -> None:
    policy = policy_of(family)
    with torch.no_grad():
        policy.head_VH.mul_(0.25)
    policy.compute_in("bfloat16")
    for group in sample(policy, rows(2 * WINDOW, WINDOW - 2, WINDOW + 1), 2, Sampling(2 * WINDOW), seed=0):
        for drawn in group:
            targets_N = torch.tensor(drawn.completion_ids)[:, None]
            trainer_N, float32_N = (
                plain_logits(policy.model, drawn, dtype).log_softmax(-1).gather(1, targets_N)[:, 0]
                for dtype in ("bfloat16", "float32")
            )
            assert drawn.logprobs_N.dtype == torch.float32
            if family not in EXPERTS:
                assert float((drawn.logprobs_N - trainer_N).abs().max()) < TOLERANCES["bfloat16"]
                assert float((drawn.logprobs_N - float32_N).abs().max()) < TOLERANCES["bfloat16"]
            assert float((drawn.logprobs_N - float32_N).abs().mean()) < TOLERANCES["bfloat16"] / 4


@families
def test_packed_rows_without_a_mask_are_those_with_one(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, packed = policy_of(family), packed_rows()
    masked_NH, masked = run(policy, packed)
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return varlen.varlen_attn(*args, **kwargs)

    monkeypatch.setattr(stages.model.attention.varlen, "varlen_attn", counted)
    for module in (stages.model.attention, stages.model.architecture):
        monkeypatch.setattr(module, "has_varlen", lambda device: True)
    bare_NH, bare = run(policy, packed)
    masks = Masks.of(policy.model.get_decoder().config)
    takes = masks.by_bounds and masks.window is None
    assert bool(calls) == takes
    assert takes == (family in WITHOUT_WINDOWS)
    tolerated = 0.1 if family in EXPERTS else 0.03
    assert distance(bare_NH, masked_NH) < tolerated
    assert bare.keys() == masked.keys()
    for name, gradient in masked.items():
        assert float((bare[name] - gradient).norm()) <= tolerated * float(gradient.norm()) + 1e-3
    # Prompts of a rollout share lines too.
    calls.clear()
    policy.compute_in("bfloat16")
    for (drawn,) in sample(policy, rows(2 * WINDOW, WINDOW - 2, WINDOW + 1), 1, Sampling(4), seed=0):
        own_NV = plain_logits(policy.model, drawn, "bfloat16").log_softmax(-1)
        own_N = own_NV.gather(1, torch.tensor(drawn.completion_ids)[:, None])[:, 0]
        assert float((drawn.logprobs_N - own_N).abs().mean()) < (1.0 if family in EXPERTS else 0.2)
    assert bool(calls) == takes
    # In float32 the kernel is not used.
    calls.clear()
    run(policy, packed, "float32")
    assert not calls


@families
def test_gradients_in_bfloat16_are_near_those_in_float32(family: str) -> None:
    policy, packed = policy_of(family), packed_rows()
    (narrow_NH, narrow), (exact_NH, exact) = (run(policy, packed, dtype) for dtype in ("bfloat16", "float32"))
    assert distance(narrow_NH, exact_NH) < (0.3 if family in EXPERTS else 0.05)
    whole = [torch.cat([found[name].flatten() for name in exact]) for found in (narrow, exact)]
    assert torch.cosine_similarity(*whole, dim=0) > (0.9 if family in EXPERTS else 0.99)


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_multiplied_in_bfloat16_and_frozen_ones_kept_in_it(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, packed, seen = policy_of(family), packed_rows(), set()
    multiply = functional.grouped_mm

    def grouped_mm(left: Tensor, right: Tensor, **settings: Tensor) -> Tensor:
        seen.add((left.dtype, right.dtype))
        return multiply(left, right, **settings)

    monkeypatch.setattr(functional, "grouped_mm", grouped_mm)
    exact_NH, _ = run(policy, packed, "float32")
    assert seen == {(torch.float32, torch.float32)}
    seen.clear()
    trained_NH, gradients = run(policy, packed)
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    # transformers' own loop over experts, in which autocast rounds.
    policy.model.set_experts_implementation("eager")
    looped_NH, looped = run(policy, packed)
    assert distance(trained_NH, looped_NH) < 0.02 < 10 * distance(trained_NH, exact_NH)
    for name, gradient in looped.items():
        assert float((gradients[name] - gradient).norm()) <= 0.05 * float(gradient.norm()) + 1e-3
    policy.model.set_experts_implementation(stages.model.experts.NAME)
    policy.model.requires_grad_(False)
    policy.compute_in("bfloat16")
    with torch.no_grad():
        kept_NH = packed.scored(HiddenStates(policy.model, "bfloat16")(*packed.inputs)).float()
    assert torch.equal(kept_NH, trained_NH)
    layers = [module for module in policy.model.modules() if hasattr(module, EXPERTS_MARK)]
    kept = {(p.dim(), p.dtype) for module in layers for p in module.parameters()}
    assert kept - {(2, torch.float32)} == {(3, torch.bfloat16)}


@families
def test_the_cache_is_kept_in_bfloat16_and_float32_stays(family: str) -> None:
    policy = policy_of(family)
    for dtype, kept in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        policy.compute_in(dtype)
        batch = _Batch(policy, rows(5, 3), 2, Sampling(4), torch.Generator().manual_seed(0))
        batch.run()
        assert {part.dtype for layer in batch.cache.layers for part in (layer.keys, layer.values)} == {kept}


def heads(query: int, key: int, tokens: int, kept: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values of three lines."""
    drawn = torch.Generator().manual_seed(3)
    shapes = ((3, query, tokens, 8), (3, key, kept, 8), (3, key, kept, 8))
    return tuple(torch.randn(shape, generator=drawn, dtype=torch.float64).to(dtype) for shape in shapes)


class Layer(nn.Module):
    """What transformers reads of a layer."""

    num_key_value_groups, is_causal = 3, True


@pytest.mark.parametrize("masked", [True, False])
def test_a_step_of_decoding_does_not_repeat_the_cache(masked: bool) -> None:
    parts = heads(6, 2, 1, 11, torch.float64)
    bias = torch.zeros(3, 1, 1, 11, dtype=torch.float64)
    bias[0, ..., :4] = torch.finfo(torch.float64).min
    mask = bias if masked else None
    ours, _ = attend(Layer(), *parts, mask, scaling=0.3)
    theirs, _ = sdpa_attention_forward(Layer(), *parts, mask, scaling=0.3)
    assert ours.shape == theirs.shape == (3, 1, 6, 8)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_prompt_in_float32_on_a_gpu_repeats_keys() -> None:
    parts = heads(6, 2, 7, 7, torch.float64)
    theirs, _ = sdpa_attention_forward(Layer(), *parts, None, scaling=0.3)
    torch.testing.assert_close(_repeated(*parts, True, 0.0, 0.3), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("tokens", "masked"), [(1, True), (1, False), (7, True), (7, False)])
def test_float32_on_a_cpu_is_transformers_bit_for_bit(tokens: int, masked: bool) -> None:
    parts = heads(6, 2, tokens, 7, torch.float32)
    mask = torch.zeros(3, 1, tokens, 7).masked_fill_(torch.ones(tokens, 7).triu(7 - tokens + 1).bool(), -1e30)
    given = mask if masked else None
    assert torch.equal(attend(Layer(), *parts, given)[0], sdpa_attention_forward(Layer(), *parts, given)[0])


def test_bounds_that_the_kernel_does_not_take_become_a_mask() -> None:
    packed = packed_rows()
    lines, width = packed.tokens_BT.shape
    parts = heads(6, 2, width, width, torch.float32)
    parts = tuple(part[:lines].to(torch.bfloat16) for part in parts)
    bias, _ = Masks(None, ()).of_rows(packed.bounds_S, lines, width)
    theirs, _ = sdpa_attention_forward(Layer(), *parts, bias.to(torch.bfloat16))
    ours, _ = attend(Layer(), *parts, packed.bounds_S[None, None, None])
    assert torch.equal(ours, theirs)


def test_saved_configs_do_not_name_the_products_attention(tmp_path) -> None:
    policy = policy_of("llama")
    assert policy.model.config._attn_implementation == NAME
    policy.save(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_frozen_weights_are_narrowed_and_nothing_changes(family: str) -> None:
    policy = policy_of(family)
    model = get_peft_model(policy.model, peft_config(LoraConfig(rank=2))).eval()
    wearing = Policy(model, policy.tokenizer, "base")
    packed = packed_rows()
    with torch.no_grad():
        before = HiddenStates(model, "bfloat16")(*packed.inputs)
        wearing.compute_in("bfloat16")
        assert torch.equal(HiddenStates(model, "bfloat16")(*packed.inputs), before)
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {kind for name, kind in types.items() if ".base_layer." in name} == {torch.bfloat16}
    assert {kind for name, kind in types.items() if "lora_" in name or "norm" in name} == {torch.float32}
    assert wearing.model.get_input_embeddings().weight.dtype == torch.float32
    tied = family == "llama-tied"
    assert wearing.head_VH.dtype == (torch.float32 if tied else torch.bfloat16)


def test_trained_weights_stay_in_float32() -> None:
    policy = tiny_policy(0)
    policy.compute_in("bfloat16")
    assert {parameter.dtype for parameter in policy.model.parameters()} == {torch.float32}


def test_logits_are_float32_sums_of_bfloat16_products() -> None:
    drawn = torch.Generator().manual_seed(4)
    hidden_CH, head_VH = (8 * torch.randn(n, 64, generator=drawn) for n in (5, 33))
    narrow_CH = hidden_CH.bfloat16()
    logits_CV = head_logits(narrow_CH, head_factor(head_VH, narrow_CH.dtype))
    wanted_CV = narrow_CH.double() @ head_VH.bfloat16().double().T
    assert logits_CV.dtype == torch.float32
    torch.testing.assert_close(logits_CV.double(), wanted_CV, rtol=1e-5, atol=1e-3)
    assert not torch.equal(logits_CV, (narrow_CH @ head_VH.bfloat16().T).float())
    assert torch.equal(head_logits(hidden_CH, head_factor(head_VH, torch.float32)), hidden_CH @ head_VH.T)


@pytest.mark.parametrize(
    ("free", "size"),
    [(80, 2**30), (16, 2**30), (15.9, 2**29), (8, 2**29), (4, 2**28), (2, 2**27), (1, CHUNK_BYTES), (0, CHUNK_BYTES)],
)
def test_a_chunk_on_a_gpu_follows_free_memory_in_powers_of_two(free: float, size: int) -> None:
    assert chunk_bytes(int(free * 2**30)) == size
    assert size <= MOST_CHUNK_BYTES


def test_a_chunk_on_a_cpu_is_as_before() -> None:
    assert chunk_length(151_936, CPU) == 110
    assert chunk_length(10**9, CPU) == 1
