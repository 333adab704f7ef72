"""The one-page example: what it prints, and that its sampling, its mask and its loss are what they say."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from stages.config.training import TinyModelConfig
from stages.losses import divergences
from stages.model.tiny import tiny_model

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "opd_minimal.py"
DOMAINS = ("uppercase", "double")
# Points of 100. With seeds 0, 1 and 2 the start has at most 10, teachers and student have 100.
CLEAR = 40.0


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("opd_minimal", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_of(example: ModuleType, seed: int):
    shape = TinyModelConfig(hidden_size=32, layers=2, intermediate_size=32, max_length=64)
    return tiny_model(shape, example.TOKENIZER, seed)


def test_it_fits_on_one_page() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_student_comes_near_both_teachers() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(EXAMPLE.relative_to(ROOT))]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1700)
    assert done.returncode == 0, done.stderr
    before, _, table = done.stdout.partition("held-out score, %")
    heading, *lines = table.splitlines()
    assert tuple(heading.split()) == DOMAINS
    scores = {}
    for line in lines:
        who, *values = re.split(r"\s{2,}", line.strip())
        scores[who] = dict(zip(DOMAINS, map(float, values), strict=True))
    assert list(scores) == ["start", *(f"teacher {name}" for name in DOMAINS), "student"]
    for name in DOMAINS:
        assert scores[f"teacher {name}"][name] > scores["start"][name] + CLEAR
        assert scores["student"][name] > scores["start"][name] + CLEAR
    # No teacher alone is as good on both.
    for name in DOMAINS:
        assert sum(scores["student"].values()) > sum(scores[f"teacher {name}"].values()) + CLEAR
    losses = [float(value) for value in re.findall(r"reverse KL (\S+) nats", before)]
    assert losses[-1] < losses[0] / 2


def test_sampling_stops_at_eos_and_pads_after_it(example: ModuleType) -> None:
    eos, pad, width = example.EOS, example.PAD, 3
    letter = example.encode(["a"], "left").item()
    steps = []

    def scripted(input_ids: Tensor, **_: object) -> SimpleNamespace:
        """Row r ends after r letters; padding is likelier than anything, and what follows an end is a letter."""
        steps.append(input_ids.shape[1] - width)
        logits_BTV = torch.zeros(*input_ids.shape, len(example.TOKENIZER))
        for row in range(len(input_ids)):
            logits_BTV[row, -1, eos if steps[-1] == row else letter] = 100.0
        logits_BTV[:, -1, pad] = 200.0
        return SimpleNamespace(logits=logits_BTV)

    prompts_BP = example.encode(["aaa", "aa", "a"], "left")
    for greedy in (True, False):
        steps.clear()
        drawn_BC = example.sample(scripted, prompts_BP, greedy)
        assert drawn_BC.tolist() == [[eos, pad, pad], [letter, eos, pad], [letter, letter, eos]]
        assert steps == [0, 1, 2]
    endless_BP = prompts_BP[:1].repeat(example.MAX_NEW_TOKENS + 1, 1)
    assert example.sample(scripted, endless_BP)[-1].tolist() == [letter] * example.MAX_NEW_TOKENS


def test_logits_of_completion_tokens_are_those_of_rows_without_padding(example: ModuleType) -> None:
    model = model_of(example, 0)
    prompts, completions = ["upper vec:", "double a:"], ["VEC<end>", "aa<end>"]
    tokens_BC = example.encode(completions, "right")
    logits_BCV = example.completion_logits(model, example.encode(prompts, "left"), tokens_BC)
    assert logits_BCV.shape[:2] == tokens_BC.shape
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        asked, answered = (example.encode([text], "left")[0] for text in (prompt, completion))
        alone_TV = model(input_ids=torch.cat([asked, answered])[None]).logits[0]
        expected_NV = alone_TV[len(asked) - 1 : -1]
        assert answered[-1] == example.EOS
        torch.testing.assert_close(logits_BCV[row, : len(answered)], expected_NV, rtol=1e-4, atol=1e-5)


def test_the_reverse_kl_is_the_projects(example: ModuleType) -> None:
    torch.manual_seed(0)
    logits_NV, teacher_NV = torch.randn(2, 7, 11) * 3
    ours_NV, theirs_NV = (logits_NV.clone().requires_grad_() for _ in range(2))
    ours_N, theirs_N = example.reverse_kl(ours_NV, teacher_NV), divergences.reverse_kl(theirs_NV, teacher_NV)[0]
    torch.testing.assert_close(ours_N, theirs_N)
    ours_N.mean().backward()
    theirs_N.mean().backward()
    torch.testing.assert_close(ours_NV.grad, theirs_NV.grad)


def test_a_step_learns_from_completion_tokens_and_the_own_teacher_alone(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One real step, with what it computed kept: the gradient at each position, and what each teacher was shown."""
    student = model_of(example, 0)
    teachers = {name: model_of(example, seed) for seed, name in enumerate(DOMAINS, start=1)}
    kept, shown = {}, {id(teacher): [] for teacher in teachers.values()}
    real_logits = example.next_logits

    def next_logits(model, tokens_BT: Tensor) -> Tensor:
        logits_BTV = real_logits(model, tokens_BT)
        if logits_BTV.requires_grad:
            logits_BTV.retain_grad()
            kept.update(tokens=tokens_BT, logits=logits_BTV)
        elif id(model) in shown:
            shown[id(model)] += example.TOKENIZER.batch_decode(tokens_BT, skip_special_tokens=True)
        return logits_BTV

    def sample(model, prompts_BP: Tensor) -> Tensor:
        """Row r ends after r letters, modulo the width: an untrained model would seldom end."""
        completions_BC = torch.full((len(prompts_BP), 5), example.encode(["a"], "left").item())
        for row in range(len(completions_BC)):
            completions_BC[row, row % 5] = example.EOS
            completions_BC[row, row % 5 + 1 :] = example.PAD
        return completions_BC

    monkeypatch.setattr(example, "next_logits", next_logits)
    monkeypatch.setattr(example, "sample", sample)
    example.distil(student, teachers, 1, example.random.Random(0))
    rows, width = kept["tokens"].shape[0], kept["tokens"].shape[1] - 5
    expected_BT = torch.zeros(kept["tokens"].shape, dtype=torch.bool)
    for row in range(rows):
        # The logits one position before each token up to EOS, and before EOS.
        expected_BT[row, width - 1 : width + row % 5] = True
    assert rows == example.ROWS
    assert torch.equal(kept["logits"].grad.abs().sum(-1) > 0, expected_BT)
    for name, word in (("uppercase", "upper "), ("double", "double ")):
        texts = shown[id(teachers[name])]
        assert len(texts) == example.ROWS / len(teachers)
        assert all(text.startswith(word) for text in texts)
        assert all(parameter.grad is None for parameter in teachers[name].parameters())
