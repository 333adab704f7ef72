"""The model's own dropout: off wherever a policy is compared with itself, on in supervised training."""

import pytest
import torch
from peft import get_peft_model

import stages.distill
import stages.rl
import stages.sft
from base.store.journal import read
from stages.config.distill import DistillConfig
from stages.config.on_policy import RLConfig
from stages.config.training import LoraConfig, SFTConfig
from stages.learner.dropout import begin_update
from stages.model.adapters import peft_config
from stages.model.policy import Policy
from stages.rows.trained_on import TrainedOn
from tests.support.chats import make_policy

SMALL = {"max_steps": 1, "examples": 40, "prompts_per_step": 6, "max_new_tokens": 12}
DISTILL = {
    "full": DistillConfig(**SMALL),
    "checkpointed": DistillConfig(**SMALL, gradient_checkpointing=True),
    "adapter": DistillConfig(**SMALL, lora=LoraConfig(rank=4)),
}
FORWARD = torch.tensor([[7, 30, 60, 12]])


@pytest.fixture
def gpt2(store, workspace):
    place, folder = workspace("gpt2", {}, {}), store.staging("gpt2")
    policy = make_policy("gpt2")
    assert policy.model.config.attn_pdrop == 0.1
    policy.save(folder)
    return place.commit(folder, trained_on=TrainedOn(), metrics={})


def first_step(place) -> dict[str, float]:
    return next(record["values"] for record in read(place.folder / "journal.jsonl") if record["kind"] == "metrics")


@pytest.mark.parametrize("name", DISTILL)
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(name, gpt2, workspace, domains):
    place = workspace(name, {"start": gpt2, "teacher/sort": gpt2}, {"sort": domains["sort"]})
    stages.distill.train(DISTILL[name], place)
    values = first_step(place)
    assert values["distill/reverse_kl"] < 1e-6
    assert values["distill/grad_norm"] < 1e-3


def test_the_penalty_of_an_unmoved_policy_is_zero(gpt2, workspace, domains):
    place = workspace("rl", {"start": gpt2}, {"sort": domains["sort"]})
    stages.rl.train(RLConfig(**SMALL, group_size=2, reference_kl=0.1), place)
    assert first_step(place)["rl/reference_kl"] < 1e-6


def test_supervised_training_keeps_the_models_dropout(gpt2, workspace, domains):
    losses = []
    for name in ("one", "two"):
        place = workspace(name, {"start": gpt2}, {"sort": domains["sort"]}, seed=0)
        stages.sft.train(SFTConfig(max_steps=1, examples=40, batch_size=8), place)
        losses.append(first_step(place)["sft/loss"])
    model = make_policy("gpt2").model
    begin_update(model, own_dropout=True)
    assert not torch.equal(*(model(FORWARD).logits for _ in range(2)))
    # What dropout draws is decided by seed and step.
    assert losses[0] == losses[1]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("dropout", "same"), [(0.0, True), (0.5, False)])
def test_an_adapters_dropout_is_on_where_the_run_file_asks_for_it(checkpointing, dropout, same):
    policy = make_policy("gpt2")
    model = get_peft_model(policy.model, peft_config(LoraConfig(rank=4, dropout=dropout)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    if checkpointing:
        Policy(model, policy.tokenizer).model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    begin_update(model, own_dropout=False)
    assert torch.equal(*(model(FORWARD).logits for _ in range(2))) is same


def test_gradient_checkpointing_still_recomputes_without_dropout():
    model = make_policy("gpt2").model
    model.gradient_checkpointing_enable({"use_reentrant": False})
    runs: list[int] = []
    model.transformer.h[0].attn.register_forward_hook(lambda *args: runs.append(1))
    begin_update(model, own_dropout=False)
    model(FORWARD).logits.sum().backward()
    assert len(runs) == 2
