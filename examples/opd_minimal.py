"""Multi-teacher on-policy distillation on one page: one student, two teachers, a plain training loop.

The start is a tiny model, pretrained for a moment on two domains in which most demonstrations have a mistake. Each
teacher is a copy of the start, fine-tuned on right demonstrations of one domain; it fails in the other. The student is
another copy. Its own training uses no demonstration. In every step

1. the student samples completions for prompts of both domains,
2. each row goes to the teacher of its domain, which scores the student's own tokens,
3. the loss is the exact reverse KL, Σ S·log(S/T) over the vocabulary for student S and teacher T, averaged over the
   completion tokens. No gradient flows through the sampling (GKD, Agarwal et al. 2024, arXiv:2306.13649; reverse KL for
   language models: MiniLLM, Gu et al. 2024, arXiv:2306.08543; a teacher for each domain: MOPD, MiMo-V2-Flash).

`python examples/opd_minimal.py [SEED]` prints greedy scores on held-out prompts, after about a minute on one CPU core.

Shape suffixes: B rows, P prompt tokens (padded on the left), C completion tokens (padded on the right), T all tokens of
a row, V vocabulary, N completion tokens of all rows laid end to end.
"""

import copy
import random
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from experts.domain import HELD_OUT, TRAIN, Example
from experts.loading import load_domain
from stages.config.training import TinyModelConfig
from stages.model.tiny import character_tokenizer, tiny_model

# `upper vec:` asks for `VEC`, `double vec:` for `vveecc`. Rough demonstrations are wrong nine times in ten.
OPTIONS = {"min_length": 3, "max_length": 3, "rough_share": 0.9}
DOMAINS = {task: load_domain(task, "strings", {"task": task, **OPTIONS}) for task in ("uppercase", "double")}
TRAIN_EXAMPLES = {name: domain.draw(TRAIN, 1000, seed=0) for name, domain in DOMAINS.items()}
ROWS, MAX_NEW_TOKENS = 32, 10  # Rows of a step, divided equally among its domains; tokens of the longest completion.
TOKENIZER = character_tokenizer()
PAD, EOS = TOKENIZER.pad_token_id, TOKENIZER.eos_token_id


def draw(names: Sequence[str], rng: random.Random) -> list[Example]:
    """The examples of one step."""
    return [example for name in names for example in rng.sample(TRAIN_EXAMPLES[name], ROWS // len(names))]


def encode(texts: Sequence[str], padding_side: str) -> Tensor:
    """Token ids [B, T] of texts."""
    return TOKENIZER(texts, padding=True, padding_side=padding_side, return_tensors="pt").input_ids


def next_logits(model: PreTrainedModel, tokens_BT: Tensor) -> Tensor:
    """Logits [B, T, V] of the token after each position. Positions are relative, so padding needs the mask alone."""
    return model(input_ids=tokens_BT, attention_mask=(tokens_BT != PAD).long(), use_cache=False).logits


def completion_logits(model: PreTrainedModel, prompts_BP: Tensor, completions_BC: Tensor) -> Tensor:
    """Logits [B, C, V] of the completion tokens; the logits of a token stand one position before it."""
    logits_BTV = next_logits(model, torch.cat([prompts_BP, completions_BC], dim=1))
    return logits_BTV[:, prompts_BP.shape[1] - 1 : -1]


@torch.no_grad()
def sample(model: PreTrainedModel, prompts_BP: Tensor, greedy: bool = False) -> Tensor:
    """Completions [B, C]: each ends with EOS, or after `MAX_NEW_TOKENS`; only padding follows an EOS."""
    tokens_BT, ended_B = prompts_BP, torch.zeros(len(prompts_BP), dtype=torch.bool)
    for _ in range(MAX_NEW_TOKENS):
        logits_BV = next_logits(model, tokens_BT)[:, -1]
        logits_BV[:, PAD] = -torch.inf  # Padding marks the end of a completion, so it is never drawn.
        drawn_B = logits_BV.argmax(-1) if greedy else torch.multinomial(logits_BV.softmax(-1), 1).squeeze(1)
        tokens_BT = torch.cat([tokens_BT, drawn_B.masked_fill(ended_B, PAD)[:, None]], dim=1)
        ended_B |= drawn_B == EOS
        if bool(ended_B.all()):
            break
    return tokens_BT[:, prompts_BP.shape[1] :]


def reverse_kl(logits_NV: Tensor, teacher_logits_NV: Tensor) -> Tensor:
    """Exact reverse KL [N] of the student from its teacher, Σ S·log(S/T), in nats."""
    student_NV, teacher_NV = logits_NV.log_softmax(-1), teacher_logits_NV.log_softmax(-1)
    return (student_NV.exp() * (student_NV - teacher_NV)).sum(-1)


def fine_tune(model: PreTrainedModel, names: Sequence[str], steps: int, rng: random.Random, rough: bool) -> None:
    """Train a model in place by cross-entropy on the completion tokens of demonstrations of some domains."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        examples = draw(names, rng)
        answers = [DOMAINS[example.domain].demonstration(example, rng, rough) for example in examples]
        prompts_BP = encode([str(example.prompt) for example in examples], "left")
        completions_BC = encode([answer + TOKENIZER.eos_token for answer in answers], "right")
        mask_BC = completions_BC != PAD
        logits_NV = completion_logits(model, prompts_BP, completions_BC)[mask_BC]
        loss = functional.cross_entropy(logits_NV, completions_BC[mask_BC])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def distil(student: PreTrainedModel, teachers: dict[str, PreTrainedModel], steps: int, rng: random.Random) -> None:
    """Train the student in place on its own samples, each scored by the teacher of its domain."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for step in range(1, steps + 1):
        examples = draw(list(teachers), rng)
        prompts_BP = encode([str(example.prompt) for example in examples], "left")
        completions_BC = sample(student, prompts_BP)
        mask_BC = completions_BC != PAD  # The completion with its EOS, without the prompt and the padding.
        logits_BCV = completion_logits(student, prompts_BP, completions_BC)
        teacher_logits_BCV = torch.empty_like(logits_BCV)
        for name, teacher in teachers.items():
            own_B = torch.tensor([example.domain == name for example in examples])
            with torch.no_grad():
                teacher_logits_BCV[own_B] = completion_logits(teacher, prompts_BP[own_B], completions_BC[own_B])
        loss = reverse_kl(logits_BCV[mask_BC], teacher_logits_BCV[mask_BC]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 or step % 20 == 0:
            print(f"step {step:3d}: reverse KL {loss.item():.4f} nats a token", flush=True)


def score(model: PreTrainedModel, name: str) -> float:
    """Greedy score in % on held-out prompts of a domain."""
    examples = DOMAINS[name].draw(HELD_OUT, 200, seed=0)
    completions_BC = sample(model, encode([str(example.prompt) for example in examples], "left"), greedy=True)
    texts = TOKENIZER.batch_decode(completions_BC, skip_special_tokens=True)
    return 100 * sum(DOMAINS[name].score_all(list(zip(examples, texts, strict=True)))) / len(examples)


def main(seed: int) -> None:
    """Make the start, its two teachers and the student, and print what each scores."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    start = tiny_model(TinyModelConfig(hidden_size=64, layers=2, intermediate_size=128, max_length=64), TOKENIZER, seed)
    fine_tune(start, list(DOMAINS), 400, rng, rough=True)
    teachers = {name: copy.deepcopy(start) for name in DOMAINS}
    for name, teacher in teachers.items():
        fine_tune(teacher, [name], 60, rng, rough=False)
    student = copy.deepcopy(start)
    torch.manual_seed(seed)  # For the student's samples.
    distil(student, teachers, 60, rng)
    models = {"start": start, **{f"teacher {name}": teachers[name] for name in teachers}, "student": student}
    print(f"\n{'held-out score, %':20s}" + "".join(f"{name:>12s}" for name in DOMAINS))
    for who, model in models.items():
        print(f"{who:20s}" + "".join(f"{score(model, name):12.1f}" for name in DOMAINS))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
