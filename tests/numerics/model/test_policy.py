"""Adapters and their bases, and what a policy refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stages.sft
from base.errors import UserError
from stages.config.training import LoraConfig, SFTConfig
from stages.model.characters import KEYWORDS
from stages.model.policy import check_head, load_policy
from stages.model.tiny import character_tokenizer
from stages.model.tokenizers import tokenizer_difference
from tests.numerics.conftest import tiny_policy

LORA = LoraConfig(rank=4)
TOKENS = torch.tensor([[7, 30, 60, 12]])


@pytest.fixture
def adapter(checkpoint, workspace, domains):
    config = SFTConfig(max_steps=3, examples=40, batch_size=8, lora=LORA)
    return stages.sft.train(config, workspace("adapter", {"start": checkpoint("start", 0)}, domains))


def logits(policy):
    with torch.no_grad():
        return policy.model(TOKENS).logits


def test_an_adapter_remembers_its_base_and_is_small(store, adapter):
    policy = load_policy(adapter, store)
    assert policy.adapter_base == "start"
    assert not torch.allclose(logits(policy), logits(load_policy(store.get("start"), store)))
    assert not any(p.requires_grad for p in policy.model.parameters())


def test_an_adapter_goes_on_training_or_is_merged(store, adapter):
    continued = load_policy(adapter, store, lora=LORA, trainable=True)
    assert continued.adapter_base == "start"
    trainable = [name for name, p in continued.model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    merged = load_policy(adapter, store, trainable=True)
    assert merged.adapter_base is None
    assert all(p.requires_grad for p in merged.model.parameters())
    torch.testing.assert_close(logits(merged), logits(continued), rtol=1e-4, atol=1e-4)


def test_a_fresh_adapter_changes_nothing_yet(store, checkpoint):
    start = checkpoint("start", 0)
    fresh = load_policy(start, store, lora=LORA, trainable=True)
    torch.testing.assert_close(logits(fresh), logits(load_policy(start, store)))


def test_logits_that_are_more_than_a_linear_head_are_refused(store, checkpoint):
    start = checkpoint("start", 0)
    policy = tiny_policy(0)
    inner = policy.model.forward

    def capped(*args, **kwargs):
        output = inner(*args, **kwargs)
        output.logits = output.logits.tanh()
        return output

    policy.model.forward = capped
    with pytest.raises(UserError, match="more to its logits than a linear head"):
        check_head(policy, start)


def test_an_adapters_files_are_the_same_from_every_process(tmp_path):
    code = (
        "from flows.engines.preload import LIBRARIES, preload; preload(LIBRARIES); "
        "import sys; from pathlib import Path; from peft import get_peft_model; import torch; "
        "from stages.config.training import LoraConfig; from stages.model.policy import Policy; "
        "from stages.model.adapters import peft_config; "
        "from tests.numerics.conftest import tiny_policy; policy = tiny_policy(0); torch.manual_seed(0); "
        "model = get_peft_model(policy.model, peft_config(LoraConfig(rank=4))); "
        "Policy(model, policy.tokenizer, 'start').save(Path(sys.argv[1]))"
    )
    written = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[3])}
        subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, check=True)
        written.append({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    assert "adapter_config.json" in written[0]
    assert written[0] == written[1]


def test_an_adapter_on_modules_that_are_not_there_names_them(store, checkpoint):
    with pytest.raises(UserError, match=r"start: lora\.target_modules \['nope'\]"):
        load_policy(checkpoint("start", 0), store, lora=LoraConfig(target_modules=["nope"]), trainable=True)


def test_an_adapter_on_the_output_head_is_refused(store, checkpoint):
    start = checkpoint("start", 0)
    with pytest.raises(UserError, match=r"start: lora\.target_modules puts an adapter on the output head"):
        load_policy(start, store, lora=LoraConfig(target_modules=["lm_head", "q_proj"]), trainable=True)


def test_tokenizer_round_trip_and_difference():
    tokenizer = character_tokenizer()
    text = "fix:\ndef f(a, b):\n    return a if a > b else max(b, 1)"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(ids) < len(text) - 10
    assert all(len(tokenizer(word)["input_ids"]) == 1 for word in KEYWORDS)
    other = character_tokenizer()
    assert tokenizer_difference(tokenizer, other) is None
    other.chat_template = "{{ messages }}"
    assert "chat_template" in str(tokenizer_difference(tokenizer, other))
