"""Score one checkpoint on held-out examples: a greedy and several sampled completions of each, kept one by one.

The examples of a domain and split are the same for every checkpoint and seed of a run, so that all comparisons are
paired. The completions come from a sampler of the on-policy loop, one for all checkpoints of a run (`backend`), the
scores from the domain's own scorer, which is also the reward. An example with a copy in the training data of the
checkpoint or its ancestors is flagged as contaminated. An example without one is clean only if all of these data are
recorded; otherwise its status is unknown.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from base.errors import UserError
from base.store.checkpoint import Artifact, Store
from evals.comparison.copies import NEAR, Copies
from evals.comparison.scores import EXAMPLES_SEED, FILE
from evals.measure.samplers import evaluation_sampler
from experts.domain import Example
from stages.config.evaluation import EvaluationConfig
from stages.learner.device import accelerator
from stages.learner.training import step_seed
from stages.learner.workspace import Workspace
from stages.model.policy import Policy, load_policy
from stages.rows.chat import encode_prompt
from stages.rows.trained_on import TrainedOn
from stages.sampling.sampler import Sampler
from stages.sampling.samples import Sample, Sampling


@dataclass(frozen=True)
class EvaluationRequest:
    """One node of the graph: score the checkpoint on a domain's split.

    Attributes:
        workspace: Where the scores are written; its parent `checkpoint` is scored.
        config: How completions are drawn.
        domain: Name of the domain.
        split: `held_out` or `out_of_distribution`.
    """

    workspace: Workspace
    config: EvaluationConfig
    domain: str
    split: str


@dataclass(frozen=True)
class _Task:
    """A request with its examples and their prompts as token ids."""

    request: EvaluationRequest
    examples: Sequence[Example]
    prompts: Sequence[list[int]]

    @classmethod
    def of(cls, request: EvaluationRequest, policy: Policy) -> "_Task":
        domain = request.workspace.domains[request.domain]
        examples = domain.draw_up_to(request.config.examples, request.split, EXAMPLES_SEED)
        if not examples:
            raise UserError(f"domains.{request.domain}: no {request.split} examples")
        return cls(request, examples, [encode_prompt(policy.tokenizer, example.prompt) for example in examples])


def run(nodes: Sequence[Mapping[str, Any]], workspaces: Sequence[Workspace]) -> None:
    """Score one checkpoint on several domains and splits.

    Args:
        nodes: For each its `domain`, `split` and the settings of `EvaluationConfig`.
        workspaces: One per node, with the same parent `checkpoint`.
    """
    requests = []
    for node, workspace in zip(nodes, workspaces, strict=True):
        settings = dict(node)
        domain, split = settings.pop("domain"), settings.pop("split")
        requests.append(EvaluationRequest(workspace, EvaluationConfig(**settings), domain, split))
    evaluate(requests, workspaces[0].parents["checkpoint"], workspaces[0].store)


def evaluate(requests: Sequence[EvaluationRequest], checkpoint: Artifact, store: Store) -> list[Artifact]:
    """Score one checkpoint on several domains and splits.

    Returns:
        One artifact per request: `scores.jsonl` with a row per example, and mean scores in its manifest.

    Raises:
        UserError: a domain cannot supply the examples, a prompt does not fit the model, CUDA does not show the device
            that was leased, or vLLM cannot sample with the checkpoint.
    """
    # The nodes of one process have one precision: they differ in domain and split alone.
    config = requests[0].config
    device = accelerator(float32_matmul=config.float32_matmul).device
    policy = load_policy(checkpoint, store, remote_code=requests[0].workspace.remote_code)
    policy.compute_in(config.dtype)
    policy.model.to(device)
    trained = TrainedOn.read(checkpoint)
    copies = Copies(trained)
    tasks = [_Task.of(request, policy) for request in requests]
    longest = max(len(prompt) for task in tasks for prompt in task.prompts)
    with evaluation_sampler(config, policy, requests[0].workspace.folder / "engine", longest) as sampler:
        return [_evaluate(task, policy, sampler, copies, not trained.unknown) for task in tasks]


def _evaluate(task: _Task, policy: Policy, sampler: Sampler, copies: Copies, known: bool) -> Artifact:
    request, examples, prompts = task.request, task.examples, task.prompts
    config, workspace = request.config, request.workspace
    journal = workspace.journal()
    domain = workspace.domains[request.domain]
    total = 1 + (config.samples > 0)
    greedy = sampler.sample(prompts, 1, Sampling(config.max_new_tokens, 0.0, 1.0, config.batch_size, config.stop), 0)
    journal.progress(1, total)
    drawn: list[list[Sample]] = [[] for _ in examples]
    if config.samples:
        sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, config.batch_size, config.stop)
        seed = step_seed(workspace.seed, 0, f"evaluate {request.domain} {request.split}")
        drawn = sampler.sample(prompts, config.samples, sampling, seed)
        journal.progress(2, total)
    texts = [
        policy.texts((one.completion_ids for one in (best, *others)), config.stop)
        for (best,), others in zip(greedy, drawn, strict=True)
    ]
    pairs = [(example, text) for example, own in zip(examples, texts, strict=True) for text in own]
    scores = iter(domain.score_all(pairs))
    rows = []
    kinds = copies.find(domain, examples)
    for example, (best,), others, own, copy in zip(examples, greedy, drawn, texts, kinds, strict=True):
        judged = [_judged(one, text, next(scores)) for one, text in zip((best, *others), own, strict=True)]
        rows.append(_row(example, judged, copy, known))
    metrics = summary(rows) | domain.facts()
    for text in domain.news():
        journal.note(total, f"alarm: {text}")
    journal.metrics(total, {f"eval/{name}/{request.domain}": value for name, value in metrics.items()})
    folder = workspace.store.staging(workspace.key)
    (folder / FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workspace.commit(folder, trained_on=None, metrics=metrics, domain=request.domain, split=request.split)


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean greedy score, mean sampled score where there are samples, and the share of contaminated examples.

    Where some are unknown the share is named `contaminated_at_least`, and is absent at 0. `near_copies` is the part of
    this share that near copies make up, if there are any.
    """
    values = {"greedy": statistics.fmean(row["greedy"]["score"] for row in rows)}
    sampled = [completion["score"] for row in rows for completion in row["samples"]]
    if sampled:
        values["sampled"] = statistics.fmean(sampled)
    share = statistics.fmean(bool(row["contaminated"]) for row in rows)
    if all(row["contaminated"] is not None for row in rows):
        values["contaminated"] = share
    elif share:
        values["contaminated_at_least"] = share
    if near := statistics.fmean(row.get("copy") == NEAR for row in rows):
        values["near_copies"] = near
    return values


def _judged(drawn: Sample, completion: str, score: float) -> dict[str, Any]:
    """The record of one completion in the score sheet."""
    return {
        "completion": completion,
        "score": score,
        "tokens": len(drawn.completion_ids),
        "truncated": not drawn.finished,
    }


def _row(example: Example, judged: Sequence[Mapping[str, Any]], copy: str, known: bool) -> dict[str, Any]:
    """The score sheet's row of one example; the greedy completion comes first."""
    return {
        "id": example.id,
        "source": example.source,
        "prompt": example.prompt,
        "answer": example.answer,
        "contaminated": True if copy else False if known else None,
        "copy": copy,
        "greedy": judged[0],
        "samples": list(judged[1:]),
    }
