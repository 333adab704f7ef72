"""The memory plan's terms against what is allocated: on the pretended device, and by FakeTensor where nothing fits."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from evals.measure.shift import _of_batch
from flows.engines import memory_terms as terms
from flows.engines.memory import _sampling
from flows.engines.memory_terms import Trained
from flows.engines.shapes import Shape, shape_of_config
from stages.config.training import LoraConfig
from stages.losses import chunked
from stages.losses.chunked import chunk_length, chunked_token_loss
from stages.model.policy import HiddenStates, Policy, causal_lm, head_weight, peft_config
from stages.model.precision import narrow
from stages.model.tiny import character_tokenizer
from stages.sampling import cache
from stages.sampling.samples import Sample, Sampling
from studies.sizes import qwen3_8b, smollm2
from tests.vcuda import memory_cases
from tests.vcuda.live import Counting

TOLERANCE = 0.15
LAYERS, TOKENS, LENGTH = 3, 1024, 256


def shape(config: PreTrainedConfig, parameters: int = 0) -> Shape:
    return shape_of_config(config.to_dict(), parameters)


def update_bytes(stage: Trained) -> int:
    """The terms of a first update's last micro-batch but for the optimizer's moments."""
    kept = terms.weights(stage) + terms.gradients(stage) + terms.head_gradient(stage)
    kept += terms.head_factor(stage)
    return kept + terms.activations(stage) + terms.narrow_copies(stage) + terms.logits(stage)


@pytest.fixture(scope="module")
def peaks(request: pytest.FixtureRequest) -> dict[str, int]:
    """Peaks of SmolLM2's sizes on the pretended device, from a process of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.vcuda.memory_cases"],
        cwd=request.config.rootpath,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_a_training_step_allocates_what_is_planned(peaks: dict[str, int]) -> None:
    config = {"micro_batch_tokens": memory_cases.MICRO_BATCH, "batch_size": memory_cases.ROWS}
    stage = Trained(shape(smollm2()), config)
    assert terms.weights(stage) == pytest.approx(peaks["weights"], rel=1e-5)
    assert update_bytes(stage) + terms.moments(stage) == pytest.approx(peaks["update"], rel=TOLERANCE)
    # What weights, gradients and moments are not.
    beside = update_bytes(stage) - 2 * peaks["weights"]
    assert beside == pytest.approx(peaks["update"] - 4 * peaks["weights"], rel=TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rollout_allocates_what_is_planned(peaks: dict[str, int], dtype: str) -> None:
    rows, model = memory_cases.PROMPTS * memory_cases.GROUP, shape(smollm2())
    stage = Trained(model, {"dtype": dtype}, on_device=True)
    tokens = memory_cases.PROMPT + memory_cases.NEW
    parts = _sampling(model, rows, memory_cases.GROUP, tokens, narrow=stage.narrow, on_device=True)
    assert "decoding" in parts
    planned = sum(parts.values()) + terms.head_factor(stage)
    assert planned == pytest.approx(peaks[f"rollout in {dtype}"] - peaks["weights"], rel=TOLERANCE)


SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "recomputed": {"gradient_checkpointing": True},
    "lora": {"dtype": "bfloat16", "lora": {"rank": 32}},
    "lora-recomputed": {"dtype": "bfloat16", "lora": {"rank": 32}, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("make", [smollm2, qwen3_8b])
def test_activations_and_the_peak_of_an_update_are_as_planned(make: Any, name: str) -> None:
    """Real widths and vocabularies, few layers: the terms are linear in the layers."""
    model_config, config = make(num_hidden_layers=LAYERS), SETTINGS[name]
    stage = Trained(shape(model_config), {"micro_batch_tokens": TOKENS, "batch_size": 2, **config})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
        if config.get("lora"):
            model = get_peft_model(model, peft_config(LoraConfig(**config["lora"])))
    with FakeTensorMode(allow_non_fake_inputs=True), Counting() as counting:
        model.to_empty(device="cpu")
        causal_lm(model).tie_weights()
        if config.get("gradient_checkpointing"):
            causal_lm(model).gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        if stage.adapter and stage.narrow:
            narrow(causal_lm(model))
        live, module = counting.live, HiddenStates(model, "bfloat16" if stage.narrow else "float32")
        assert live.bytes == pytest.approx(terms.weights(stage), rel=0.01)
        held = live.bytes
        for _ in range(2):
            live.reset()
            hidden_NH = module(torch.zeros(TOKENS // LENGTH, LENGTH, dtype=torch.long)).flatten(0, 1)
            kept = live.bytes - held
            targets_N = torch.zeros(TOKENS, dtype=torch.long)
            head_VH = head_weight(model)
            loss, _ = chunked_token_loss(
                hidden_NH,
                head_VH,
                torch.ones(TOKENS),
                lambda logits_CV, part, t=targets_N: (F.cross_entropy(logits_CV, t[part], reduction="none"), {}),
                chunk_length(len(head_VH), torch.device("cpu")),
            )
            loss.backward()
            del hidden_NH, loss
            held = live.bytes
    if not stage.recomputed:
        # Of a recomputed layer only the peak of the backward pass shows the rest.
        planned = terms.activations(stage) + terms.narrow_copies(stage)
        assert planned == pytest.approx(kept, rel=TOLERANCE)
    assert update_bytes(stage) == pytest.approx(live.peak, rel=TOLERANCE)


def test_a_shift_s_chunk_has_the_planned_number_of_logits() -> None:
    config = smollm2(num_hidden_layers=1, hidden_size=72)
    with FakeTensorMode(allow_non_fake_inputs=True), Counting() as counting, torch.no_grad():
        models = [AutoModelForCausalLM.from_config(config).requires_grad_(False) for _ in range(2)]
        start, policy = (Policy(model, character_tokenizer()) for model in models)
        row = [6] * 4 * chunk_length(config.vocab_size, torch.device("cpu"))
        held = counting.live.bytes
        counting.live.reset()
        _of_batch(start, policy, [Sample([5], row, torch.zeros(len(row)), False)], 0.7)
    assert counting.live.peak - held == pytest.approx(terms.SHIFT_COPIES * terms.CHUNK_BYTES, rel=TOLERANCE)


@pytest.mark.parametrize("make", [smollm2, qwen3_8b])
def test_parameters_are_counted_from_the_config(make: Any) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make())
    counted = sum(parameter.numel() for parameter in model.parameters())
    # The norms of heads are left out.
    assert shape(make()).parameters == pytest.approx(counted, rel=1e-5)


def test_a_published_model_needs_what_its_sizes_say() -> None:
    found = shape(qwen3_8b())
    assert found.parameters == pytest.approx(8.19e9, rel=0.001)
    stage = Trained(found, {"sharding": "fsdp", "prompts_per_step": 64, "group_size": 4, "max_new_tokens": 1024}, 8)
    # One process's rows, with key-value heads: 9.2 GiB of 8 x 4 rows of 1024 tokens, and as much again of prompts.
    assert terms.cache(found, stage.rows, 1024) == 2 * 36 * 8 * 128 * 4 * 32 * 1024
    assert terms.cache(found, 1, 1) == 294_912
    # Weights and gradients are split, and whole only where a forward pass of the whole model needs them.
    assert terms.gradients(stage) * 8 == found.parameters * 4
    assert terms.gathered_for_rollout(stage) == pytest.approx(30.5 * 2**30, rel=0.01)
    assert terms.weights(stage) * 8 == found.parameters * 4


def test_rows_of_a_process_are_capped_as_the_sampler_caps_them() -> None:
    def rows(prompts: int, group: int, processes: int = 1, monitored: int = 0) -> int:
        config = {"prompts_per_step": prompts, "group_size": group, "max_new_tokens": 8}
        return Trained(Shape(), config, processes, monitored=monitored).rows

    assert (rows(64, 4), rows(64, 4, 8), rows(128, 8), rows(128, 8, 2), rows(100, 300)) == (256, 32, 512, 512, 300)
    assert (rows(4, 4, monitored=100), rows(4, 4, monitored=2000)) == (100, 512)


def test_constants_are_those_of_the_code() -> None:
    assert terms.CHUNK_BYTES == chunked.CHUNK_BYTES
    assert Sampling(1).max_rows == terms.MOST_ROWS
    assert cache.PREFILL_TOKENS == terms.PREFILL_TOKENS
    from evals.measure import shift

    assert terms.SHIFT_TOKENS == shift.MICRO_BATCH_TOKENS
