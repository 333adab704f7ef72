"""Every supported architecture computes what transformers computes; the others are refused."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import stages.load
import stages.rl
from base.errors import UserError
from base.store.source import Source
from stages.config.distill import DistillConfig
from stages.config.on_policy import RLConfig
from stages.config.training import LoraConfig, SFTConfig
from stages.distill import train as distill
from stages.export import export_weights
from stages.model.architecture import unsupported
from stages.model.policy import HiddenStates, Policy, head_weight, load_policy
from stages.model.tiny import character_tokenizer
from stages.rows.packing import pack
from stages.sampling.sampler import sample
from stages.sampling.samples import Sampling
from stages.sft import train as sft
from tests.support.families import REFUSED, SUPPORTED, WINDOW, config_of, random_model, write_model

BASE = {"max_steps": 1, "examples": 12, "save_every": 1}
ON_POLICY = BASE | {"prompts_per_step": 4, "max_new_tokens": 6}
families = pytest.mark.parametrize("family", SUPPORTED)


def rows(lengths: tuple[int, ...]) -> list[list[int]]:
    """Rows of ordinary tokens, most of them longer than the window."""
    drawn = torch.Generator().manual_seed(1)
    known = len(character_tokenizer())
    return [torch.randint(4, known, (length,), generator=drawn).tolist() for length in lengths]


def logprobs_alone(model: torch.nn.Module, row: list[int]) -> torch.Tensor:
    """Log-probabilities [T - 1] of a row's tokens by transformers' own forward."""
    logits_TV = model(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1].float()
    return logits_TV.log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])[:, 0]


@families
@torch.no_grad()
def test_a_packed_row_is_as_if_it_were_alone(family: str) -> None:
    model = random_model(family)
    drawn = rows((3 * WINDOW, WINDOW + 3, WINDOW + 5, 4))
    packed = pack(drawn, [1] * len(drawn), 0, torch.device("cpu"))
    assert packed.bounds_S is not None
    logits_NV = packed.scored(HiddenStates(model)(*packed.inputs)) @ head_weight(model).T
    targets_N = torch.tensor([token for row in drawn for token in row[1:]])
    together_N = logits_NV.log_softmax(-1).gather(1, targets_N[:, None])[:, 0]
    alone_N = torch.cat([logprobs_alone(model, row) for row in drawn])
    # Scales of logits narrow the spread; it stays far above what is tolerated.
    assert alone_N.std() > 0.1
    torch.testing.assert_close(together_N, alone_N, rtol=1e-4, atol=1e-4)


@families
def test_the_sampler_agrees_with_the_model_and_with_generate(family: str) -> None:
    policy = Policy(random_model(family), character_tokenizer())
    prompts = rows((2 * WINDOW, WINDOW - 2, WINDOW + 1))
    for group in sample(policy, prompts, 2, Sampling(max_new_tokens=2 * WINDOW), seed=0):
        for drawn in group:
            own_N = logprobs_alone(policy.model, drawn.tokens)[len(drawn.prompt_ids) - 1 :]
            torch.testing.assert_close(drawn.logprobs_N, own_N.detach(), rtol=1e-4, atol=1e-4)
    for prompt, (greedy,) in zip(
        prompts, sample(policy, prompts, 1, Sampling(max_new_tokens=2 * WINDOW, temperature=0.0), seed=0), strict=True
    ):
        found = policy.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=2 * WINDOW,
            do_sample=False,
            eos_token_id=list(policy.stop_ids),
            past_key_values=DynamicCache(),
        )
        assert greedy.completion_ids == found[0, len(prompt) :].tolist()


@families
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["full", "lora"])
def test_it_is_imported_trained_merged_and_exported(family: str, lora, store, workspace, domains, tmp_path) -> None:
    if family == "gpt2" and lora is not None:
        lora = LoraConfig(rank=2, target_modules=["c_attn", "c_fc"])
    write_model(family, tmp_path / "published")
    base = stages.load.run(Source("directory", str(tmp_path / "published")), workspace("base", {}, {}))
    one = {"sort": domains["sort"]}
    expert = sft(SFTConfig(**BASE, batch_size=4, lora=lora), workspace("sft", {"start": base}, one))
    other = stages.rl.train(
        RLConfig(**ON_POLICY, group_size=2, lora=lora),
        workspace("rl", {"start": base}, {"reverse": domains["reverse"]}),
    )
    parents = {"start": base, "teacher/sort": expert, "teacher/reverse": other}
    both = {name: domains[name] for name in ("sort", "reverse")}
    student = distill(DistillConfig(**ON_POLICY, lora=lora), workspace("merge", parents, both))
    export_weights(student, store, tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32).eval()
    (row,) = rows((3 * WINDOW,))
    with torch.no_grad():
        ours = logprobs_alone(load_policy(student, store).model, row)
        torch.testing.assert_close(logprobs_alone(exported, row), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_kept_apart_is_refused(family: str) -> None:
    kind, settings, words = REFUSED[family]
    fault = unsupported(config_of(kind, settings))
    assert fault is not None
    assert words in fault


@pytest.mark.parametrize("damage", ["no head", "a layer gone", "other names"])
def test_weights_that_are_not_the_models_are_refused_by_name(damage: str, workspace, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_model("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    if damage == "no head":
        weights.pop("lm_head.weight")
    elif damage == "a layer gone":
        weights = {name: tensor for name, tensor in weights.items() if ".layers.1." not in name}
    else:
        weights = {f"module.{name}": tensor for name, tensor in weights.items()}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="its weights are not those of its config") as caught:
        stages.load.run(Source("directory", str(tmp_path)), workspace("base", {}, {}))
    missing, unexpected = {
        "no head": ("1 missing (lm_head.weight)", ""),
        "a layer gone": ("missing (model.layers.1.", ""),
        "other names": ("missing (lm_head.weight, ", "unexpected (module.lm_head.weight, "),
    }[damage]
    assert missing in str(caught.value)
    assert unexpected in str(caught.value)
