"""The arithmetic for Qwen3-8B: operations against torch's counts, the earlier code against its figures of that day."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from flows.engines.shapes import shape_of_config
from stages.config.training import LoraConfig
from stages.model.adapters import peft_config
from stages.model.attention import use_attention
from stages.model.policy import Policy
from stages.model.tiny import character_tokenizer
from stages.sampling import sampler
from stages.sampling.samples import Sampling
from studies import gpu_costs, gpu_estimates, gpu_work
from studies.gpu_costs import AFTER, BEFORE
from studies.gpu_work import Rows
from studies.sizes import qwen3_8b

SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"head_dim": 64}
ATTENTION = ("scaled_dot_product", "bmm", "baddbmm")


def counted(adapters: bool, recomputed: bool) -> float:
    """Operations of products with weights in forward and backward pass of 3 rows of 32 tokens, as torch counts them."""
    model = AutoModelForCausalLM.from_config(qwen3_8b(**SMALL, num_hidden_layers=8, vocab_size=512)).float()
    if adapters:
        model = get_peft_model(model, peft_config(LoraConfig(rank=1)))
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(3, 32, dtype=torch.long)).logits.sum().backward()
    found = counter.get_flop_counts()["Global"]
    return sum(work for name, work in found.items() if not any(each in str(name) for each in ATTENTION))


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("recomputed", [False, True])
def test_operations_of_an_update_are_those_that_torch_counts(adapters: bool, recomputed: bool) -> None:
    shape = shape_of_config(qwen3_8b(**SMALL, num_hidden_layers=8, vocab_size=512).to_dict(), 0)
    # No length is squared, so that attention is left out; every token is scored.
    rows = Rows(96, 96, 0)
    work = gpu_work.update(shape, rows, adapters=adapters, recomputed=recomputed, teacher_heads=0)
    # Adapters of rank 1 have products of their own, and below the first of them no gradient is needed.
    assert work == pytest.approx(counted(adapters, recomputed), rel=0.03)


def test_a_teachers_head_is_one_more_product() -> None:
    shape, rows = gpu_estimates.qwen3_shape(), Rows.of([(10, 20), (5, 0)])
    assert (rows.tokens, rows.scored, rows.squares) == (35, 20, 925)
    two, none = (gpu_work.update(shape, rows, adapters=False, recomputed=True, teacher_heads=n) for n in (2, 0))
    assert two - none == pytest.approx(2 * 2 * 151936 * 4096 * 20)
    assert gpu_work.attention_forward(shape, rows) == 2 * 36 * 32 * 128 * 925


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("Tesla T4", None)],
)
def test_a_card_is_found_by_its_name(name: str, peak: float | None) -> None:
    assert gpu_work.data_sheet(name) == peak


class Counting(TorchDispatchMode):
    """Counts operations."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


def operations(layers: int, adapters: bool, monkeypatch: pytest.MonkeyPatch) -> int:
    """Operations of a step of decoding in bfloat16."""
    tokenizer = character_tokenizer()
    model = AutoModelForCausalLM.from_config(
        qwen3_8b(**SMALL, num_hidden_layers=layers, vocab_size=len(tokenizer))
    ).float()
    use_attention(model)
    policy = Policy(get_peft_model(model, peft_config(LoraConfig(rank=2))) if adapters else model, tokenizer)
    policy.model.eval()
    policy.compute_in("bfloat16")
    counting, seen, forward = Counting(), [], sampler._Batch._forward

    def step(self: sampler._Batch, *arguments: torch.Tensor) -> torch.Tensor:
        before = counting.number
        found = forward(self, *arguments)
        seen.append(counting.number - before)
        return found

    with monkeypatch.context() as patched, counting:
        patched.setattr(sampler._Batch, "_forward", step)
        sampler.sample(policy, [[5, 6, 7]] * 4, 2, Sampling(5), 0)
    return seen[1]


@pytest.mark.parametrize("adapters", [False, True])
def test_operations_of_decoding_are_todays(adapters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    two, three = (operations(layers, adapters, monkeypatch) for layers in (2, 3))
    assert three - two == (AFTER.layer_with_adapters if adapters else AFTER.layer)
    assert two - 2 * (three - two) == AFTER.rest


def test_the_earlier_code_has_its_figures_of_28_november() -> None:
    shape = gpu_estimates.qwen3_shape()
    assert gpu_costs.decode_device(BEFORE, shape, 64, 1024) == pytest.approx(0.074, abs=0.001)
    assert gpu_costs.decode_host(BEFORE, shape, False) == pytest.approx((0.010, 0.019), abs=0.001)
    assert gpu_costs.decode_device(AFTER, shape, 64, 1024) == pytest.approx(0.009, abs=0.001)
    assert gpu_costs.decode_device(AFTER, shape, 64, 1024, cast=True) == pytest.approx(0.027, abs=0.001)
    assert gpu_costs.prefill(BEFORE, shape, 16384) == pytest.approx(4.6, abs=0.1)
    assert [1e6 * part for part in gpu_costs.token(BEFORE, shape)] == pytest.approx([92, 100], abs=1)
    assert gpu_costs.chunk(BEFORE, shape)[0] == 110
    tokens, seconds = gpu_costs.chunk(AFTER, shape)
    assert (tokens, 1e6 * seconds) == (1766, pytest.approx(1.8, abs=0.1))
    assert gpu_costs.hand_over(BEFORE, shape, by_file=False) == pytest.approx((35.3e9, 14), rel=0.02)
    assert gpu_costs.hand_over(AFTER, shape, by_file=False)[1] == pytest.approx(0.08, abs=0.01)
    assert gpu_costs.teacher_again(BEFORE, shape) == pytest.approx(15, abs=0.5)
    assert gpu_costs.teacher_again(AFTER, shape) == pytest.approx(0.7, abs=0.05)


def test_servers_draw_as_many_rows_as_their_cache_has_room_for() -> None:
    one = gpu_estimates.Run.of(gpu_estimates.EIGHT)
    four = gpu_estimates.Run.of(gpu_estimates.EIGHT, "resources.gpus=4", "resources.rollout_servers.count=4")
    ratio = gpu_estimates.rollout(AFTER, one)[0] / gpu_estimates.rollout(AFTER, four)[0]
    # A quarter of the rows, but the weights are read for fewer rows together.
    assert 2 < ratio < 4
    assert gpu_estimates.teach(one) > gpu_estimates.teach(
        gpu_estimates.Run.of(gpu_estimates.EIGHT, "merge.teacher_backend=local")
    )


def test_the_page_has_the_tables_of_today(pytestconfig: pytest.Config) -> None:
    written = (Path(pytestconfig.rootpath) / "docs" / "gpu.md").read_text()
    for table in gpu_estimates.page().strip().split("\n\n"):
        assert table in written
