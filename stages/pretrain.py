"""Pretraining stage: a tiny model from scratch, so that the whole recipe runs without any downloaded checkpoint.

The corpus consists of the domains' own prompts and rough demonstrations in the chat form of all later stages, so that
chat and end tokens are trained; a share of the documents ends in another example's answer. The result is a base that
follows the formats and solves each task poorly, which leaves room for the experts. Each step takes whole documents up
to `batch_tokens`; prompt tokens have the weight `PROMPT_WEIGHT`. Left out: any attempt at general knowledge.
"""

import itertools
from collections.abc import Iterator

import torch

from base.store.checkpoint import Artifact
from stages.config.training import PretrainConfig
from stages.learner.stage import draw_training
from stages.learner.supervised import Demonstration, demonstrations, imitate
from stages.learner.training import Learner, epochs
from stages.learner.update import Row
from stages.learner.workspace import Workspace
from stages.model.policy import Policy
from stages.model.tiny import character_tokenizer, tiny_model

# Prompts are half noise, so they weigh less than answers; some wrong answers leave the base unsure of each task.
PROMPT_WEIGHT = 0.2
WRONG_ANSWERS = 0.05


def train(config: PretrainConfig, workspace: Workspace) -> Artifact:
    """Train a fresh tiny model on rough demonstrations of the workspace's domains.

    Raises:
        UserError: a domain has fewer than `examples` training examples, or some do not fit the model.
    """
    tokenizer = character_tokenizer()
    policy = Policy(tiny_model(config.model, tokenizer, workspace.seed), tokenizer)
    examples = draw_training(workspace, config)
    documents, notes = demonstrations(workspace, policy, examples, config, True, WRONG_ANSWERS)
    learner = Learner(policy, config, config.max_steps, workspace.progress, workspace.seed)

    def batches(done: int) -> Iterator[list[Row]]:
        packed = _packed(epochs(documents, workspace.seed), config.batch_tokens)
        for batch in itertools.islice(packed, done, None):
            yield _rows(learner.shard(batch), learner)

    return imitate("pretrain", learner, workspace, examples, batches, notes=notes)


def _packed(documents: Iterator[Demonstration], batch_tokens: int) -> Iterator[list[Demonstration]]:
    """Batches of whole documents with about `batch_tokens` tokens per step, at least one document."""
    while True:
        batch: list[Demonstration] = []
        size = 0
        while size < batch_tokens:
            batch.append(next(documents))
            size += sum(len(part) for part in batch[-1])
        yield batch


def _rows(documents: list[Demonstration], learner: Learner) -> list[Row]:
    """Rows that score every token but the first; the weights of all processes' tokens sum to 1."""
    weights = [
        torch.tensor([PROMPT_WEIGHT] * (len(prompt) - 1) + [1.0] * len(completion)) for prompt, completion in documents
    ]
    total = learner.global_sum(float(sum(w.sum() for w in weights)))
    return [
        Row([*prompt, *completion], 1, weights_N / total)
        for (prompt, completion), weights_N in zip(documents, weights, strict=True)
    ]
